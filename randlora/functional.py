"""The method without modules: the update, and the linear map with it, as autograd functions.

Shapes, with ``p = min(out, in)``, ``q = max(out, in)``, ``m = n·r`` (paper, equation 4):

    A (r, p)   B (q, m)   Λ (n, r)   Γ (n, p)   C (m, p)   ΔW (out, in)   x (T, in)   y (T, out)

    C[(j,k), c] = Λ[j,k] · A[k,c] · Γ[j,c]
    ΔW = scaling · B C            tall, out ≥ in;  (B C)ᵀ if wide
    y  = x (W0 + ΔW)ᵀ + bias

One matrix carries the whole gradient. With ``G = dyᵀ x``, transposed if wide, so always ``(q, p)``:

    P = scaling · Bᵀ G            (m, p)
    dΛ[j,k] = Σ_c P[(j,k),c] A[k,c] Γ[j,c]
    dΓ[j,c] = Σ_k P[(j,k),c] A[k,c] Λ[j,k]
    dx = dy (W0 + ΔW)

``C``, ``ΔW`` and ``P`` live only inside a call. Of the ways to bracket these products this module
takes the one through the weight: full fine-tuning's own three products, and three of ``m p q``,
which add ``p / T`` of their cost; :class:`_Linear` is where another choice would be made.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from randlora.bases import Operator

__all__ = ["delta_weight", "randlora_linear"]


# shape: a (r, p), lam (n, r), gamma (n, p) -> (m, p)
def _khatri_rao(a: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> Tensor:
    """``scaling · C``, rounded once to the dtype of ``a``."""
    c = (scaling * lam).unsqueeze(2) * a * gamma.unsqueeze(1)
    return c.flatten(0, 1).to(a.dtype)


# shape: a (r, p), lam (n, r), gamma (n, p), g (q, p) -> (n, r), (n, p)
def _parameter_grads(
    a: Tensor,
    b: Operator,
    lam: Tensor,
    gamma: Tensor,
    g: Tensor,
    scaling: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """``dΛ`` and ``dΓ``, as needed, from ``G``; summed in the wider dtype of ``Λ`` and ``A``."""
    wider = torch.promote_types(lam.dtype, a.dtype)
    pa = b.tmm(g).view(*lam.shape, -1).to(wider) * (scaling * a)  # (n, r, p)
    d_lam = d_gamma = None
    if needs[0]:
        d_lam = (pa @ gamma.to(wider).unsqueeze(2)).squeeze(2).to(lam.dtype)
    if needs[1]:
        d_gamma = (lam.to(wider).unsqueeze(1) @ pa).squeeze(1).to(gamma.dtype)
    return d_lam, d_gamma


# shape: -> (out, in)
def _update(
    a: Tensor, b: Operator, lam: Tensor, gamma: Tensor, scaling: float, wide: bool
) -> Tensor:
    delta = b.mm(_khatri_rao(a, lam, gamma, scaling))
    return delta.T if wide else delta


# shape: weight (out, in) -> (out, in)
def _effective(
    weight: Tensor, a: Tensor, b: Operator, lam: Tensor, gamma: Tensor, scaling: float, wide: bool
) -> Tensor:
    """``W0 + ΔW`` in the dtype of ``a``, which under autocast is lower than that of ``W0``."""
    return (weight + _update(a, b, lam, gamma, scaling, wide)).to(a.dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast has matrix products computed in, or None where it is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Inside a function the dtypes are chosen already, for backward as for forward."""
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class _DeltaWeight(torch.autograd.Function):
    """``Λ, Γ -> ΔW``, keeping only ``Λ`` and ``Γ`` for backward."""

    @staticmethod
    def forward(
        lam: Tensor, gamma: Tensor, a: Tensor, b: Operator, scaling: float, wide: bool
    ) -> Tensor:
        with _autocast_off(lam.device):
            return _update(a, b, lam, gamma, scaling, wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        lam, gamma, ctx.a, ctx.b, ctx.scaling, ctx.wide = inputs
        ctx.save_for_backward(lam, gamma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        lam, gamma = ctx.saved_tensors
        with _autocast_off(g.device):
            g = g.T if ctx.wide else g
            needs = ctx.needs_input_grad[:2]
            d_lam, d_gamma = _parameter_grads(ctx.a, ctx.b, lam, gamma, g, ctx.scaling, needs)
        return d_lam, d_gamma, None, None, None, None


class _Linear(torch.autograd.Function):
    """``x, W0, bias, Λ, Γ -> x (W0 + ΔW)ᵀ + bias``, keeping ``x``, ``Λ``, ``Γ`` and references.

    Only what the requested gradients need is saved and computed. The backward is made of
    differentiable operations, so it can be differentiated in turn.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lam: Tensor,
        gamma: Tensor,
        a: Tensor,
        b: Operator,
        scaling: float,
    ) -> Tensor:
        out_features, in_features = weight.shape
        with _autocast_off(x.device):
            w = _effective(weight, a, b, lam, gamma, scaling, out_features < in_features)
            return F.linear(x, w, bias if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, lam, gamma, ctx.a, ctx.b, ctx.scaling = inputs
        needs_x, needs_weight, _, needs_lam, needs_gamma, *_ = ctx.needs_input_grad
        out_features, in_features = weight.shape
        ctx.wide = out_features < in_features
        ctx.save_for_backward(
            x if needs_weight or needs_lam or needs_gamma else None,
            weight if needs_x else None,
            lam,
            gamma,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, lam, gamma = ctx.saved_tensors
        a, b, scaling = ctx.a, ctx.b, ctx.scaling
        needs_x, needs_weight, needs_bias, needs_lam, needs_gamma, *_ = ctx.needs_input_grad

        dx = d_weight = d_bias = d_lam = d_gamma = None
        rows = dy.reshape(-1, dy.shape[-1])  # (T, out)
        with _autocast_off(dy.device):
            if needs_x:
                dx = dy @ _effective(weight, a, b, lam, gamma, scaling, ctx.wide)
            if needs_bias:
                d_bias = rows.sum(0)
            if x is not None:
                g = rows.T @ x.reshape(-1, x.shape[-1])  # (out, in)
                if needs_weight:
                    d_weight = g
                if needs_lam or needs_gamma:
                    needs = needs_lam, needs_gamma
                    g = g.T if ctx.wide else g
                    d_lam, d_gamma = _parameter_grads(a, b, lam, gamma, g, scaling, needs)
        return dx, d_weight, d_bias, d_lam, d_gamma, None, None, None


def delta_weight(
    lam: Tensor, gamma: Tensor, a: Tensor, b: Operator, *, scaling: float = 1.0, wide: bool = False
) -> Tensor:
    """Return ``ΔW``, differentiable in ``Λ`` and ``Γ`` (paper, equation 4).

    Args:
        lam: ``Λ``, shape ``(n, r)``, floating.
        gamma: ``Γ``, shape ``(n, p)``, in the dtype of ``lam``.
        a: ``A``, shape ``(r, p)``; its dtype is the one computed in and returned.
        b: ``B``, an operator of shape ``(q, n·r)``.
        scaling: the factor of the update.
        wide: whether ``out < in``.

    Returns:
        Shape ``(q, p)``, or ``(p, q)`` if wide: always ``out × in``.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    _check_shapes(lam, gamma, a, b)
    delta: Tensor = _DeltaWeight.apply(lam, gamma, a, b, scaling, wide)  # type: ignore[no-untyped-call]
    return delta


def randlora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """Return ``x (W0 + ΔW)ᵀ + bias``, differentiable in every tensor but the bases.

    The layer is tall or wide as ``weight`` is. Backward keeps ``x``, ``Λ``, ``Γ`` and the weight by
    reference, nothing else.

    Args:
        x: shape ``(..., in)`` with any number of leading dimensions, floating.
        weight: ``W0``, shape ``(out, in)``; in the dtype of ``x``, or higher under autocast.
        bias: shape ``(out,)``, or None.
        lam: ``Λ``, shape ``(n, r)``; commonly float32 whatever the dtype of ``x``.
        gamma: ``Γ``, shape ``(n, p)``, in the dtype of ``lam``.
        a: ``A``, shape ``(r, p)``, in the dtype of ``x``.
        b: ``B``, an operator of shape ``(q, n·r)``.
        scaling: the factor of the update.

    Returns:
        Shape ``(..., out)``, in the dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not in the dtype of ``a``.
        ValueError: if the shapes do not fit each other.
    """
    _check_shapes(lam, gamma, a, b)
    if {*weight.shape} != {b.shape[0], gamma.shape[1]}:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not fit bases for "
            f"q={b.shape[0]} and p={gamma.shape[1]}"
        )
    check_input(x, weight.shape[1], a.dtype)
    y: Tensor = _Linear.apply(x, weight, bias, lam, gamma, a, b, scaling)  # type: ignore[no-untyped-call]
    return y


def check_input(x: Tensor, in_features: int, dtype: torch.dtype) -> None:
    """Raise unless ``x`` is a tensor of shape ``(..., in_features)`` and of the given dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input x must be a tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"input x must be a tensor of {dtype}, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"input x must have shape (..., {in_features}), got {tuple(x.shape)}")


def _check_shapes(lam: Tensor, gamma: Tensor, a: Tensor, b: Operator) -> None:
    (n, r), p, q = lam.shape, gamma.shape[1], b.shape[0]
    for name, got, needed in (
        ("gamma", gamma.shape, (n, p)),
        ("a", a.shape, (r, p)),
        ("b", b.shape, (q, n * r)),
    ):
        if tuple(got) != needed:
            raise ValueError(
                f"{name} must have shape {needed} beside lam of shape {(n, r)} and gamma of shape "
                f"{tuple(gamma.shape)}, got {tuple(got)}"
            )
