"""The method without modules: ``ΔW``, ``W0 + ΔW`` and the linear map with it, on tensors.

Shapes and the mathematics are those of :mod:`randlora.kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.kernel import EffectiveWeight, Linear
from randlora.operators import Operator
from randlora.planning import AUTOMATIC, Choice, Work, choose

__all__ = ["delta_weight", "effective_weight", "randlora_linear"]


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
    delta: Tensor = EffectiveWeight.apply(None, lam, gamma, a, b, scaling, wide)  # type: ignore[no-untyped-call]
    return delta


def effective_weight(
    weight: Tensor,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    *,
    scaling: float = 1.0,
    wide: bool | None = None,
) -> Tensor:
    """Return ``W0 + ΔW``, shape ``(out, in)``, differentiable in ``W0``, ``Λ`` and ``Γ``.

    Arguments and errors are those of :func:`randlora_linear`; ``wide``, by default whether ``out <
    in``, is whether ``ΔW`` is ``(B C)ᵀ``. In low precision the sum is rounded once.
    """
    _check_shapes(lam, gamma, a, b)
    _check_weight(weight, gamma, b)
    wide = weight.shape[0] < weight.shape[1] if wide is None else wide
    w: Tensor = EffectiveWeight.apply(weight, lam, gamma, a, b, scaling, wide)  # type: ignore[no-untyped-call]
    return w


def randlora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    *,
    scaling: float = 1.0,
    choice: Choice = AUTOMATIC,
) -> Tensor:
    """Return ``x (W0 + ΔW)ᵀ + bias``, differentiable in every tensor but the bases.

    Without a weight it is the update alone, ``x ΔWᵀ``. Backward keeps one activation, ``x`` or
    ``x B``, beside ``Λ``, ``Γ`` and the weight by reference.

    Args:
        x: shape ``(..., in)`` with any number of leading dimensions, floating.
        weight: ``W0``, shape ``(out, in)``, in the dtype of ``x``, or higher under autocast; or
            None.
        bias: shape ``(out,)``, or None.
        lam: ``Λ``, shape ``(n, r)``; commonly float32 whatever the dtype of ``x``.
        gamma: ``Γ``, shape ``(n, p)``, in the dtype of ``lam``.
        a: ``A``, shape ``(r, p)``, in the dtype of ``x``.
        b: ``B``, an operator of shape ``(q, n·r)``.
        scaling: the factor of the update.
        choice: what is fixed of the plan; the planner chooses the rest by cost.

    Returns:
        Shape ``(..., out)``, in the dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not in the dtype of ``a``.
        ValueError: if the shapes do not fit each other.
    """
    _check_shapes(lam, gamma, a, b)
    if not isinstance(choice, Choice):
        raise TypeError(f"choice must be a planning.Choice, got {type(choice).__name__}")
    p, q = a.shape[1], b.shape[0]
    if weight is None:
        if bias is not None:
            raise ValueError("bias must be None without a weight: it is not the update's")
        in_features = q if isinstance(x, Tensor) and x.ndim and x.shape[-1] == q else p
    else:
        _check_weight(weight, gamma, b)
        in_features = weight.shape[1]
    check_input(x, in_features, a.dtype)
    wide = in_features > p
    on = torch.is_grad_enabled()
    work = work_of(
        x.numel() // in_features,
        a,
        b,
        wide,
        needs_input=on and x.requires_grad,
        needs_parameters=on and (lam.requires_grad or gamma.requires_grad),
        needs_weight=on and weight is not None and weight.requires_grad,
        alone=weight is None,
    )
    # A compiler takes no caches.
    plan = (choose.__wrapped__ if torch.compiler.is_compiling() else choose)(work, choice)
    kept = Linear.apply(x, weight, bias, lam, gamma, a, b, scaling, plan, wide)  # type: ignore[no-untyped-call]
    y: Tensor = kept[0]
    return y


def work_of(
    tokens: int,
    a: Tensor,
    b: Operator,
    wide: bool,
    *,
    needs_input: bool = True,
    needs_parameters: bool = True,
    needs_weight: bool = False,
    alone: bool = False,
) -> Work:
    """What the planner has to know of a call."""
    return Work(
        tokens=tokens,
        p=a.shape[1],
        q=b.shape[0],
        m=b.shape[1],
        wide=wide,
        needs_input=needs_input,
        needs_parameters=needs_parameters,
        needs_weight=needs_weight,
        alone=alone,
        weight_cost=b.weight_cost,
        token_cost=b.token_cost,
    )


# --- checks --------------------------------------------------------------------------------------


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


def _check_weight(weight: Tensor, gamma: Tensor, b: Operator) -> None:
    if sorted(weight.shape) != sorted((b.shape[0], gamma.shape[1])):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not fit bases for "
            f"q={b.shape[0]} and p={gamma.shape[1]}"
        )
