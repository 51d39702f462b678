"""The method as the paper writes it: the reference for tests and benchmarks.

It is slow and simple on purpose, and the package itself does not use it. Autograd differentiates
it, so it is the reference for gradients too.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["delta_weight", "linear"]


def delta_weight(
    a: Tensor, b: Tensor, lam: Tensor, gamma: Tensor, *, scaling: float = 1.0, wide: bool = False
) -> Tensor:
    """Return ``ΔW = scaling · Σ_j B_j Λ_j A Γ_j`` (paper, equation 4), as a loop over the bases.

    Args:
        a: the shared base ``A``, shape ``(r, p)``.
        b: the bases ``B_j`` side by side, shape ``(q, n·r)``.
        lam: the diagonals of ``Λ_j``, shape ``(n, r)``.
        gamma: the diagonals of ``Γ_j``, shape ``(n, p)``.
        scaling: the factor of the sum.
        wide: whether the layer has ``out < in``. The sum is then transposed.

    Returns:
        Shape ``(q, p)``, or ``(p, q)`` if wide: always ``out × in``.
    """
    n, r = lam.shape
    total = torch.zeros(b.shape[0], a.shape[1], dtype=lam.dtype, device=lam.device)
    for j in range(n):
        b_j = b[:, j * r : (j + 1) * r]
        total = total + (b_j * lam[j]) @ (a * gamma[j])  # a diagonal on the right scales columns
    return scaling * (total.T if wide else total)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    lam: Tensor,
    gamma: Tensor,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """Return ``x (W0 + ΔW)ᵀ + bias``.

    Args:
        x: shape ``(..., in)``.
        weight: ``W0``, shape ``(out, in)``.
        bias: shape ``(out,)``, or None.
        a, b, lam, gamma, scaling: as in :func:`delta_weight`.

    Returns:
        Shape ``(..., out)``.
    """
    out_features, in_features = weight.shape
    delta = delta_weight(a, b, lam, gamma, scaling=scaling, wide=out_features < in_features)
    y = x @ (weight + delta).T
    return y if bias is None else y + bias
