"""How the kernel meets ``B``: by its products alone, and by what they cost.

An operator is the *unit* base, ``B / scale``: signs stay exact in every dtype, and the kernel puts
``scale`` where it costs nothing. In float16 it is so large that the unit base has columns and rows
of lengths near one: what it is applied to stays near its size. A new kind of basis, cheaper to
apply, is one more class here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.isometry import work
from randlora.products import addmm_, baddbmm_, bmm, changed, in_place, mm, onednn

__all__ = [
    "DenseOperator",
    "GatherOperator",
    "KroneckerOperator",
    "Operator",
    "SignOperator",
    "tensors_of",
]

_SLICE = 256  # rows or columns of signs cast at a time
_TILE = 128  # columns gathered at a time: a table of 3,000 rows stays in a cache of 1.5 MB


class Operator(Protocol):
    """``B / scale``, shape ``(q, m)``, by five products.

    The first three are for matrices with the columns of the weight, the last two for tokens, whose
    ``(k, m)`` side is given, and best taken, by columns where ``by_columns``. Results are in the
    dtype of the argument. What adds uses up the matrix added to, as :mod:`randlora.products` does,
    and dense products round once in low precision.
    """

    scale: float
    by_columns: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(q, m)``."""
        ...

    @property
    def weight_cost(self) -> int:
        """What a product with a matrix like the weight takes, in thousandths of a dense one."""
        ...

    @property
    def token_cost(self) -> int:
        """What a product with tokens takes, in the same unit."""
        ...

    def mm(self, c: Tensor) -> Tensor:
        """``B c``: ``(m, k)`` to ``(q, k)``."""
        ...

    def tmm(self, g: Tensor) -> Tensor:
        """``Bᵀ g``: ``(q, k)`` to ``(m, k)``."""
        ...

    def addmm_(self, total: Tensor, c: Tensor) -> Tensor:
        """``total + B c``: ``(q, k)`` and ``(m, k)`` to ``(q, k)``."""
        ...

    def tokens_mm(self, x: Tensor) -> Tensor:
        """``x B``: ``(k, q)`` to ``(k, m)``."""
        ...

    def tokens_addmm_(self, total: Tensor, h: Tensor) -> Tensor:
        """``total + h Bᵀ``: ``(k, q)`` and ``(k, m)`` to ``(k, q)``."""
        ...

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        """The rows of ``B`` at ``places``, ``(k,)``, as a base of their own, ``(k, m)``."""
        ...


class _Stored:
    """A matrix that is held entry by entry, and multiplied as such."""

    weight_cost = token_cost = 1000
    by_columns = False

    def __init__(self, entries: Tensor, scale: float = 1.0, unit: float | None = None) -> None:
        self.entries = entries
        self.scale = scale
        self.unit = unit  # a power of two that the entries are taken times, or None for 1

    @property
    def shape(self) -> tuple[int, int]:
        """``(q, m)``."""
        q, m = self.entries.shape
        return q, m

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return self.entries.untyped_storage().nbytes()

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        """See :class:`Operator`."""
        return DenseOperator(self.entries[places].to(dtype), self.scale, self.unit)


