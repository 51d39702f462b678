"""Kinds, strategies for banks, and ``Case``: one linear map with all its float64 tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from randlora import BasisBank
from randlora.core.operators import Operator

KINDS = ("dense", "normal", "binary", "sparse", "very_sparse", "isometric")
seeds = st.integers(0, 2**64 - 1)


@st.composite
def banks(draw) -> BasisBank:
    kind = draw(st.sampled_from(KINDS))
    sparsity = None
    if kind in ("sparse", "very_sparse"):
        sparsity = draw(st.none() | st.floats(2, 200))
    return BasisBank(kind, seed=draw(seeds), sparsity=sparsity)


@dataclass(frozen=True)
class Case:
    """One adapted linear map: its bank, its sizes and random float64 tensors for it."""

    bank: BasisBank
    out_features: int
    in_features: int
    r: int
    n: int
    scaling: float
    x: Tensor
    weight: Tensor
    bias: Tensor
    lam: Tensor
    gamma: Tensor

    @property
    def p(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def q(self) -> int:
        return max(self.out_features, self.in_features)

    @property
    def wide(self) -> bool:
        return self.out_features < self.in_features

    @property
    def a(self) -> Tensor:
        return self.bank.a(self.r, self.p).double()

    def operands(self, dtype=torch.float64) -> tuple[Tensor, Operator]:
        store = self.bank.store(torch.device("cpu"), dtype)
        return store.operands(self.r, self.p, self.q, self.n * self.r)

    def bases(self) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` as the oracle takes them: read from the bank, dense."""
        return self.a, self.bank.b(self.q, self.n * self.r, torch.float64)


def case(bank, out_features, in_features, r, n, *, lead=(7,), scaling=0.7, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    p = min(out_features, in_features)
    return Case(
        bank=bank,
        out_features=out_features,
        in_features=in_features,
        r=r,
        n=n,
        scaling=scaling,
        x=normal(*lead, in_features),
        weight=normal(out_features, in_features),
        bias=normal(out_features),
        lam=normal(n, r),
        gamma=normal(n, p),
    )


@st.composite
def cases(draw, max_size: int = 48, lead=None) -> Case:
    out_features = draw(st.integers(1, max_size))
    in_features = draw(st.integers(1, max_size))
    r = draw(st.integers(1, min(out_features, in_features)))
    n = draw(st.integers(1, -(-min(out_features, in_features) // r)))
    if lead is None:
        lead = draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    return case(
        draw(banks()),
        out_features,
        in_features,
        r,
        n,
        lead=lead,
        scaling=draw(st.floats(0.1, 10)),
        seed=draw(st.integers(0, 2**31)),
    )


def assert_close(got: Tensor, want: Tensor, tolerance: float, size: Tensor | None = None) -> None:
    """Compare relative to ``size``, by default the largest entry wanted.

    For a sum of products, give the same sum of absolute values as ``size``: terms of the sum may
    cancel, but their rounding errors do not.
    """
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.numel():
        size = want.abs().max() if size is None else size
        error = ((got - want).abs() / size.clamp_min(torch.finfo(want.dtype).tiny)).max()
        assert error <= tolerance, f"relative error {error:.1e}"
