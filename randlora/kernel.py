"""The kernel: the update, and the linear map that carries it, as autograd functions.

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

Three products, ``x (B C)ᵀ``, ``dy (B C)`` and ``Bᵀ G``, each of which may be taken through the
weight or through the activations; :mod:`randlora.planning` decides. ``C``, ``ΔW``, ``G`` and ``P``
have the ``p`` columns in common, live only inside a call, and are worked through in tiles of these
columns, of at most :data:`TRANSIENT_BYTES` each.

The frozen product is called as the plain layer calls it: ``F.linear`` with ``x`` in its own shape,
and a weight in the strides of ``W0``. Only so are its bits the plain layer's. What is returned is
no view, which could not be written in place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.operators import Operator
from randlora.planning import Plan
from randlora.products import addmm_, changed, in_place, mm, mm_wider

__all__ = ["TRANSIENT_BYTES", "EffectiveWeight", "Linear", "autocast_dtype"]

# The one knob for memory, to be set as it is here: no temporary matrix of the shape of the weight,
# of C or of P is larger. A layer of 14336 x 4096 in float32 is just within it. Beyond it the output
# of a layer is at injection what it was to rounding, not to the bit.
TRANSIENT_BYTES = 256 * 2**20


_PART_BYTES = 4 * 2**20  # of C formed at a time where it is added to a weight

# --- the pieces, on matrices ---------------------------------------------------------------------


def tile_width(rows: int, itemsize: int) -> int:
    """Columns of a tile of so many rows: as many as the knob allows, and no fewer than 128."""
    return max(128, TRANSIENT_BYTES // (rows * itemsize))


class _Update:
    """``ΔW``, by its factors: all that the products need of it, tile by tile of its p columns."""

    def __init__(
        self, lam: Tensor, gamma: Tensor, a: Tensor, b: Operator, scaling: float, wide: bool
    ) -> None:
        self.lam, self.gamma, self.a, self.b, self.wide = lam, gamma, a, b, wide
        self.scaling = scaling * b.scale
        self.wider = torch.promote_types(torch.promote_types(lam.dtype, a.dtype), torch.float32)

    @property
    def out_features(self) -> int:
        return self.a.shape[1] if self.wide else self.b.shape[0]

    def tiles(self) -> list[slice]:
        """Slices of the columns, in which nothing larger than the knob is made.

        Of equal widths, to one: a narrow last one would cost a pass over all tokens for little.
        """
        p = self.a.shape[1]
        count = -(-p // tile_width(max(self.b.shape), self.wider.itemsize))
        return [slice(p * i // count, p * (i + 1) // count) for i in range(count)]

    @property
    def dim(self) -> int:
        """The dimension of the weight that the ``p`` columns are."""
        return 0 if self.wide else 1

    # shape: -> (m, tile)
    def c(self, tile: slice) -> Tensor:
        """``scaling · C``, from the wider dtype rounded once to that of ``A``."""
        lam, gamma = self.scaling * self.lam.to(self.wider), self.gamma[:, tile].to(self.wider)
        c = lam.unsqueeze(2) @ gamma.unsqueeze(1)  # a product writes it faster than a broadcast
        return _times(c, self.a[:, tile]).flatten(0, 1).to(self.a.dtype)

    # shape: weight (out, in) -> (out, in)
    def whole(self, weight: Tensor | None) -> Tensor:
        """``W0 + ΔW``, by the strides of ``W0``, or ``ΔW``."""
        tiles = self.tiles()
        if weight is None or weight.dtype != self.a.dtype or not in_place():
            parts = [self.effective(weight, tile) for tile in tiles]
            total = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
            return total if weight is None else _laid_out(total, weight)
        return changed(weight.clone(), tiles, self.dim, self._plus)

    # shape: weight (out, in) -> (q, tile), (tile, q) if wide
    def effective(self, weight: Tensor | None, tile: slice) -> Tensor:
        """The columns (rows, if wide) of ``W0 + ΔW``, in the dtype of ``A``.

        In low precision the sum is rounded once, from the accumulator of the product. Where ``B``
        is applied by gathering or by factors, and under autocast, ``ΔW``, or what it is made of, is
        rounded before, which is as little against the rounding of the sum as ``ΔW`` is against
        ``W0``.
        """
        wide, dtype = self.wide, self.a.dtype
        base = None if weight is None else weight[tile] if wide else weight[:, tile]
        if base is None or base.dtype != dtype:  # autocast: W0 is of a wider dtype
            delta = self.b.mm(self.c(tile))
            delta = delta.T if wide else delta
            return delta if base is None else _laid_out((base + delta).to(dtype), base)
        if in_place():
            return self._plus(base.clone(), tile)
        return _laid_out(self._plus(base, tile), base)

    # shape: total and result (q, tile), (tile, q) if wide
    def _plus(self, total: Tensor, tile: slice) -> Tensor:
        """The columns (rows, if wide) ``total`` with those of ``ΔW`` added."""
        size = tile.stop - tile.start
        # In parts, so that C is not there as a whole beside it.
        width = max(128, _PART_BYTES // (self.b.shape[1] * self.a.dtype.itemsize))
        width = width if in_place() else size

        def plus(part: Tensor, at: slice) -> Tensor:
            c = self.c(slice(tile.start + at.start, tile.start + at.stop))
            return self.b.tokens_addmm_(part, c.T) if self.wide else self.b.addmm_(part, c)

        parts = [slice(lo, min(lo + width, size)) for lo in range(0, size, width)]
        return changed(total, parts, self.dim, plus)

    # shape: g (q, tile) -> (m, tile)
    def p(self, g: Tensor) -> Tensor:
        """``P / scaling`` from ``G``, which in float16 is brought near one for the product."""
        if self.a.dtype != torch.float16:
            return self.b.tmm(g)
        largest = torch.linalg.vector_norm(g.detach().float(), torch.inf)
        largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
        power: Tensor = largest / torch.frexp(largest).mantissa  # of two, or NaN
        return self.b.tmm((g.float() / power).to(torch.float16)).float() * power

    # shape: p_tile (m, tile) -> (n, r), (n, tile)
    def parameter_grads(
        self, p_tile: Tensor, tile: slice, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The share of a tile in ``dΛ``, and its ``dΓ``, from ``P / scaling``, which is used up."""
        pa = _times(p_tile.reshape(*self.lam.shape, -1).to(self.wider), self.a[:, tile])
        d_lam = d_gamma = None
        if needs[0]:
            gamma = self.scaling * self.gamma[:, tile].to(self.wider)
            d_lam = (gamma.unsqueeze(1) @ pa.transpose(1, 2)).squeeze(1)
        if needs[1]:
            d_gamma = ((self.scaling * self.lam.to(self.wider)).unsqueeze(1) @ pa).squeeze(1)
        return d_lam, d_gamma


