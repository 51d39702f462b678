"""Products of few tokens with ``C``, and gradients from them, without ``C`` and ``P``.

``A ∘ x``, shape ``(T, r, p)``, stands in for ``C``, shape ``(n, r, p)``, which has more numbers if
there are more bases than tokens:

    (x Cᵀ)[t, (j,k)] = Λ[j,k] Σ_c Γ[j,c] A[k,c] x[t,c]
    (h C)[t, c]      = Σ_k A[k,c] Σ_j Γ[j,c] Λ[j,k] h[t,(j,k)]

All of this is computed in the dtype of ``Λ``, ``Γ`` and ``A``, float32 or wider, in which the sums
cannot overflow. One token is common and its products are small, so it gets the fewest calls: for it
some intermediate results lack the dimension of tokens, and broadcasting puts it back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from randlora.core.matmul import added_, cast, mm
from randlora.core.operators import Operator


# shape: total (T, p), h (T, n·r), lam (n, r), gamma (n, p), a (r, p) -> (T, p)
def add_through_(total: Tensor, h: Tensor, lam: Tensor, gamma: Tensor, a: Tensor) -> Tensor:
    """``total + h C``."""
    product = (_combined(cast(h, gamma.dtype), lam, gamma) * a).sum(-2)  # (T, p), or (p,)
    return added_(total, product)


# shape: total (T, q), x (T, p), lam (n, r), gamma (n, p), a (r, p) -> (T, q)
def add_back_(
    total: Tensor, x: Tensor, lam: Tensor, gamma: Tensor, a: Tensor, b: Operator
) -> Tensor:
    """``total + x Cᵀ Bᵀ``."""
    h = (_sums(cast(x, gamma.dtype), gamma, a) * lam).reshape(x.shape[0], lam.numel())
    return b.tokens_addmm_(total, h if b.takes_wider else cast(h, total.dtype))


# shape: h (T, n·r), x (T, p), lam (n, r), gamma (n, p), a (r, p) -> (n, r), (n, p), (r, p)
def grads(
    h: Tensor, x: Tensor, lam: Tensor, gamma: Tensor, a: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dΛ``, ``dΓ`` and ``dA`` of ``Σ h ∘ (x Cᵀ)``; None for what is not needed."""
    h, x = cast(h, gamma.dtype), cast(x, gamma.dtype)
    d_lam = d_gamma = d_a = None
    if needs[0]:
        d_lam = (_sums(x, gamma, a) * h.reshape(h.shape[0], *lam.shape)).sum(0)
    if needs[1]:
        d_gamma = mm(_by_base(h, lam), _scaled(x, a))
    if needs[2]:
        d_a = (_combined(h, lam, gamma) * x.unsqueeze(1)).sum(0)
    return d_lam, d_gamma, d_a


# shape: x (T, p), a (r, p) -> (T·r, p)
def _scaled(x: Tensor, a: Tensor) -> Tensor:
    return (x.unsqueeze(1) * a).flatten(0, 1)


# shape: x (T, p), gamma (n, p), a (r, p) -> (T, n, r), or (n, r) if T = 1
def _sums(x: Tensor, gamma: Tensor, a: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return torch.mm(gamma, (x * a).T)
    sums = mm(gamma, _scaled(x, a).T)  # (n, T·r)
    return sums.view(gamma.shape[0], x.shape[0], a.shape[0]).transpose(0, 1)


# shape: h (T, n·r), lam (n, r) -> (n, T·r)
def _by_base(h: Tensor, lam: Tensor) -> Tensor:
    return (h.reshape(h.shape[0], *lam.shape) * lam).transpose(0, 1).flatten(1)


# shape: h (T, n·r), lam (n, r), gamma (n, p) -> (T, r, p), or (r, p) if T = 1
def _combined(h: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    if h.shape[0] == 1:
        return torch.mm((h.reshape(lam.shape) * lam).T, gamma)
    product = mm(_by_base(h, lam).T, gamma)
    return product.view(h.shape[0], lam.shape[1], gamma.shape[1])
