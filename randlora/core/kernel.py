"""Autograd functions: ``EffectiveWeight`` (``W0 + ΔW``), ``Linear`` (``x (W0 + ΔW)ᵀ + bias``).

Shapes, with ``p = min(out, in)``, ``q = max(out, in)``, ``m = n·r`` (paper, equation 4):

    A (r, p)   B (q, m)   Λ (n, r)   Γ (n, p)   C (m, p)   ΔW (out, in)   x (T, in)   y (T, out)

    C[(j,k), c] = Λ[j,k] · A[k,c] · Γ[j,c]
    ΔW = scaling · B C            if out ≥ in (tall);   scaling · (B C)ᵀ if out < in (wide)
    y  = x (W0 + ΔW)ᵀ + bias

All gradients of ``Λ`` and ``Γ`` follow from one matrix, ``P``. With ``G = dyᵀ x``, transposed if
wide, so that its shape is always ``(q, p)``:

    P = scaling · Bᵀ G            (m, p)
    dΛ[j,k] = Σ_c P[(j,k),c] A[k,c] Γ[j,c]
    dΓ[j,c] = Σ_k P[(j,k),c] A[k,c] Λ[j,k]
    dx = dy (W0 + ΔW)

Each of the products ``x (B C)ᵀ``, ``dy (B C)`` and ``Bᵀ G`` is computed either through the weight
or through the activations. A :class:`Plan` says which (:mod:`randlora.core.planning`). ``C``,
``ΔW``, ``G`` and ``P`` exist only inside a call, in tiles of their ``p`` columns
(:mod:`randlora.core.update`).

The frozen product is called exactly as the plain layer calls it: ``F.linear``, with ``x`` in its
own shape and a weight with the strides of ``W0``. Otherwise its result would not equal the plain
layer's bit for bit. No output is a view: torch forbids in-place operations on a view that an
autograd function returns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.core.matmul import addmm_, apply_to_parts, mm, mm_wider
from randlora.core.operators import Operator
from randlora.core.planning import Plan
from randlora.core.update import FactoredUpdate


def _mark(like: Tensor, token: int) -> Tensor | None:
    """An empty tensor of shape ``(0, token)``. It is saved so that recomputation can be checked.

    An activation checkpoint compares the shapes of saved tensors, so it fails if the token differs.
    Without hooks on saved tensors nothing is compared, and the result is None.
    """
    if not token or torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else like.new_empty((0, token))


def _owned(result: Tensor) -> Tensor:
    """``result`` as a tensor that is not a view, so that it can be changed in place.

    While a trace runs the function as plain operations (with gradients enabled), a view is allowed.
    """
    if torch.is_grad_enabled():
        return result
    view = torch.compiler.is_compiling() or result._is_view()  # compilers cannot tell
    return result.detach() if view else result


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses for matrix products, or None while autocast is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast: the functions choose the dtypes, the same ones in forward and backward."""
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


class EffectiveWeight(torch.autograd.Function):
    """``W0, Λ, Γ -> W0 + ΔW``, or ``ΔW`` if ``W0`` is None. Saves only ``Λ`` and ``Γ``."""

    @staticmethod
    def forward(
        weight: Tensor | None,
        lam: Tensor,
        gamma: Tensor,
        a: Tensor,
        b: Operator,
        scaling: float,
        wide: bool,
        token: int,
    ) -> Tensor:
        with _autocast_off(lam.device):
            return _owned(FactoredUpdate(lam, gamma, a, b, scaling, wide).whole(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, lam, gamma, ctx.a, ctx.b, ctx.scaling, ctx.wide, token = inputs
        ctx.save_for_backward(lam, gamma, _mark(lam, token))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dw,) = grads
        lam, gamma, _ = ctx.saved_tensors
        needs_weight, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1:3]
        d_lam = d_gamma = None
        with _autocast_off(dw.device):
            if any(needs):
                update = FactoredUpdate(lam, gamma, ctx.a, ctx.b, ctx.scaling, ctx.wide)
                d_lam, d_gamma = _parameter_grads(update, needs, d_weight=dw)
        return (dw if needs_weight else None, d_lam, d_gamma, None, None, None, None, None)


