"""Autograd functions: ``EffectiveWeight`` (``W0 + ΔW``), ``Linear`` (``x (W0 + ΔW)ᵀ + bias``).

Shapes, with ``p = min(out, in)``, ``q = max(out, in)``, ``m = n·r`` (paper, equation 4):

    A (r, p)   B (q, m)   Λ (n, r)   Γ (n, p)   C (m, p)   ΔW (out, in)   x (T, in)   y (T, out)

    C[(j,k), c] = Λ[j,k] · A[k,c] · Γ[j,c]
    ΔW = scaling · B C            if out ≥ in (tall);   scaling · (B C)ᵀ if out < in (wide)
    y  = x (W0 + ΔW)ᵀ + bias

All gradients of ``Λ``, ``Γ`` and, if it is trained, ``A`` follow from one matrix, ``P``. With
``G = dyᵀ x``, transposed if wide, so that its shape is always ``(q, p)``:

    P = scaling · Bᵀ G            (m, p)
    dΛ[j,k] = Σ_c P[(j,k),c] A[k,c] Γ[j,c]
    dΓ[j,c] = Σ_k P[(j,k),c] A[k,c] Λ[j,k]
    dA[k,c] = Σ_j P[(j,k),c] Λ[j,k] Γ[j,c]
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

from randlora.core import few_tokens
from randlora.core.matmul import addmm_, apply_to_parts, cast, mm, mm_wider, transforming
from randlora.core.operators import Operator
from randlora.core.planning import FEW_FOR_GRADS, Plan
from randlora.core.update import FactoredUpdate, Grads, Needs, is_few


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

    Where the function runs as plain operations a view is allowed: in a trace (with gradients
    enabled), and under transforms, of which detaching could lose the tangent.
    """
    if torch.is_grad_enabled() or transforming():
        return result
    view = torch.compiler.is_compiling() or result._is_view()  # compilers cannot tell
    return result.detach() if view else result


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses for matrix products, or None while autocast is off."""
    compiling, kind = torch.compiler.is_compiling(), device.type
    if kind == "meta" or not (compiling or torch._C._is_any_autocast_enabled()):
        return None  # the fastest question
    # Dynamo of torch 2.9 to 2.11 cannot trace the question whether autocast is available.
    if (compiling or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def autocast_dtype_of(weight: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes with a weight. It leaves float64 alone."""
    return None if weight.dtype == torch.float64 else autocast_dtype(weight.device)


def _autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast: the functions choose the dtypes, the same ones in forward and backward."""
    on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _saved_or_kept(needed: bool, tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A base to save for backward, if it is trained, and one to keep on ``ctx``, if it is frozen.

    Hooks on saved tensors (of checkpoints, of offloading) need not see frozen bases.
    """
    return (tensor, None) if needed else (None, tensor)


class EffectiveWeight(torch.autograd.Function):
    """``W0, Λ, Γ, A -> W0 + ΔW``, or ``ΔW`` if ``W0`` is None. Saves only the trained tensors."""

    @staticmethod
    def forward(
        weight: Tensor | None,
        lam: Tensor,
        gamma: Tensor,
        a: Tensor,
        b: Operator,
        dtype: torch.dtype,
        scaling: float,
        wide: bool,
        token: int,
    ) -> Tensor:
        with _autocast_off(lam.device):
            return _owned(FactoredUpdate(lam, gamma, a, b, scaling, wide, dtype).whole(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, lam, gamma, a, ctx.b, _, ctx.scaling, ctx.wide, token = inputs
        trained, ctx.a = _saved_or_kept(ctx.needs_input_grad[3], a)
        ctx.save_for_backward(lam, gamma, trained, _mark(lam, token))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dw,) = grads
        lam, gamma, a, _ = ctx.saved_tensors
        needs_weight, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1:4]
        found: Grads = (None, None, None)
        with _autocast_off(dw.device):
            if any(needs):
                a = ctx.a if a is None else a
                update = FactoredUpdate(lam, gamma, a, ctx.b, ctx.scaling, ctx.wide, dw.dtype)
                found = _parameter_grads(update, needs, d_weight=dw)
        return (dw if needs_weight else None, *found, None, None, None, None, None)


