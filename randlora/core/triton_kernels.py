"""The functions of :mod:`randlora.core.passes` as Triton kernels, for CUDA devices.

The plain operations there are their oracle. Triton evaluates the annotations of a kernel, so its
other arguments have none: tensors, then sizes and strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 32, 64  # of C that a program computes
_ENTRIES = 4096  # of P that a program reads


@triton.jit  # type: ignore[untyped-decorator]
def _coefficients(  # type: ignore[no-untyped-def]
    lam,
    gamma,
    a,
    c,
    m,
    r,
    k,
    gamma_row,
    a_row,
    c_row,
    c_column,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    at = (tl.program_id(1) * columns + tl.arange(0, columns)).to(tl.int64)
    inside = (row < m)[:, None] & (at < k)[None, :]
    of_lam = tl.load(lam + row, mask=row < m, other=0.0)
    of_gamma = tl.load(gamma + (row // r)[:, None] * gamma_row + at[None, :], mask=inside)
    of_a = tl.load(a + (row % r)[:, None] * a_row + at[None, :], mask=inside).to(tl.float32)
    value = (of_lam[:, None] * of_gamma * of_a).to(c.dtype.element_ty)
    tl.store(c + row[:, None] * c_row + at[None, :] * c_column, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _coefficient_grads(  # type: ignore[no-untyped-def]
    p,
    lam,
    gamma,
    a,
    d_lam,
    d_gamma,
    n,
    r,
    k,
    p_row,
    gamma_row,
    a_row,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    j, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, at = tl.arange(0, rows), part * columns + tl.arange(0, columns)
    in_rows, in_columns = row < r, at < k
    inside = in_rows[:, None] & in_columns[None, :]
    value = tl.load(p + (j * r + row)[:, None] * p_row + at[None, :], mask=inside, other=0.0)
    of_a = tl.load(a + row[:, None] * a_row + at[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32) * of_a.to(tl.float32)
    of_lam = tl.load(lam + j * r + row, mask=in_rows, other=0.0)
    of_gamma = tl.load(gamma + j * gamma_row + at, mask=in_columns, other=0.0)
    tl.store(d_gamma + j * k + at, tl.sum(value * of_lam[:, None], 0), mask=in_columns)
    target = d_lam + (part.to(tl.int64) * n + j) * r + row
    tl.store(target, tl.sum(value * of_gamma[None, :], 1), mask=in_rows)


def coefficients(
    lam: Tensor, gamma: Tensor, a: Tensor, dtype: torch.dtype, by_columns: bool
) -> Tensor:
    """``C``, or with ``by_columns`` its transpose."""
    (n, r), k = lam.shape, gamma.shape[1]
    m, gamma, a = n * r, _by_rows(gamma), _by_rows(a)
    rows, columns = (_COLUMNS, _ROWS) if by_columns else (_ROWS, _COLUMNS)
    c = torch.empty((k, m) if by_columns else (m, k), dtype=dtype, device=lam.device)
    strides = gamma.stride(0), a.stride(0), *((1, m) if by_columns else (k, 1))
    with torch.cuda.device(lam.device):
        _coefficients[triton.cdiv(m, rows), triton.cdiv(k, columns)](
            lam.contiguous(), gamma, a, c, m, r, k, *strides, rows=rows, columns=columns
        )
    return c


def coefficient_grads(
    p_matrix: Tensor, lam: Tensor, gamma: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """Shares of ``dΛ``, ``(parts, n, r)``, and ``dΓ``, ``(n, k)``. The order of sums is fixed."""
    (n, r), k = lam.shape, gamma.shape[1]
    p_matrix, gamma, a = _by_rows(p_matrix), _by_rows(gamma), _by_rows(a)
    rows = triton.next_power_of_2(r)
    columns = max(16, _ENTRIES // rows)
    parts = triton.cdiv(k, columns)
    d_lam = torch.empty(parts, n, r, dtype=lam.dtype, device=lam.device)
    d_gamma = torch.empty(n, k, dtype=lam.dtype, device=lam.device)
    with torch.cuda.device(lam.device):
        _coefficient_grads[n, parts](
            *(p_matrix, lam.contiguous(), gamma, a, d_lam, d_gamma, n, r, k),
            *(p_matrix.stride(0), gamma.stride(0), a.stride(0)),
            rows=rows,
            columns=columns,
        )
    return d_lam, d_gamma


def _by_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