class Linear(torch.autograd.Function):
    """``x, W0, bias, Λ, Γ -> y``, followed by what the plan keeps: ``x B``, ``W0 + ΔW``.

    Kept tensors are outputs and backward uses differentiable operations, so second derivatives
    work. Only what the required gradients need is kept and computed.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lam: Tensor,
        gamma: Tensor,
        a: Tensor,
        b: Operator,
        scaling: float,
        plan: Plan,
        wide: bool,
        token: int,
    ) -> tuple[Tensor, ...]:
        with _autocast_off(x.device):
            update = FactoredUpdate(lam, gamma, a, b, scaling, wide)
            bias = bias if bias is None else bias.to(x.dtype)
            kept: list[Tensor] = []
            by_activations = plan.forward == "activations"
            if wide and (by_activations or plan.keeps == "xb"):
                xb = b.tokens_mm(_rows(x))
                kept = [xb] if plan.keeps == "xb" else []
            if by_activations:
                if weight is None:
                    y = x.new_zeros(*x.shape[:-1], update.out_features)
                else:
                    y = F.linear(x, weight.to(x.dtype), bias)
                shape, y = y.shape, _rows(y)
                y = _add_through(update, y, xb) if wide else _add_back(update, y, _rows(x))
                y = y.view(shape)
            elif plan.keep_weight:
                w = update.whole(weight)
                y, kept = F.linear(x, w, bias), [*kept, w]
            else:
                y = _by_weight(update, weight, x, bias)
            return (_owned(y), *map(_owned, kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, _, lam, gamma, ctx.a, ctx.b, ctx.scaling, plan, ctx.wide, token = inputs
        needs_x, needs_weight, _, needs_lam, needs_gamma, *_ = ctx.needs_input_grad
        kept = list(output[1:])
        xb = kept.pop(0) if plan.keeps == "xb" else None
        w = kept.pop(0) if plan.keep_weight else None
        needs_activation = needs_weight or needs_lam or needs_gamma
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.shape = plan, x.shape
        ctx.save_for_backward(
            x if needs_activation and xb is None else None,
            xb if needs_activation else None,
            weight if needs_x and w is None else None,
            w if needs_x else None,
            lam,
            gamma,
            _mark(lam, token),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x: Any
        x, xb, weight, w, lam, gamma, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_lam, needs_gamma, *_ = ctx.needs_input_grad
        needs, plan, wide, b = (needs_lam, needs_gamma), ctx.plan, ctx.wide, ctx.b
        # The gradients of kept tensors exist only in second derivatives.
        dy, *d_kept = grads
        dxb = d_kept.pop(0) if plan.keeps == "xb" else None
        dw = d_kept.pop(0) if plan.keep_weight else None
        if dy is None:
            dy = ctx.a.new_zeros(*ctx.shape[:-1], ctx.a.shape[1] if wide else b.shape[0])

        dx: Any = None
        d_weight: Any = None
        d_bias = d_lam = d_gamma = None
        with _autocast_off(dy.device):
            update = FactoredUpdate(lam, gamma, ctx.a, b, ctx.scaling, wide)
            rows = _rows(dy)  # (T, out)
            x = x if x is None else _rows(x)  # (T, in)
            by_activations = plan.grad_parameters == "activations" and any(needs)
            # dy B serves both gradients of a tall layer.
            shared = by_activations or (needs_x and plan.grad_input == "activations")
            dyb: Any = b.tokens_mm(rows) if shared and not wide else None  # (T, m)
            if needs_bias:
                d_bias = rows.sum(0)
            if needs_weight:
                d_weight = mm(rows.T, x) if dw is None else torch.addmm(dw, rows.T, x)
            if any(needs):
                if by_activations and wide and xb is None:
                    xb = b.tokens_mm(x)
                left = (xb if wide else dyb) if by_activations else None
                d_lam, d_gamma = _parameter_grads(update, needs, d_weight, dw, left, rows, x)
                del left
            if plan.grad_input == "weight":
                dyb = None
            # The gradient of x comes last, when tensors that it does not need are freed.
            if needs_x:
                if plan.grad_input == "weight":
                    dx = mm(rows, w) if w is not None else _by_weight_back(update, weight, rows)
                else:
                    if weight is None:
                        dx = rows.new_zeros(len(rows), ctx.shape[-1])
                    else:
                        dx = mm(rows, weight.to(rows.dtype))
                    dx = _add_back(update, dx, rows) if wide else _add_through(update, dx, dyb)
                if dxb is not None:
                    dx = b.tokens_addmm_(dx, dxb)
                dx = dx.view(ctx.shape)
        return dx, d_weight, d_bias, d_lam, d_gamma, None, None, None, None, None, None


# shape: d_weight and dw (out, in), left (T, m), rows (T, out), x (T, in) -> (n, r), (n, p)
def _parameter_grads(
    update: FactoredUpdate,
    needs: tuple[bool, bool],
    d_weight: Tensor | None,
    dw: Tensor | None = None,
    left: Tensor | None = None,
    rows: Any = None,
    x: Any = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``dΛ`` and ``dΓ``: through the activations if ``left`` is given, else through the weight.

    ``left`` is ``x B`` if wide, ``dy B`` if tall. ``d_weight`` is the gradient of the weight,
    ``dyᵀ x + dw``, if it was computed. ``dw`` is the gradient of the kept ``W0 + ΔW``.
    """
    wide, shares = update.wide, []
    of_q, of_p = (x, rows) if wide else (rows, x)  # with q and with p columns
    for tile in update.tiles():
        if left is not None:
            p_tile = mm_wider(left.T, of_p[:, tile])  # (m, tile)
        elif d_weight is not None:
            p_tile = update.p_matrix(d_weight[tile].T if wide else d_weight[:, tile])
        else:
            p_tile = update.p_matrix(mm_wider(of_q.T, of_p[:, tile]))
        if dw is not None and (left is not None or d_weight is None):
            p_tile = p_tile + update.p_matrix(dw[tile].T if wide else dw[:, tile])
        shares.append(update.parameter_grads(p_tile, tile, needs))
    lams: list[Any] = [d_lam for d_lam, _ in shares]
    gammas: list[Any] = [d_gamma for _, d_gamma in shares]
    one = len(shares) == 1
    return (
        (lams[0] if one else torch.stack(lams).sum(0)).to(update.lam.dtype) if needs[0] else None,
        (gammas[0] if one else torch.cat(gammas, 1)).to(update.gamma.dtype) if needs[1] else None,
    )