class Linear(torch.autograd.Function):
    """``x, W0, bias, Λ, Γ, A -> y``, followed by what the plan keeps: ``x B``, ``W0 + ΔW``.

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
            update = FactoredUpdate(lam, gamma, a, b, scaling, wide, x.dtype)
            xb: Any
            by_activations, keeps_xb = plan.forward == "activations", plan.keeps == "xb"
            if by_activations and is_few(x, a, lam.shape[0]):
                y, xb = few_linear(x, weight, bias, *update.factors(), b, wide)
                kept: list[Tensor] = [cast(xb, x.dtype)] if keeps_xb else []
                return (_owned(y), *map(_owned, kept))
            kept = []
            if wide and (by_activations or keeps_xb):
                xb = b.tokens_half(_rows(x)) if keeps_xb and plan.halves else b.tokens_mm(_rows(x))
                kept = [xb] if keeps_xb else []
            if by_activations:
                y = _frozen(x, weight, bias, update.out_features)
                shape, y = y.shape, _rows(y)
                y = _add_through(update, y, xb) if wide else _add_back(update, y, _rows(x))
                y = y.view(shape)
            elif plan.keep_weight:
                w = update.whole(weight)
                y, kept = F.linear(x, w, _like(bias, x)), [*kept, w]
            else:
                y = _by_weight(update, weight, x, _like(bias, x))
            return (_owned(y), *map(_owned, kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, _, lam, gamma, a, ctx.b, ctx.scaling, plan, ctx.wide, token = inputs
        needs_x, needs_weight, _, *needs, needs_a = ctx.needs_input_grad[:6]
        kept = list(output[1:])
        xb = kept.pop(0) if plan.keeps == "xb" else None
        w = kept.pop(0) if plan.keep_weight else None
        needs_activation = needs_weight or any(needs) or needs_a
        trained, ctx.a = _saved_or_kept(needs_a, a)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        ctx.save_for_backward(
            x if needs_activation and xb is None else None,
            xb if needs_activation else None,
            weight if needs_x and w is None else None,
            w if needs_x else None,
            lam,
            gamma,
            trained,
            _mark(lam, token),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x: Any
        x, xb, weight, w, lam, gamma, a, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs, plan, wide, b = ctx.needs_input_grad[3:6], ctx.plan, ctx.wide, ctx.b
        a = ctx.a if a is None else a
        # The gradients of kept tensors exist only in second derivatives. Compiled code has none of
        # these, but gets zeros here, because Dynamo ignores `set_materialize_grads`. (In Dynamo of
        # torch 2.9, `*d_kept` would be a tuple.)
        dy, d_kept = grads[0], list(grads[1:])
        if torch.compiler.is_compiling():
            d_kept = [None] * len(d_kept)
        dxb = d_kept.pop(0) if plan.keeps == "xb" else None
        dw = d_kept.pop(0) if plan.keep_weight else None
        if dy is None:
            shape = *ctx.shape[:-1], a.shape[1] if wide else b.shape[0]
            dy = a.new_zeros(shape, dtype=ctx.dtype)

        dx: Any = None
        d_weight: Any = None
        d_bias = None
        found: Grads = (None, None, None)
        with _autocast_off(dy.device):
            update = FactoredUpdate(lam, gamma, a, b, ctx.scaling, wide, ctx.dtype)
            rows = _rows(dy)  # (T, out)
            x = x if x is None else _rows(x)  # (T, in)
            by_activations = plan.grad_parameters == "activations" and any(needs)
            # dy B serves both gradients of a tall layer.
            shared = by_activations or (needs_x and plan.grad_input == "activations")
            to_tokens = b.tokens_half if plan.halves else b.tokens_mm
            dyb: Any = to_tokens(rows) if shared and not wide else None  # (T, m)
            if needs_bias:
                d_bias = rows.sum(0)
            if needs_weight:
                d_weight = mm(rows.T, x) if dw is None else torch.addmm(dw, rows.T, x)
            if any(needs):
                if by_activations and wide and xb is None:
                    xb = to_tokens(x)
                left = (xb if wide else dyb) if by_activations else None
                found = _parameter_grads(
                    update, needs, d_weight, dw, left, rows, x, halves=plan.halves
                )
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
                    dx = (b.half_addmm_ if plan.halves else b.tokens_addmm_)(dx, dxb)
                dx = dx.view(ctx.shape)
        return dx, d_weight, d_bias, *found, None, None, None, None, None


# shape: x (..., in), weight (out, in) -> (..., out), (T, m) or None
def few_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    wide: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward of few tokens, through the activations; and ``x B``, if wide.

    ``lam``, ``gamma`` and ``a`` are :meth:`FactoredUpdate.factors`.
    """
    y, xb = _frozen(x, weight, bias, a.shape[1] if wide else b.shape[0]), None
    y_rows = y.view(-1, y.shape[-1])
    rows = x.view(-1, x.shape[-1]) if x.is_contiguous() else _rows(x)  # a view takes less time
    if wide:
        xb = b.tokens_mm(cast(rows, gamma.dtype) if b.takes_wider else rows)
        added = few_tokens.add_through_(y_rows, xb, lam, gamma, a)
    else:
        added = few_tokens.add_back_(y_rows, rows, lam, gamma, a, b)
    return y if added is y_rows else added.view(y.shape), xb