def _times(product: Tensor, other: Tensor) -> Tensor:
    return product.mul_(other) if in_place() else product * other


def _laid_out(matrix: Tensor, like: Tensor) -> Tensor:
    """By columns where the other matrix is: products choose their way by it, to the bit."""
    if not like.is_contiguous() and like.T.is_contiguous():
        return matrix.T.contiguous().T
    return matrix


def _mark(like: Tensor, token: int) -> Tensor | None:
    """No bytes, in a shape that says what was computed with: recomputation has to save the same.

    There is someone to compare only where hooks get what is saved.
    """
    if not token or torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else like.new_empty((0, token))


def _owned(result: Tensor) -> Tensor:
    """The result of an autograd function as no view: a view from there forbids writing in place.

    Where a trace runs the function as plain operations it may be one.
    """
    if torch.is_grad_enabled():
        return result
    view = torch.compiler.is_compiling() or result._is_view()  # the compiler cannot say
    return result.detach() if view else result


def _summed(
    update: _Update, shares: list[tuple[Tensor | None, Tensor | None]]
) -> tuple[Tensor | None, Tensor | None]:
    """``dΛ`` and ``dΓ`` of all tiles."""
    lams = [d_lam for d_lam, _ in shares if d_lam is not None]
    gammas = [d_gamma for _, d_gamma in shares if d_gamma is not None]
    d_lam = torch.stack(lams).sum(0) if len(lams) > 1 else lams[0] if lams else None
    d_gamma = torch.cat(gammas, 1) if len(gammas) > 1 else gammas[0] if gammas else None
    return (
        None if d_lam is None else d_lam.to(update.lam.dtype),
        None if d_gamma is None else d_gamma.to(update.gamma.dtype),
    )


# --- dtypes --------------------------------------------------------------------------------------


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


# --- the autograd functions ----------------------------------------------------------------------


