"""How the kernel meets ``B``: by its products alone, and by what they cost.

An operator is the *unit* base, ``B / scale``: signs stay exact in every dtype, and the kernel puts
``scale`` where it costs nothing. A new kind of basis, cheaper to apply, is one more class here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.products import addmm_, mm, onednn

__all__ = ["DenseOperator", "GatherOperator", "Operator", "SignOperator"]

_SLICE = 256  # rows or columns of signs cast at a time
_TILE = 128  # columns gathered at a time: a table of 3,000 rows stays in a cache of 1.5 MB


class Operator(Protocol):
    """``B / scale``, shape ``(q, m)``, by five products.

    The first two take matrices with the columns of the weight; those with a ``_t`` take or change
    them transposed, by rows, as the tokens are. Results are laid out by rows, in the dtype of the
    argument; dense ones that add, in place, round once in low precision.
    """

    scale: float

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

    def addmm_(self, total: Tensor, c: Tensor) -> None:
        """``total += B c``: ``(q, k)`` and ``(m, k)``."""
        ...

    def tmm_t(self, x: Tensor) -> Tensor:
        """``Bᵀ xᵀ``: ``(k, q)`` to ``(m, k)``."""
        ...

    def addmm_t_(self, total: Tensor, c: Tensor) -> None:
        """``total += (B c)ᵀ``: ``(k, q)`` and ``(m, k)``."""
        ...


class _Stored:
    """A matrix that is held entry by entry, and multiplied as such."""

    weight_cost = token_cost = 1000

    def __init__(self, entries: Tensor, scale: float = 1.0) -> None:
        self.entries = entries
        self.scale = scale

    @property
    def shape(self) -> tuple[int, int]:
        """``(q, m)``."""
        q, m = self.entries.shape
        return q, m


class DenseOperator(_Stored):
    """A ``B`` stored in the dtype it is applied in."""

    def mm(self, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return mm(self.entries, c)

    def tmm(self, g: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return mm(self.entries.T, g)

    def addmm_(self, total: Tensor, c: Tensor) -> None:
        """See :class:`Operator`."""
        addmm_(total, self.entries, c)

    def tmm_t(self, x: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return mm(self.entries.T, x.T)

    def addmm_t_(self, total: Tensor, c: Tensor) -> None:
        """See :class:`Operator`."""
        addmm_(total, c.T, self.entries.T)


class SignOperator(_Stored):
    """A ``B`` stored as int8 signs, cast a slice of the result at a time.

    The casts are a share of about ``1 / k`` of the products with ``k`` columns.
    """

    def mm(self, c: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return torch.cat([mm(signs, c) for signs in self._cast(0, c.dtype)])

    def tmm(self, g: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return torch.cat([mm(signs.T, g) for signs in self._cast(1, g.dtype)])

    def addmm_(self, total: Tensor, c: Tensor) -> None:
        """See :class:`Operator`."""
        for lo, signs in enumerate(self._cast(0, c.dtype)):
            addmm_(total[lo * _SLICE : (lo + 1) * _SLICE], signs, c)

    def tmm_t(self, x: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return self.tmm(x.T)

    def addmm_t_(self, total: Tensor, c: Tensor) -> None:
        """See :class:`Operator`."""
        for lo, signs in enumerate(self._cast(0, c.dtype)):
            addmm_(total[:, lo * _SLICE : (lo + 1) * _SLICE], c.T, signs.T)

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

    In low precision ``B c`` is rounded before it is added.
    """

    def __init__(self, signs: Tensor, scale: float, dtype: torch.dtype) -> None:
        self.shape = (signs.shape[0], signs.shape[1])
        self.scale = scale
        rows, columns = signs.nonzero(as_tuple=True)
        values = signs[rows, columns].to(dtype)
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

    def addmm_(self, total: Tensor, c: Tensor) -> None:
        """See :class:`Operator`."""
        for tile in _tiles(c.shape[1]):
            total[:, tile] += _gather(self.by_row, c[:, tile])

    def tmm_t(self, x: Tensor) -> Tensor:
        """See :class:`Operator`."""
        return self.tmm(x.T)

    def addmm_t_(self, total: Tensor, c: Tensor) -> None:
        """See :class:`Operator`."""
        for tile in _tiles(c.shape[1]):
            total[tile] += _gather(self.by_row, c[:, tile]).T


def _bags(rows: Tensor, columns: Tensor, values: Tensor, count: int) -> _Bags:
    offsets = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    offsets[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return _Bags(columns.int(), offsets, values)


def _tiles(columns: int) -> list[slice]:
    return [slice(lo, lo + _TILE) for lo in range(0, max(columns, 1), _TILE)]


def _in_tiles(table: Tensor, fill: Callable[[slice], Tensor]) -> Tensor:
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
    if not table.numel():
        return table.new_zeros(len(bags.offsets) - 1, table.shape[1])
    return F.embedding_bag(
        bags.places,
        table.contiguous(),
        bags.offsets,
        mode="sum",
        per_sample_weights=bags.signs,
        include_last_offset=True,
    )
