"""Work on matrices of the size of ``C`` in one pass each: ``C`` itself, and gradients from ``P``.

On a CUDA device with Triton each of these functions is one kernel. Elsewhere, while derivatives or
operations are recorded, and in float64, they are plain operations, which need more passes.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from randlora.core.matmul import is_plain

LARGEST = 256  # the rank up to which a program of the kernel can hold a column of P for a basis


# shape: lam (n, r), gamma (n, k), a (r, k) -> (n·r, k)
def coefficients(
    lam: Tensor, gamma: Tensor, a: Tensor, dtype: torch.dtype, by_columns: bool = False
) -> Tensor:
    """``C``, computed in the dtype of ``lam`` and rounded once to ``dtype``.

    It is stored by rows or by columns.
    """
    if (kernels := _kernels(lam, gamma, a)) is not None:
        c: Tensor = kernels.coefficients(lam, gamma, a, dtype, by_columns)
        return c.T if by_columns else c
    # Not as a matrix product, which could be rounded to TF32.
    c = (lam.unsqueeze(2) * gamma.unsqueeze(1) * a).flatten(0, 1).to(dtype)
    return c.T.contiguous().T if by_columns else c


# shape: p_matrix (n·r, k), lam (n, r), gamma (n, k), a (r, k) -> (n, r), (n, k)
def coefficient_grads(
    p_matrix: Tensor, lam: Tensor, gamma: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``Λ`` and ``Γ`` from ``P``, in the dtype of ``lam``."""
    if (kernels := _kernels(lam, gamma, a, p_matrix)) and lam.shape[1] <= LARGEST:
        parts, d_gamma = kernels.coefficient_grads(p_matrix, lam, gamma, a)
        return parts.sum(0), d_gamma
    by_base = p_matrix.reshape(*lam.shape, -1).to(lam.dtype) * a  # (n, r, k)
    return (by_base * gamma.unsqueeze(1)).sum(2), (by_base * lam.unsqueeze(2)).sum(1)


def _kernels(lam: Tensor, *others: Tensor) -> ModuleType | None:
    """The kernels, if they can be used: with plain tensors, while nothing is recorded."""
    if not lam.is_cuda or lam.dtype != torch.float32 or not is_plain(lam, *others):
        return None
    return _triton()


@cache
def _triton() -> ModuleType | None:
    try:
        from randlora.core import triton_kernels
    except ImportError:  # Triton is not on every platform
        return None
    one = torch.ones(1, 1, device="cuda")
    try:
        triton_kernels.coefficients(one, one, one, torch.float32, False)
    except Exception as error:  # no compiler, no place for what is compiled, an old device
        warnings.warn(f"Triton does not run here, plain operations do: {error}", stacklevel=2)
        return None
    return triton_kernels
