"""The isometric kind: the singular values of ΔW are those of its coefficients.

An isometric ``B`` is the leading ``q × m`` block of ``scale · R1 ⊗ R2``. The factors ``R1``
(``q1 × m1``) and ``R2`` (``q2 × m2``) have orthonormal columns, ``q1 q2 ≥ q``, ``m1 m2 ≥ m``, and
``scale = √(q1 q2)``. With the coefficients ``C``, whose block ``j`` is ``Λ_j A Γ_j``,

    ΔW = scaling · B C    (transposed where out < in).

**Theorem.** Let ``m = n r ≤ q``.

1. If ``q1 q2 = q``, the columns of ``B / scale`` are orthonormal, so for every ``i``

       σ_i(ΔW) = scaling · scale · σ_i(C).

   Rank and condition number of ΔW are those of the small matrix ``C``.
2. If ``q1 q2 > q``, the block is cut. For almost all factors ``B`` still has full column rank, so

       rank(ΔW) = rank(C).

**More columns than rows.** In a square layer whose rank does not divide its size, ``m > q``, and
the columns cannot be orthonormal. Then the rows are orthonormal, or ``B`` has full row rank. No
column is zero, so every trained number has an effect.

The proof is in ``docs/theorem.md``. ``tests/bases/test_isometry.py`` tests how sizes and
factors are made, and ``tests/test_full_rank.py`` says what full rank of ``B`` is good for.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from randlora import BasisBank, RandLoRALinear, rank_report
from randlora.bases.isometry import factor_shapes, is_isometry
from tests.support import cases

EPS = np.finfo(np.float64).eps
# A dot product of two columns sums a few hundred terms, with one rounding for each.
ORTHONORMAL = 200 * EPS
# The singular values of a product of three such matrices, relative to the largest.
SPECTRUM = 1e3 * EPS

sizes = st.integers(1, 400)
CUT = [(227, 210), (241, 199), (262, 243), (311, 300), (397, 397)]  # of case 2


def rank(matrix):
    """The number of singular values that are larger than the rounding of the largest."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > max(matrix.shape) * EPS * values[0]).sum())


# --- case 1: the sizes factor --------------------------------------------------------------------


@given(sizes, sizes, cases.seeds)
def test_columns_of_the_base_are_orthonormal_where_sizes_factor(q, m, seed):
    bank = BasisBank("isometric", seed=seed)
    assume(bank.is_isometry(q, m))
    b = bank.b(q, m, torch.float64) / q**0.5
    assert (b.T @ b - torch.eye(m)).abs().max() < ORTHONORMAL