# shape: d_weight and dw (out, in), left (T, m), rows (T, out), x (T, in) -> (n, r), (n, p), (r, p)
def _parameter_grads(
    update: FactoredUpdate,
    needs: Needs,
    d_weight: Tensor | None,
    dw: Tensor | None = None,
    left: Tensor | None = None,
    rows: Any = None,
    x: Any = None,
    *,
    halves: bool = False,
) -> Grads:
    """``dΛ``, ``dΓ``, ``dA``: through the activations if ``left`` is given, else the weight.

    ``left`` is ``x B`` if wide, ``dy B`` if tall; one half of it if ``halves``. ``d_weight`` is the
    gradient of the weight, ``dyᵀ x + dw``, if it was computed. ``dw`` is the gradient of the kept
    ``W0 + ΔW``.
    """
    wide, shares = update.wide, []
    of_q, of_p = (x, rows) if wide else (rows, x)  # with q and with p columns
    n = update.lam.shape[0]
    if left is not None and dw is None and not halves and is_few(left, update.a, n, FEW_FOR_GRADS):
        d_lam, d_gamma, d_a = few_tokens.grads(left, of_p, *update.factors(), needs)
        shares.append((d_lam, d_gamma, d_a if d_a is None else update.scaling * d_a))
    for tile in () if shares else update.tiles():
        if left is not None:
            p_tile = mm_wider(left.T, of_p[:, tile])  # (m, tile)
            p_tile = update.b.half_tmm(p_tile) if halves else p_tile
        elif d_weight is not None:
            p_tile = update.p_matrix(d_weight[tile].T if wide else d_weight[:, tile])
        else:
            p_tile = update.p_matrix(mm_wider(of_q.T, of_p[:, tile]))
        if dw is not None and (left is not None or d_weight is None):
            p_tile = p_tile + update.p_matrix(dw[tile].T if wide else dw[:, tile])
        shares.append(update.parameter_grads(p_tile, tile, needs))
    lams, gammas, bases = zip(*shares, strict=True)
    return _whole(lams, update.lam), _whole(gammas, update.gamma, 1), _whole(bases, update.a, 1)


def _whole(shares: tuple[Any, ...], like: Tensor, dim: int | None = None) -> Tensor | None:
    """A gradient in the dtype of ``like``: shares of the tiles summed, or columns side by side."""
    first, *rest = shares
    if first is None:
        return None
    if rest:
        first = torch.stack(shares).sum(0) if dim is None else torch.cat(shares, dim)
    return first.to(like.dtype)  # type: ignore[no-any-return]


# shape: x (..., k) -> (T, k)
def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


# shape: x (..., in), weight (out, in) -> (..., out)
def _frozen(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: int) -> Tensor:
    """What the plain layer computes, or zeros without a weight."""
    if weight is None:
        return x.new_zeros(*x.shape[:-1], out)
    return F.linear(x, cast(weight, x.dtype), _like(bias, x))


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return bias if bias is None else cast(bias, x.dtype)


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
    if is_few(left, update.a, update.lam.shape[0]):
        return few_tokens.add_through_(total, left, *update.factors())
    return apply_to_parts(
        total, update.tiles(), 1, lambda part, tile: addmm_(part, left, update.c(tile))
    )


# shape: total (T, q), rows (T, p) -> (T, q)
def _add_back(update: FactoredUpdate, total: Tensor, rows: Tensor) -> Tensor:
    """``total + rows Cᵀ Bᵀ``: the forward if tall, the gradient of the input if wide."""
    if is_few(rows, update.a, update.lam.shape[0]):
        return few_tokens.add_back_(total, rows, *update.factors(), update.b)
    first, *rest = update.tiles()
    if update.b.by_columns:
        inner = mm(update.c(first), rows[:, first].T).T  # (T, m)
    else:
        inner = mm(rows[:, first], update.c(first).T)
    for tile in rest:
        inner = addmm_(inner, rows[:, tile], update.c(tile).T)
    return update.b.tokens_addmm_(total, inner)