# shape: x (..., k) -> (T, k)
def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# shape: weight (out, in), x (..., in) -> (..., out)
def _by_weight(
    update: FactoredUpdate, weight: Tensor | None, x: Tensor, bias: Tensor | None
) -> Tensor:
    """``x (W0 + ΔW)ᵀ + bias``, through the weight."""
    tiles = update.tiles()
    if len(tiles) == 1:
        return F.linear(x, update.whole(weight), bias)
    if update.wide:
        parts = [
            F.linear(x, update.effective(weight, t), bias if bias is None else bias[t])
            for t in tiles
        ]
        return torch.cat(parts, -1)
    (first, *rest), rows = tiles, _rows(x)
    y = F.linear(rows[:, first], update.effective(weight, first), bias)
    for tile in rest:
        y = addmm_(y, rows[:, tile], update.effective(weight, tile).T)
    return y.view(*x.shape[:-1], update.out_features)


# shape: weight (out, in), rows (T, out) -> (T, in)
def _by_weight_back(update: FactoredUpdate, weight: Tensor | None, rows: Tensor) -> Tensor:
    """``dy (W0 + ΔW)``, through the weight."""
    if not update.wide:
        parts = [mm(rows, update.effective(weight, tile)) for tile in update.tiles()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    first, *rest = update.tiles()
    dx = mm(rows[:, first], update.effective(weight, first))
    for tile in rest:
        dx = addmm_(dx, rows[:, tile], update.effective(weight, tile))
    return dx


# shape: total (T, p), left (T, m) -> (T, p)
def _add_through(update: FactoredUpdate, total: Tensor, left: Tensor) -> Tensor:
    """``total + left C``: the forward if wide, the gradient of the input if tall.

    ``left`` is ``x B`` if wide, ``dy B`` if tall.
    """
    return apply_to_parts(
        total, update.tiles(), 1, lambda part, tile: addmm_(part, left, update.c(tile))
    )


# shape: total (T, q), rows (T, p) -> (T, q)
def _add_back(update: FactoredUpdate, total: Tensor, rows: Tensor) -> Tensor:
    """``total + rows Cᵀ Bᵀ``: the forward if tall, the gradient of the input if wide."""
    first, *rest = update.tiles()
    if update.b.by_columns:
        inner = mm(update.c(first), rows[:, first].T).T  # (T, m)
    else:
        inner = mm(rows[:, first], update.c(first).T)
    for tile in rest:
        inner = addmm_(inner, rows[:, tile], update.c(tile).T)
    return update.b.tokens_addmm_(total, inner)
