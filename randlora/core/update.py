"""``FactoredUpdate``: ``ΔW`` computed in tiles from its factors ``A``, ``B``, ``Λ`` and ``Γ``.

``C``, ``G``, ``P`` and ``ΔW`` have ``p`` columns (``ΔW`` has ``p`` rows if wide). A tile is a slice
of these columns, so narrow that no temporary matrix takes more than
:data:`randlora.core.machine.TRANSIENT_BYTES`. Shapes and equations are in
:mod:`randlora.core.kernel`.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from randlora.core import machine
from randlora.core.matmul import apply_to_parts, cast, in_place, is_static, transforming
from randlora.core.operators import Operator
from randlora.core.passes import coefficient_grads, coefficients
from randlora.core.planning import few

Needs: TypeAlias = tuple[bool, bool, bool]  # which gradients are needed: of Λ, Γ and A
Grads: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]


def tile_width(rows: int, itemsize: int) -> int:
    """The number of columns of a tile: as many as the limit allows, at least 128."""
    return max(128, machine.TRANSIENT_BYTES // (rows * itemsize))


# shape: x (..., k), a (r, p)
def is_few(x: Tensor, a: Tensor, n: int, times: int = 2) -> bool:
    """Whether products of these tokens are computed without ``C`` or ``P``.

    In a graph, not if it is for any number of tokens. Else only where :func:`in_place` allows it.
    """
    tokens = x.numel() // x.shape[-1]
    if torch.compiler.is_compiling():
        allowed = is_static(tokens) and not transforming()
    else:
        allowed = in_place()
    return allowed and few(tokens, n, times) and 8 * tokens * a.numel() <= machine.TRANSIENT_BYTES


class FactoredUpdate:
    """Computes, tile by tile, what products with ``ΔW`` and its gradients need.

    ``dtype`` is that of the products, by default the one of ``A``. A trained ``A`` has a dtype of
    its own, as ``Λ`` and ``Γ`` have, and so has its gradient.
    """

    def __init__(
        self,
        lam: Tensor,
        gamma: Tensor,
        a: Tensor,
        b: Operator,
        scaling: float,
        wide: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.lam, self.gamma, self.a, self.b, self.wide = lam, gamma, a, b, wide
        self.scaling = scaling * b.scale
        self.dtype = a.dtype if dtype is None else dtype
        double = torch.float64 in (lam.dtype, a.dtype, self.dtype)
        self.wider = torch.float64 if double else torch.float32
        self.dim = 0 if wide else 1  # the dimension of the weight that has size p
        self.machine = machine.machine_of(lam.device)
        self.eager = in_place()

    @property
    def out_features(self) -> int:
        """``out``."""
        return self.a.shape[1] if self.wide else self.b.shape[0]

    def tiles(self) -> list[slice]:
        """Slices of the ``p`` columns, whose widths differ by at most 1.

        A narrow last tile would take a pass over all tokens for only a few columns.
        """
        p = self.a.shape[1]
        count = -(-p // tile_width(max(self.b.shape), self.wider.itemsize))
        return [slice(p * i // count, p * (i + 1) // count) for i in range(count)]

    # shape: -> (m, tile)
    def c(self, tile: slice, by_columns: bool = False) -> Tensor:
        """``scaling · C``, computed in the wider dtype and rounded once to that of products.

        An accelerator can store it by columns; a CPU stores it by rows.
        """
        lam, gamma, a = self._factors(tile)
        if self.machine.balance:
            return coefficients(lam, gamma, a, self.dtype, by_columns)
        return self._times(self._outer(lam, gamma), a).flatten(0, 1).to(self.dtype)

    # shape: -> (n, r), (n, tile), (r, tile)
    def _factors(self, tile: slice) -> tuple[Tensor, Tensor, Tensor]:
        """``scaling · Λ`` and ``Γ`` in the wider dtype, and ``A``."""
        lam, gamma = cast(self.lam, self.wider), cast(self.gamma, self.wider)
        return self.scaling * lam, columns(gamma, tile), columns(self.a, tile)

    # shape: -> (n, r), (n, p), (r, p)
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``Λ``, ``Γ`` and ``scaling · A`` in the wider dtype."""
        lam, gamma, a = (cast(t, self.wider) for t in (self.lam, self.gamma, self.a))
        return lam, gamma, self.scaling * a

    # shape: lam (n, r), gamma (n, tile) -> (n, r, tile)
    def _outer(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """``Λ[j,k] Γ[j,c]``. An accelerator could round a matrix product to TF32."""
        lam, gamma = lam.unsqueeze(2), gamma.unsqueeze(1)
        return lam * gamma if self.machine.balance else lam @ gamma  # on a CPU this is faster

    def _times(self, product: Tensor, other: Tensor) -> Tensor:
        """``product * other``, in place if that is allowed.

        The second derivative by ``other`` needs the product as it was before.
        """
        recorded = torch.is_grad_enabled() and other.requires_grad
        return product.mul_(other) if self.eager and not recorded else product * other

    # shape: weight (out, in) -> (out, in)
    def whole(self, weight: Tensor | None) -> Tensor:
        """``W0 + ΔW``, with the strides of ``W0``, or ``ΔW`` if ``weight`` is None."""
        tiles = self.tiles()
        if weight is None or weight.dtype != self.dtype or not self._adds_in_place():
            parts = [self.effective(weight, tile) for tile in tiles]
            total = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
            return total if weight is None else _laid_out(total, weight)
        return apply_to_parts(weight.clone(), tiles, self.dim, self._plus)

    # shape: weight (out, in) -> (q, tile), (tile, q) if wide
    def effective(self, weight: Tensor | None, tile: slice) -> Tensor:
        """The columns (rows, if wide) of ``W0 + ΔW`` in one tile, in the dtype of products.

        In low precision the sum is rounded once, from the accumulator of the product. There are two
        exceptions, in which ``ΔW`` or an intermediate result is rounded first: if ``B`` is applied
        by gathering or by factors, and under autocast. Relative to the rounding of the sum, this
        rounding is as small as ``ΔW`` relative to ``W0``.
        """
        wide, dtype = self.wide, self.dtype
        base = None if weight is None else weight[tile] if wide else weight[:, tile]
        if base is None or base.dtype != dtype:  # under autocast W0 has a wider dtype
            delta = self._delta(tile)
            return delta if base is None else _laid_out((base + delta).to(dtype), base)
        if self._adds_in_place():
            return self._plus(base.clone(), tile)
        return _laid_out(self._plus(base, tile), base)

    def _adds_in_place(self) -> bool:
        """Whether the update is added to a copy of the weight, in parts, or else to the weight."""
        return self.eager and bool(self.machine.part_bytes)

    # shape: -> (q, tile), (tile, q) if wide
    def _delta(self, tile: slice) -> Tensor:
        delta = self.b.mm(self.c(tile))
        return delta.T if self.wide else delta

    # shape: total and result (q, tile), (tile, q) if wide
    def _plus(self, total: Tensor, tile: slice) -> Tensor:
        """Add these columns (rows, if wide) of ``ΔW`` to ``total``, in place if that is allowed.

        A machine that does not add in parts leaves ``total`` as it is.
        """
        if not self.machine.part_bytes:
            if self.wide:
                return self.b.tokens_addmm_(total, self.c(tile, by_columns=True).T, keep=True)
            return self.b.addmm_(total, self.c(tile), keep=True)
        width = size = tile.stop - tile.start
        if self.eager:  # in parts, so that C is never in memory as a whole
            width = max(128, self.machine.part_bytes // (self.b.shape[1] * self.dtype.itemsize))

        def plus(part: Tensor, at: slice) -> Tensor:
            c = self.c(slice(tile.start + at.start, tile.start + at.stop))
            return self.b.tokens_addmm_(part, c.T) if self.wide else self.b.addmm_(part, c)

        parts = [slice(lo, min(lo + width, size)) for lo in range(0, size, width)]
        return apply_to_parts(total, parts, self.dim, plus)

    # shape: g (q, tile) -> (m, tile)
    def p_matrix(self, g: Tensor) -> Tensor:
        """``P / scaling``, from ``G``.

        In float16, ``G`` is first divided by a power of two that brings its largest entry near one.
        """
        if self.dtype != torch.float16:
            return self.b.tmm(g)
        largest = torch.linalg.vector_norm(g.detach().float(), torch.inf)
        largest = largest.clamp_min(torch.finfo(torch.float32).tiny)
        power: Tensor = largest / torch.frexp(largest).mantissa  # a power of two, or NaN
        return self.b.tmm((g.float() / power).to(torch.float16)).float() * power

    # shape: p_tile (m, tile) -> (n, r), (n, tile), (r, tile)
    def parameter_grads(self, p_tile: Tensor, tile: slice, needs: Needs) -> Grads:
        """The tile's share of ``dΛ``, columns of ``dΓ`` and ``dA``. May overwrite ``p_tile``."""
        lam, gamma, a = self._factors(tile)
        d_lam = d_gamma = d_a = None
        if self.machine.balance and (needs[0] or needs[1]):
            d_lam, d_gamma = coefficient_grads(p_tile, lam, gamma, a)
            d_lam = self.scaling * d_lam if needs[0] else None
            d_gamma, needs = d_gamma if needs[1] else None, (False, False, needs[2])
        if not any(needs):
            return d_lam, d_gamma, d_a
        by_base = p_tile.reshape(*self.lam.shape, -1).to(self.wider)  # (n, r, tile)
        if needs[2]:
            d_a = self._times(self._outer(lam, gamma), by_base).sum(0)
        if needs[0] or needs[1]:
            by_base = self._times(by_base, a)
        if needs[0]:
            d_lam = ((self.scaling * gamma).unsqueeze(1) @ by_base.transpose(1, 2)).squeeze(1)
        if needs[1]:
            d_gamma = (lam.unsqueeze(1) @ by_base).squeeze(1)
        return d_lam, d_gamma, d_a


# shape: matrix (i, p) -> (i, tile)
def columns(matrix: Tensor, tile: slice) -> Tensor:
    """The columns of one tile; the matrix itself if these are all."""
    return matrix if tile.stop - tile.start == matrix.shape[1] else matrix[:, tile]


def _laid_out(matrix: Tensor, like: Tensor) -> Tensor:
    """``matrix``, stored by columns if ``like`` is.

    Strides decide which kernel computes a product, and so the last bits of its result.
    """
    if not like.is_contiguous() and like.T.is_contiguous():
        return matrix.T.contiguous().T
    return matrix
