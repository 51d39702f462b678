"""``KroneckerOperator``: a ``B`` applied by its two Kronecker factors, and the costs of doing so.

``B / scale`` is the leading ``q × m`` block of ``R1 ⊗ R2``. ``R1`` has shape ``(q1, m1)`` and
``R2`` has shape ``(q2, m2)``, with ``q1 q2 ≥ q`` and ``m1 m2 ≥ m``. ``scale = √(q1 q2)``.
:mod:`randlora.bases.isometry` chooses the factors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.core.machine import machine_of
from randlora.core.matmul import added_, addmm_, baddbmm_, bmm, mm, uses_onednn
from randlora.core.operators import DenseOperator, Stored

Shape = tuple[int, int]

RATE = 13  # cost of one multiply-add in a product with a small matrix
_CALLS = 100_000  # cost of the calls for a second factor, divided by 1000 columns or tokens


def kronecker_costs(q: int, m: int, left: Shape, right: Shape) -> tuple[int, int]:
    """The costs for each column of a matrix like the weight, and for each token.

    They are in tenths of multiply-adds, and were fitted to measurements in float32
    (``benchmarks/README.md``). ``left`` and ``right`` are the shapes of the factors.
    :func:`randlora.bases.isometry.factor_shapes` chooses these shapes by the costs, so changing a
    number here changes the format of the bases.

    Products with ``R2``, and products of ``R1`` with many columns, run at three quarters of the
    rate of a large product. The batched products of ``R1`` with tokens run at three fifths of it.
    With fewer than 12 columns, they take as long as with about 40. Each number read and written
    counts as 28 multiply-adds. Each number copied for padding or cutting counts as 30 on the ``q``
    side and 15 on the ``m`` side. If there is only one factor (``q1 = 1``), it is applied as a
    dense matrix.
    """
    (q1, m1), (q2, m2), rows = left, right, max(q, m)
    passes = 280 * rows
    if q1 == 1:
        return 10 * q * m + passes, 10 * q * m + passes
    passes += 300 * rows * (q1 * q2 > q) + 150 * m * (m1 * m2 > m) + _CALLS
    column = RATE * q1 * m2 * (q2 + m1) + passes
    token = RATE * q1 * m2 * q2 + q1 * m1 * (17 * m2 if m2 >= 12 else 700) + passes
    return column, token


def half_costs(q: int, m: int, left: Shape, right: Shape) -> tuple[int, int]:
    """The costs for each token of ``R2``, and for each column of ``R1`` after it, as above."""
    (q1, m1), (q2, m2) = left, right
    passes = 280 * max(q, m) + 300 * max(q, m) * (q1 * q2 > q) + _CALLS // 2
    columns = 280 * m + 150 * m * (m1 * m2 > m) + _CALLS // 2
    return RATE * q1 * m2 * q2 + passes, RATE * q1 * m2 * m1 + columns


class KroneckerOperator(Stored):
    """``(R1 ⊗ R2)[:q, :m]``, applied one factor at a time.

    This takes ``1 / m1 + 1 / q2`` of the multiply-adds of the dense product, and somewhat more if
    rows or columns are cut. With a matrix like the weight, ``R1`` is applied in one product and
    ``R2`` in one product for each of the ``q1`` blocks. With tokens, ``R2`` is applied in one
    product and ``R1`` in one product for each token, so row-major tokens are not transposed. Such
    small products run at a lower rate, see :func:`kronecker_costs`. In low precision the result of
    the first factor is rounded.
    """

    by_columns = False

    def __init__(self, left: Tensor, right: Tensor, shape: Shape) -> None:
        self.left, self.right, self.shape = left, right, shape
        (q1, m1), (q2, m2) = left.shape, right.shape
        self.scale = math.sqrt(q1 * q2)
        # Small products in low precision take two or three times as long on a CPU.
        self.takes_wider = left.device.type == "cpu" and left.dtype.itemsize < 4
        # With their transposes: to make a view takes as long as to multiply for one token.
        self._factors = _with_transposes(left, right)
        wider = (left.float(), right.float()) if self.takes_wider else ()
        self._in_float32 = _with_transposes(*wider) if wider else ()
        self.half = q1 * m2
        if machine_of(left.device).balance:  # its multiply-adds, which are few beside the passes
            both = q1 * m2 * (m1 + q2)
            costs, times = (both, both, q1 * m2 * q2, q1 * m2 * m1), 1000
        else:
            # Relative to the dense product. oneDNN makes that twice as fast, but computes only few
            # of the products here, because they are small.
            sizes = *shape, (q1, m1), (q2, m2)
            costs = *kronecker_costs(*sizes), *half_costs(*sizes)
            times = 100 * (2 if uses_onednn(left.dtype, left.device) else 1)
        thousandths = [times * cost // math.prod(shape) for cost in costs]
        self.weight_cost, self.token_cost, *halves = thousandths
        self.half_token_cost, self.half_weight_cost = halves

    def mm(self, c: Tensor) -> Tensor:
        q1, q2 = self.left.shape[0], self.right.shape[0]
        return bmm(self.right, self._left_first(c)).view(q1 * q2, -1)[: self.shape[0]]

    def tmm(self, g: Tensor) -> Tensor:
        (q1, m1), (q2, m2), k = self.left.shape, self.right.shape, g.shape[1]
        blocks = bmm(self.right.T, _padded(g, q1 * q2, 0).view(q1, q2, k))
        return mm(self.left.T, blocks.view(q1, m2 * k)).view(m1 * m2, k)[: self.shape[1]]

    def addmm_(self, total: Tensor, c: Tensor, *, keep: bool = False) -> Tensor:
        q1, q2 = self.left.shape[0], self.right.shape[0]
        if total.shape[0] == q1 * q2 and total.is_contiguous():
            added = baddbmm_(total.view(q1, q2, -1), self.right, self._left_first(c), keep=keep)
            return added.view(total.shape)
        return added_(total, self.mm(c), keep=keep)

    def tokens_mm(self, x: Tensor) -> Tensor:
        left, _, left_t, _ = self._factors_in(x.dtype)
        (q1, m1), m2, k = left.shape, self.right.shape[1], x.shape[0]
        half = self.tokens_half(x)
        if k == 1:  # no batch
            product = torch.mm(left_t, half.view(q1, m2)).view(1, m1 * m2)
        else:
            product = bmm(left_t, half.view(k, q1, m2)).view(k, m1 * m2)
        return _cut(product, self.shape[1])

    def tokens_addmm_(self, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:
        left = self._factors_in(h.dtype)[0]
        (q1, m1), m2, k = left.shape, self.right.shape[1], h.shape[0]
        h = _padded(h, m1 * m2, 1)
        half = torch.mm(left, h.view(m1, m2)) if k == 1 else bmm(left, h.view(k, m1, m2))
        return self.half_addmm_(total, half.view(k, q1 * m2), keep=keep)

    def tokens_half(self, x: Tensor) -> Tensor:
        right = self._factors_in(x.dtype)[1]
        q1, q2, k = self.left.shape[0], right.shape[0], x.shape[0]
        return mm(_padded(x, q1 * q2, 1).view(k * q1, q2), right).view(k, self.half)

    def half_addmm_(self, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:
        right, right_t = self._factors_in(h.dtype)[1::2]
        q1, (q2, m2), k = self.left.shape[0], right.shape, h.shape[0]
        blocks = h.reshape(k * q1, m2)
        if total.shape[1] == q1 * q2 and total.dtype == h.dtype and total.is_contiguous():
            rows = total.view(k * q1, q2)
            added = addmm_(rows, blocks, right_t, keep=keep)
            return total if added is rows else added.view(total.shape)
        product = _cut(mm(blocks, right_t).view(k, q1 * q2), self.shape[0])
        return added_(total, product, keep=keep)

    def half_tmm(self, g: Tensor) -> Tensor:
        left, _, left_t, _ = self._factors_in(g.dtype)
        (q1, m1), m2, k = left.shape, self.right.shape[1], g.shape[1]
        return mm(left_t, g.reshape(q1, m2 * k)).view(m1 * m2, k)[: self.shape[1]]

    def _factors_in(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype == self.left.dtype:
            return self._factors
        if dtype == torch.float32 and self._in_float32:
            return self._in_float32
        return _with_transposes(self.left.to(dtype), self.right.to(dtype))

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        q2 = len(self.right)
        left, right = self.left[places // q2], self.right[places % q2]
        entries = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)[:, : self.shape[1]]
        return DenseOperator(entries.to(dtype).contiguous(), self.scale)

    # shape: (m, k) -> (q1, m2, k)
    def _left_first(self, c: Tensor) -> Tensor:
        (q1, m1), (_, m2), k = self.left.shape, self.right.shape, c.shape[1]
        return mm(self.left, _padded(c, m1 * m2, 0).view(m1, m2 * k)).view(q1, m2, k)


def _with_transposes(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return left, right, left.T, right.T


def _cut(matrix: Tensor, columns: int) -> Tensor:
    return matrix if matrix.shape[1] == columns else matrix[:, :columns]


def _padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    """``matrix`` with zeros appended up to ``size`` rows (``dim`` 0) or columns, contiguous."""
    lacking = size - matrix.shape[dim]
    if lacking:
        return F.pad(matrix, (0, 0, 0, lacking) if dim == 0 else (0, lacking))
    return matrix.contiguous()