@given(st.integers(1, 96), st.integers(1, 96), cases.seeds, st.data())
def test_singular_values_are_those_of_the_coefficients(out_features, in_features, seed, data):
    """The singular values of a layer's ``ΔW``, and those of `rank_report`, which forms no ΔW."""
    p, q = sorted((out_features, in_features))
    r = data.draw(st.integers(1, p))
    n = data.draw(st.integers(1, -(-p // r)))
    assume(is_isometry(q, n * r))
    bank = BasisBank("isometric", seed=seed)
    layer = RandLoRALinear(
        in_features, out_features, rank=r, num_bases=n, bank=bank, alpha=0.3, dtype=torch.float64
    )
    torch.nn.init.normal_(layer.randlora_lambda)
    torch.nn.init.normal_(layer.randlora_gamma)
    want = 0.3 / r * q**0.5 * torch.linalg.svdvals(coefficients(layer))
    got = torch.linalg.svdvals(layer.delta_weight())
    assert (got[: len(want)] - want).abs().max() <= SPECTRUM * want[0]
    assert (got[len(want) :] <= SPECTRUM * want[0]).all()  # the rank is at most n r
    (report,) = rank_report(layer)
    assert report.certified
    assert (report.singular_values - got).abs().max() <= SPECTRUM * want[0]


def coefficients(layer):
    """The coefficients ``C`` of a layer, shape ``(n r, p)``, in float64."""
    lam, gamma = layer.randlora_lambda.double(), layer.randlora_gamma.double()
    a = layer.bank.a(layer.rank, gamma.shape[1]).double()
    return torch.einsum("jk,kc,jc->jkc", lam, a, gamma).flatten(0, 1)


# --- case 2: the block is cut --------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 3000))
@example(1, 1)
@example(1021, 1021)
def test_factors_have_room_for_orthonormal_columns_and_for_the_block(q, m):
    """The unit vectors in the proof of case 2 lie within the block, too."""
    (q1, m1), (q2, m2) = factor_shapes(q, m)
    assert m1 <= q1
    assert m2 <= q2
    assert q1 * q2 >= q
    assert m1 * m2 >= m
    if m > q:
        assert (q1, q2) == (m1, m2)
    rows = [j1 * q2 + j2 for j1 in range(m1) for j2 in range(m2)][:m]
    assert max(rows) < max(q, m)


@given(sizes, sizes, cases.seeds)
@example(311, 300, 1)
@example(397, 397, 1)
@example(24, 25, 1)
def test_every_base_has_full_rank(q, m, seed):
    """In both cases, and with more columns than rows."""
    assert rank(BasisBank("isometric", seed=seed).b(q, m, torch.float64)) == min(q, m)


@given(st.sampled_from(CUT), cases.seeds, st.data())
def test_the_rank_is_that_of_the_coefficients_where_the_block_is_cut(size, seed, data):
    """For coefficients of any rank. A low rank occurs, for example, if some ``Λ_j`` are zero."""
    q, m = size
    bank = BasisBank("isometric", seed=seed)
    assert not bank.is_isometry(q, m)
    k = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(k)
    left = torch.randn(m, k, dtype=torch.float64, generator=generator)
    c = left @ torch.randn(k, m, dtype=torch.float64, generator=generator)
    assert rank(c) == k
    assert rank(bank.b(q, m, torch.float64) @ c) == k


# --- more columns than rows ----------------------------------------------------------------------


@pytest.mark.parametrize(("q", "m"), [(24, 25), (192, 195), (768, 770)])
def test_rows_are_orthonormal_where_columns_outnumber_them(q, m):
    b = BasisBank("isometric", seed=5).b(q, m, torch.float64) / m**0.5
    assert (b @ b.T - torch.eye(q)).abs().max() < ORTHONORMAL
    assert (b.norm(dim=0) > 0.1).all()


@pytest.mark.parametrize(("p", "rank", "m"), [(24, 5, 25), (96, 7, 98)])
def test_every_trained_number_has_an_effect_where_columns_outnumber_rows(p, rank, m):
    layer = RandLoRALinear(p, p, rank=rank, bank=BasisBank("isometric")).double()
    torch.nn.init.normal_(layer.randlora_gamma)
    layer(torch.randn(50, p).double()).square().sum().backward()
    assert layer.num_bases * layer.rank == m
    for parameter in (layer.randlora_lambda, layer.randlora_gamma):
        assert (parameter.grad.abs() > 1e-6 * parameter.grad.abs().max()).all()


# --- what is certified ---------------------------------------------------------------------------


def test_the_report_certifies_nothing_else():
    """In case 2, for more columns than rows, and for other kinds, `rank_report` forms ΔW."""
    bank = BasisBank("isometric")
    cut, more = (
        RandLoRALinear(300, 311, rank=6, bank=bank),
        RandLoRALinear(24, 24, rank=5, bank=bank),
    )
    assert factor_shapes(311, 300) == ((16, 15), (20, 20))
    dense = RandLoRALinear(64, 64, rank=4, bank=BasisBank("dense"))
    for layer in (cut, more, dense):
        torch.nn.init.normal_(layer.randlora_gamma)
        (report,) = rank_report(layer)
        assert not report.certified
        assert report.rank == report.full_rank
