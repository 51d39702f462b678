"""``GatherOperator``: applies a very sparse ternary ``B`` by gathering and adding rows.

Row ``i`` of ``B c`` is the signed sum of the rows of ``c`` at the non-zeros in row ``i`` of ``B``.
``embedding_bag`` computes such sums, so no matrix product is needed (paper, section 6.6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.core.matmul import in_place, transforming, uses_onednn
from randlora.core.operators import DenseOperator, Stored

_TILE = 128  # columns gathered at a time: 3,000 rows of them fit into a cache of 1.5 MB


class _Bags(NamedTuple):
    """The non-zeros of ``B``, grouped by row or by column as ``embedding_bag`` takes them."""

    places: Tensor  # the column of each non-zero (its row, if grouped by column)
    offsets: Tensor  # where each group starts, and where the last one ends
    signs: Tensor  # the value of each non-zero


def gather_costs(density: float, m: int, dtype: torch.dtype) -> tuple[int, int]:
    """``weight_cost`` and ``token_cost`` of a :class:`GatherOperator` with ``m`` columns.

    They were measured on two cores (``benchmarks/README.md``). ``density`` is the share of entries
    that are not zero. Tokens cost more because they are transposed.
    """
    # Costs are relative to the dense product, which is twice as fast with oneDNN.
    faster = 2 if uses_onednn(dtype, torch.device("cpu")) else 1
    weight_cost = int((2200 if dtype.itemsize >= 4 else 5500) * density) * faster
    return weight_cost, weight_cost + 70_000 * faster // m


class GatherOperator(Stored):
    """An operator made from the signs of ``B``, shape ``(q, m)``, for products in ``dtype``.

    The non-zeros are stored twice, by rows and by columns, with the magnitude ``unit``, a power of
    two or None for 1. Rows are gathered from tiles of columns that stay in the cache. In low
    precision ``B c`` is rounded before it is added.
    """

    by_columns = True
    takes_wider = False

    def __init__(
        self, signs: Tensor, scale: float, dtype: torch.dtype, unit: float | None = None
    ) -> None:
        self.shape = q, m = signs.shape[0], signs.shape[1]
        self.scale = scale
        rows, columns = signs.nonzero(as_tuple=True)
        values = signs[rows, columns].to(dtype) * (1 if unit is None else unit)
        by_column = torch.argsort(columns, stable=True)
        self.by_row = _bags(rows, columns, values, q)
        self.by_column = _bags(columns[by_column], rows[by_column], values[by_column], m)
        self.weight_cost, self.token_cost = gather_costs(len(rows) / signs.numel(), m, dtype)

    def mm(self, c: Tensor) -> Tensor:
        return _in_tiles(c, lambda tile: _gather(self.by_row, c[:, tile]))

    def tmm(self, g: Tensor) -> Tensor:
        return _in_tiles(g, lambda tile: _gather(self.by_column, g[:, tile]))

    def addmm_(self, total: Tensor, c: Tensor, *, keep: bool = False) -> Tensor:
        if keep or not in_place():
            return total + self.mm(c)
        for tile in _tiles(c.shape[1]):
            total[:, tile].add_(_gather(self.by_row, c[:, tile]))
        return total

    def tokens_mm(self, x: Tensor) -> Tensor:
        return self.tmm(x.T).T

    def tokens_addmm_(self, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:
        if keep or not in_place():
            return total + self.mm(h.T).T
        for tile in _tiles(len(h)):
            total[tile].add_(_gather(self.by_row, h[tile].T).T)
        return total

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        columns, offsets, signs = self.by_row
        starts, ends = offsets[places].long(), offsets[places + 1].long()
        counts = ends - starts
        row = torch.repeat_interleave(counts)
        within = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        taken = starts[row] + within
        entries = signs.new_zeros(len(places), self.shape[1])
        entries[row, columns[taken].long()] = signs[taken]
        return DenseOperator(entries.to(dtype), self.scale)


def _bags(rows: Tensor, columns: Tensor, values: Tensor, count: int) -> _Bags:
    offsets = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    offsets[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return _Bags(columns.int(), offsets, values)


def _tiles(columns: int) -> list[slice]:
    return [slice(lo, lo + _TILE) for lo in range(0, max(columns, 1), _TILE)]


def _in_tiles(table: Tensor, fill: Callable[[slice], Tensor]) -> Tensor:
    if not in_place():
        return fill(slice(None))  # joining the tiles would write in place
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
    """Row ``i`` of the result is the signed sum of the rows of ``table`` in bag ``i``."""
    if not torch.compiler.is_compiling() and not table.numel():
        return table.new_zeros(len(bags.offsets) - 1, table.shape[1])
    if transforming() or torch._C._are_functorch_transforms_active():
        return _dense(bags, table.shape[0]) @ table  # transforms do not know embedding_bag
    return F.embedding_bag(
        bags.places,
        table.contiguous(),
        bags.offsets,
        mode="sum",
        per_sample_weights=bags.signs,
        include_last_offset=True,
    )


def _dense(bags: _Bags, columns: int) -> Tensor:
    """The matrix with the non-zeros in ``bags``."""
    counts = bags.offsets[1:] - bags.offsets[:-1]
    entries = bags.signs.new_zeros(len(counts), columns)
    rows = torch.repeat_interleave(counts, output_size=len(bags.places))  # compilers cannot tell
    entries[rows, bags.places.long()] = bags.signs
    return entries