class DenseOperator(_Stored):
    """A ``B`` stored in the dtype it is applied in."""

    def mm(self, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return mm(self.entries, c, self.unit)

    def tmm(self, g: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return mm(self.entries.T, g, self.unit)

    def addmm_(self, total: Tensor, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return addmm_(total, self.entries, c, self.unit)

    def tokens_mm(self, x: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return mm(x, self.entries, self.unit)

    def tokens_addmm_(self, total: Tensor, h: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return addmm_(total, h, self.entries.T, self.unit)


class SignOperator(_Stored):
    """A ``B`` stored as int8 signs, cast a slice of the result at a time.

    The casts are a share of about ``1 / k`` of the products with ``k`` columns.
    """

    def mm(self, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return torch.cat([mm(signs, c, self.unit) for signs in self._cast(0, c.dtype)])

    def tmm(self, g: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return torch.cat([mm(signs.T, g, self.unit) for signs in self._cast(1, g.dtype)])

    def addmm_(self, total: Tensor, c: Tensor) -> Tensor:
        """See :class:`Operator`."""

        def plus(part: Tensor, rows: slice) -> Tensor:
            return addmm_(part, self.entries[rows].to(c.dtype), c, self.unit)

        return changed(total, self._slices(), 0, plus)

    def tokens_mm(self, x: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return torch.cat([mm(x, signs, self.unit) for signs in self._cast(1, x.dtype)], 1)

    def tokens_addmm_(self, total: Tensor, h: Tensor) -> Tensor:
        """See :class:`Operator`."""

        def plus(part: Tensor, rows: slice) -> Tensor:
            return addmm_(part, h, self.entries[rows].to(h.dtype).T, self.unit)

        return changed(total, self._slices(), 1, plus)

    def _slices(self) -> list[slice]:
        return [slice(lo, lo + _SLICE) for lo in range(0, len(self.entries), _SLICE)]

    def _cast(self, dim: int, dtype: torch.dtype) -> Iterator[Tensor]:
        return (signs.to(dtype) for signs in torch.split(self.entries, _SLICE, dim))


class _Bags(NamedTuple):
    """The non-zeros of each row, or column: where they are, where each bag starts, their signs."""

    places: Tensor
    offsets: Tensor
    signs: Tensor


def gather_costs(density: float, m: int, dtype: torch.dtype) -> tuple[int, int]:
    """``weight_cost`` and ``token_cost`` of gathering: the table of :class:`GatherOperator`."""
    faster = 2 if onednn(dtype, torch.device("cpu")) else 1  # the dense products compared with
    weight_cost = int((2200 if dtype.itemsize >= 4 else 5500) * density) * faster
    return weight_cost, weight_cost + 70_000 * faster // m


class GatherOperator:
    """A very sparse ternary ``B``, applied by gathering and adding rows: no product is computed.

    It is stored by its non-zeros, once by rows and once by columns. Rows are gathered from tiles of
    columns that stay in the cache. Measured on two cores against the dense product, in thousandths,
    at density ``d`` and ``m`` columns (``benchmarks/README.md``):

        float32    2200 d with a matrix of the weight's shape, and 70,000 / m more with tokens,
        bfloat16   5500 d                                       which have to be transposed;

    and twice that where float32 products go to oneDNN (:mod:`randlora.products`).

    In low precision ``B c`` is rounded before it is added. ``unit``, a power of two, is the
    magnitude of the non-zeros.
    """

    by_columns = True

    def __init__(
        self, signs: Tensor, scale: float, dtype: torch.dtype, unit: float | None = None
    ) -> None:
        self.shape = (signs.shape[0], signs.shape[1])
        self.scale = scale
        rows, columns = signs.nonzero(as_tuple=True)
        values = signs[rows, columns].to(dtype) * (1 if unit is None else unit)
        by_column = torch.argsort(columns, stable=True)
        self.by_row = _bags(rows, columns, values, signs.shape[0])
        self.by_column = _bags(
            columns[by_column], rows[by_column], values[by_column], signs.shape[1]
        )
        self.weight_cost, self.token_cost = gather_costs(
            len(rows) / signs.numel(), signs.shape[1], dtype
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the non-zeros."""
        return sum(t.untyped_storage().nbytes() for t in (*self.by_row, *self.by_column))

    def mm(self, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return _in_tiles(c, lambda tile: _gather(self.by_row, c[:, tile]))

    def tmm(self, g: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return _in_tiles(g, lambda tile: _gather(self.by_column, g[:, tile]))

    def addmm_(self, total: Tensor, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        if not in_place():
            return total + self.mm(c)
        for tile in _tiles(c.shape[1]):
            total[:, tile].add_(_gather(self.by_row, c[:, tile]))
        return total

    def tokens_mm(self, x: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return self.tmm(x.T).T

    def tokens_addmm_(self, total: Tensor, h: Tensor) -> Tensor:
        """See :class:`Operator`."""
        if not in_place():
            return total + self.mm(h.T).T
        for tile in _tiles(len(h)):
            total[tile].add_(_gather(self.by_row, h[tile].T).T)
        return total

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        """See :class:`Operator`."""
        columns, offsets, signs = self.by_row
        starts, ends = offsets[places].long(), offsets[places + 1].long()
        counts = ends - starts
        row = torch.repeat_interleave(counts)
        within = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        taken = starts[row] + within
        entries = signs.new_zeros(len(places), self.shape[1])
        entries[row, columns[taken].long()] = signs[taken]
        return DenseOperator(entries.to(dtype), self.scale)


class KroneckerOperator:
    """``(R1 ⊗ R2)[:q, :m]``, applied by its factors, ``(q1, m1)`` and ``(q2, m2)``, in turn.

    That takes ``1 / m1 + 1 / q2`` of the multiply-adds of the dense product, and somewhat more
    where rows or columns are cut: with a matrix like the
    weight ``R1`` as one product and ``R2`` as one for each of its ``q1`` blocks, with tokens ``R2``
    as one product and ``R1`` as one for each token, without a transposing copy of what is by rows.
    Products this small run at a lower rate, hence the costs (:func:`randlora.isometry.work`). In
    low precision what lies between the factors is rounded.
    """

    by_columns = False

    def __init__(self, left: Tensor, right: Tensor, shape: tuple[int, int]) -> None:
        self.left, self.right, self.shape = left, right, shape
        (q1, m1), (q2, m2) = left.shape, right.shape
        self.scale = math.sqrt(q1 * q2)
        # The dense products compared with are twice as fast by oneDNN, which takes few this small.
        faster = 2 if onednn(left.dtype, left.device) else 1
        self.weight_cost, self.token_cost = (
            100 * faster * tenths // math.prod(shape) for tenths in work(*shape, (q1, m1), (q2, m2))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.left.untyped_storage().nbytes() + self.right.untyped_storage().nbytes()

    def mm(self, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        q1, q2 = len(self.left), len(self.right)
        return bmm(self.right, self._left_first(c)).view(q1 * q2, -1)[: self.shape[0]]

    def tmm(self, g: Tensor) -> Tensor:
        """See :class:`Operator`."""
        (q1, m1), (q2, m2), k = self.left.shape, self.right.shape, g.shape[1]
        blocks = _padded(g, q1 * q2, 0).view(q1, q2, k)
        blocks = bmm(self.right.T, blocks)
        return mm(self.left.T, blocks.view(q1, m2 * k)).view(m1 * m2, k)[: self.shape[1]]

    def addmm_(self, total: Tensor, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        q1, q2 = len(self.left), len(self.right)
        if total.shape[0] == q1 * q2 and total.is_contiguous():
            added = baddbmm_(total.view(q1, q2, -1), self.right, self._left_first(c))
            return added.view(total.shape)
        return _added(total, self.mm(c))

    def tokens_mm(self, x: Tensor) -> Tensor:
        """See :class:`Operator`."""
        (q1, m1), (q2, m2), k = self.left.shape, self.right.shape, len(x)
        blocks = mm(_padded(x, q1 * q2, 1).view(k * q1, q2), self.right).view(k, q1, m2)
        return bmm(self.left.T, blocks).view(k, m1 * m2)[:, : self.shape[1]]

    def tokens_addmm_(self, total: Tensor, h: Tensor) -> Tensor:
        """See :class:`Operator`."""
        (q1, m1), (q2, m2), k = self.left.shape, self.right.shape, len(h)
        blocks = bmm(self.left, _padded(h, m1 * m2, 1).view(k, m1, m2))
        blocks = blocks.view(k * q1, m2)
        if total.shape[1] == q1 * q2 and total.is_contiguous():
            return addmm_(total.view(k * q1, q2), blocks, self.right.T).view(total.shape)
        return _added(total, mm(blocks, self.right.T).view(k, q1 * q2)[:, : self.shape[0]])

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        """See :class:`Operator`."""
        q2 = len(self.right)
        left, right = self.left[places // q2], self.right[places % q2]
        entries = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)[:, : self.shape[1]]
        return DenseOperator(entries.to(dtype).contiguous(), self.scale)

    # shape: (m, k) -> (q1, m2, k)
    def _left_first(self, c: Tensor) -> Tensor:
        (q1, m1), (_, m2), k = self.left.shape, self.right.shape, c.shape[1]
        return mm(self.left, _padded(c, m1 * m2, 0).view(m1, m2 * k)).view(q1, m2, k)


def tensors_of(operator: Operator) -> Iterator[Tensor]:
    """The tensors that an operator holds."""
    for value in vars(operator).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, _Bags):
            yield from value


def _added(total: Tensor, product: Tensor) -> Tensor:
    return total.add_(product) if in_place() else total + product


def _padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    """The matrix, with zeros up to ``size`` rows or columns, by rows."""
    lacking = size - matrix.shape[dim]
    if lacking:
        return F.pad(matrix, (0, 0, 0, lacking) if dim == 0 else (0, lacking))
    return matrix.contiguous()


def _bags(rows: Tensor, columns: Tensor, values: Tensor, count: int) -> _Bags:
    offsets = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    offsets[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return _Bags(columns.int(), offsets, values)


def _tiles(columns: int) -> list[slice]:
    return [slice(lo, lo + _TILE) for lo in range(0, max(columns, 1), _TILE)]


def _in_tiles(table: Tensor, fill: Callable[[slice], Tensor]) -> Tensor:
    if not in_place():
        return fill(slice(None))  # into parts of a matrix it would write; nor is there a cache
    tiles = _tiles(table.shape[1])
    first = fill(tiles[0])
    if len(tiles) == 1:
        return first
    total = table.new_empty(len(first), table.shape[1])
    total[:, tiles[0]] = first
    for tile in tiles[1:]:
        total[:, tile] = fill(tile)
    return total


def _gather(bags: _Bags, table: Tensor) -> Tensor:
    """Row ``i`` is the signed sum of the rows of the table in bag ``i``."""
    if not torch.compiler.is_compiling() and not table.numel():
        return table.new_zeros(len(bags.offsets) - 1, table.shape[1])
    return F.embedding_bag(
        bags.places,
        table.contiguous(),
        bags.offsets,
        mode="sum",
        per_sample_weights=bags.signs,
        include_last_offset=True,
    )