class EffectiveWeight(torch.autograd.Function):
    """``W0, Λ, Γ -> W0 + ΔW``, or ``ΔW`` without ``W0``, keeping only ``Λ`` and ``Γ``."""

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
            return _owned(_Update(lam, gamma, a, b, scaling, wide).whole(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, lam, gamma, ctx.a, ctx.b, ctx.scaling, ctx.wide, token = inputs
        ctx.save_for_backward(lam, gamma, _mark(lam, token))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dw,) = grads
        lam, gamma, _ = ctx.saved_tensors
        needs_weight, needs_lam, needs_gamma, *_ = ctx.needs_input_grad
        d_lam = d_gamma = None
        with _autocast_off(dw.device):
            if needs_lam or needs_gamma:
                update = _Update(lam, gamma, ctx.a, ctx.b, ctx.scaling, ctx.wide)
                g = dw.T if ctx.wide else dw
                d_lam, d_gamma = _summed(
                    update,
                    [
                        update.parameter_grads(update.p(g[:, t]), t, (needs_lam, needs_gamma))
                        for t in update.tiles()
                    ],
                )
        return (dw if needs_weight else None, d_lam, d_gamma, None, None, None, None, None)


class Linear(torch.autograd.Function):
    """``x, W0, bias, Λ, Γ -> y``, and as the plan says ``x B`` and ``W0 + ΔW``, to be kept.

    What is kept is an output, so that backward, made of differentiable operations, can be
    differentiated in turn. Only what the gradients asked for need is kept and computed.
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
            update = _Update(lam, gamma, a, b, scaling, wide)
            bias = bias if bias is None else bias.to(x.dtype)
            kept: list[Tensor] = []
            by_tokens = plan.forward == "activations"
            if wide and (by_tokens or plan.keeps == "xb"):
                xb = b.tokens_mm(_rows(x))
                kept = [xb] if plan.keeps == "xb" else []
            if by_tokens:
                y = _frozen(x, weight, bias, update.out_features)
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
        # Those of what was kept come from second derivatives alone.
        dy, *of_kept = grads
        dxb = of_kept.pop(0) if plan.keeps == "xb" else None
        dw = of_kept.pop(0) if plan.keep_weight else None
        if dy is None:
            dy = ctx.a.new_zeros(*ctx.shape[:-1], ctx.a.shape[1] if wide else b.shape[0])

        dx: Any = None
        d_weight: Any = None
        d_bias = d_lam = d_gamma = None
        with _autocast_off(dy.device):
            update = _Update(lam, gamma, ctx.a, b, ctx.scaling, wide)
            rows = _rows(dy)  # (T, out)
            x = x if x is None else _rows(x)  # (T, in)
            by_tokens = plan.grad_parameters == "activations" and any(needs)
            shared = by_tokens or (needs_x and plan.grad_input == "activations")
            dyb: Any = b.tokens_mm(rows) if shared and not wide else None  # (T, m)
            if needs_bias:
                d_bias = rows.sum(0)
            if needs_weight:
                d_weight = mm(rows.T, x) if dw is None else torch.addmm(dw, rows.T, x)
            if any(needs):
                if by_tokens and wide and xb is None:
                    xb = b.tokens_mm(x)
                left = (xb if wide else dyb) if by_tokens else None
                d_lam, d_gamma = _parameter_grads(update, needs, rows, x, left, d_weight, dw)
                del left
            if plan.grad_input == "weight":
                dyb = None
            # Last, so that nothing but what it takes is there beside it.
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


# shape: rows (T, out), x (T, in), left (T, m), d_weight and dw (out, in) -> (n, r), (n, p)
def _parameter_grads(
    update: _Update,
    needs: tuple[bool, bool],
    rows: Tensor,
    x: Any,
    left: Tensor | None,
    d_weight: Tensor | None,
    dw: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``dΛ`` and ``dΓ``: from ``left``, which is ``x B`` or ``dy B``, else through the weight.

    ``d_weight`` is ``dyᵀ x + dw`` where it was formed for the weight's own sake.
    """
    wide = update.wide
    shares = []
    for tile in update.tiles():
        if left is not None:
            p = mm_wider(left.T, (rows if wide else x)[:, tile])  # (m, tile)
        elif d_weight is not None:
            p = update.p(d_weight[tile].T if wide else d_weight[:, tile])
        else:
            p = update.p(mm_wider(*((x.T, rows[:, tile]) if wide else (rows.T, x[:, tile]))))
        if dw is not None and (left is not None or d_weight is None):
            p = p + update.p(dw[tile].T if wide else dw[:, tile])
        shares.append(update.parameter_grads(p, tile, needs))
    return _summed(update, shares)


# shape: x (..., k) -> (T, k)
def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# shape: x (..., in), weight (out, in) -> (..., out)
def _frozen(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: int) -> Tensor:
    """``x W0ᵀ + bias``, and zeros without ``W0``."""
    if weight is None:
        return x.new_zeros(*x.shape[:-1], out)
    return F.linear(x, weight.to(x.dtype), bias)


# shape: weight (out, in), x (..., in) -> (..., out)
def _by_weight(update: _Update, weight: Tensor | None, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x (W0 + ΔW)ᵀ + bias``."""
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
def _by_weight_back(update: _Update, weight: Tensor | None, rows: Tensor) -> Tensor:
    """``dy (W0 + ΔW)``."""
    if not update.wide:
        parts = [mm(rows, update.effective(weight, tile)) for tile in update.tiles()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    first, *rest = update.tiles()
    dx = mm(rows[:, first], update.effective(weight, first))
    for tile in rest:
        dx = addmm_(dx, rows[:, tile], update.effective(weight, tile))
    return dx


# shape: total (T, p), left (T, m) -> (T, p)
def _add_through(update: _Update, total: Tensor, left: Tensor) -> Tensor:
    """``total += left C``: after ``x B`` in a wide layer, after ``dy B`` in a tall one."""
    return changed(total, update.tiles(), 1, lambda part, tile: addmm_(part, left, update.c(tile)))


# shape: total (T, q), rows (T, p) -> (T, q)
def _add_back(update: _Update, total: Tensor, rows: Tensor) -> Tensor:
    """``total += rows Cᵀ Bᵀ``: forward in a tall layer, the gradient of the input in a wide one."""
    first, *rest = update.tiles()
    if update.b.by_columns:
        inner = mm(update.c(first), rows[:, first].T).T  # (T, m)
    else:
        inner = mm(rows[:, first], update.c(first).T)
    for tile in rest:
        inner = addmm_(inner, rows[:, tile], update.c(tile).T)
    return update.b.tokens_addmm_(total, inner)
