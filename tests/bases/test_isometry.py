"""The isometric kind: the sizes of its factors, and their entries.

``tests/test_isometric_theorem.py`` tests the theorem about them.
"""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from randlora import BasisBank
from randlora.bases.isometry import factor_shapes, orthonormal
from randlora.bases.streams import KINDS, draw_rows
from randlora.core.kronecker import kronecker_costs
from randlora.core.operators import DenseOperator

EPS = np.finfo(np.float64).eps


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [241, 397, 769, 1021, 3079, 4093, 14341])
def test_primes_do_not_degrade_to_dense(q):
    for m in (q, q - 2, q // 2, q // 4, q // 4 * 4):
        (q1, m1), (q2, m2) = factor_shapes(q, m)
        share = m2 * (q1 * q2 + q1 * m1) / (q * m)
        # If all sizes are squares, the share is 2 / √m. Small bases have one factor, prime or not.
        assert share < 3.5 / np.sqrt(m) or q * m < 45_000, (m, share)


@pytest.mark.parametrize(("q", "m"), [(53, 53), (64, 64), (241, 60), (96, 54), (24, 25)])
def test_one_factor_is_applied_as_the_dense_matrix_that_it_is(q, m):
    bank = BasisBank("isometric", seed=3)
    assert factor_shapes(q, m)[0] == (1, 1)
    store = bank.store(torch.device("cpu"), torch.float64)
    a, b = store.operands(5, min(q, m), q, m)
    assert type(b) is DenseOperator
    assert (b.weight_cost, b.token_cost) == (1000, 1000)
    assert b.shape == (q, m)
    assert store.nbytes == 8 * (a.numel() + max(q, m) * m)
    dense = b.scale * b.mm(torch.eye(m, dtype=torch.float64))
    assert (dense - bank.b(q, m, torch.float64)).abs().max() < 8 * EPS


@given(st.integers(1, 150), st.integers(1, 150))
@example(223, 223)
@example(241, 241)
@example(288, 96)
@example(264, 121)
def test_no_other_sizes_that_the_theorem_allows_are_faster(q, m):
    rows, costs = max(q, m), {True: [], False: []}
    for q1 in range(1, rows + 1):
        q2 = -(-rows // q1)
        for m2 in [q2] if m > q else range(-(-m // q1), min(q2, m) + 1):
            m1 = q1 if m > q else -(-m // m2)
            places = [j1 * q2 + j2 for j1 in range(m1) for j2 in range(m2)][:m]
            if places[-1] < rows:
                costs[q1 * q2 == rows].append(sum(kronecker_costs(q, m, (q1, m1), (q2, m2))))
    got = factor_shapes(q, m)
    exact, cut = min(costs[True]), min(costs[False], default=np.inf)
    assert sum(kronecker_costs(q, m, *got)) == (cut if 1.5 * cut < exact else exact)
    assert (got[0][0] * got[1][0] == rows) == (1.5 * cut >= exact)


# Part of the format: see the golden hashes of the bases.
SHAPES = {
    (1, 1): ((1, 1), (1, 1)),
    (40, 30): ((1, 1), (40, 30)),
    (768, 768): ((24, 24), (32, 32)),
    (3072, 768): ((48, 48), (64, 16)),
    (768, 770): ((22, 22), (35, 35)),
    (4096, 4098): ((57, 57), (72, 72)),
    (5632, 2048): ((64, 64), (88, 32)),
    (14336, 4098): ((112, 111), (128, 37)),
    (1021, 1021): ((31, 31), (33, 33)),
    (241, 60): ((1, 1), (241, 60)),
    (997, 249): ((21, 21), (48, 12)),
    (128256, 4096): ((256, 256), (501, 16)),
}


@pytest.mark.parametrize("size", SHAPES)
def test_sizes_never_change(size):
    assert factor_shapes(*size) == SHAPES[size]


def test_no_size_of_a_grid_changes():
    """Each constant of the choice affects some sizes of the grid."""
    grid = [(q, m) for q in range(1, 2600, 37) for m in range(1, q + 9, 1 + q // 12)]
    grid += [(131584, 4112), (128256, 4096), (97, 89), (239, 239), (311, 300), (1022, 1022)]
    found = repr([factor_shapes(q, m) for q, m in grid]).encode()
    assert hashlib.sha256(found).hexdigest()[:16] == "a3a8897242bd50f3"


GOLDEN = {
    (288, 96): "f93626ae55b4f5f2",
    (311, 300): "7a25356d0de4a055",
    (24, 25): "431a4d01d1e220dc",
    (192, 195): "aa5edd5eb253d1a8",
}

# --- factors -------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_columns_are_orthonormal_and_those_of_a_qr_decomposition(m, more, seed):
    matrix = np.random.default_rng(seed).standard_normal((m + more, m))
    assume(np.linalg.cond(matrix) < 1e4)
    got = orthonormal(matrix)
    assert abs(got.T @ got - np.eye(m)).max() < 40 * EPS
    q, r = np.linalg.qr(matrix)
    # Two methods; the error of each is about eps times the condition number.
    assert abs(got - q * np.sign(np.diag(r))).max() < 1e4 * 40 * EPS


def test_columns_that_depend_on_others_give_way():
    matrix = np.array([[1.0, 2.0, 0.0, 1.0], [1.0, 2.0, 0.0, 0.0], [0, 0, 0, 1e-9], [0, 0, 0, 0]])
    got = orthonormal(matrix)
    assert abs(got.T @ got - np.eye(4)).max() < 4 * EPS
    assert abs(got[:, 0] - np.array([1, 1, 0, 0]) / np.sqrt(2)).max() < EPS


def test_nearly_dependent_columns_come_out_orthogonal():
    matrix = np.random.default_rng(0).standard_normal((30, 20))
    matrix[:, 10] = matrix[:, :10].sum(1) + 1e-5 * matrix[:, 10]
    got = orthonormal(matrix)
    assert abs(got.T @ got - np.eye(20)).max() < 40 * EPS


def test_factors_never_change_to_the_bit():
    """All operations are IEEE 754, in a fixed order, so no tolerance is needed."""
    factors = BasisBank("isometric", seed=7).factors(288, 96)
    digests = [hashlib.sha256(f.numpy().astype("<f8").tobytes()).hexdigest()[:16] for f in factors]
    assert [tuple(f.shape) for f in factors] == [(8, 8), (36, 12)]
    assert digests == ["e854e0c47783b6aa", "0f167d63894eff43"]


def test_factors_are_those_of_the_normal_stream():
    """Another implementation gives the same factors: a float64 QR decomposition of the draw."""
    bank = BasisBank("isometric", seed=7)
    for f, (factor, shape) in enumerate(
        zip(bank.factors(288, 96), factor_shapes(288, 96), strict=True), start=1
    ):
        rows, columns = shape
        place = (rows << 32 | columns, f)
        drawn = draw_rows(1, KINDS["isometric"].b, 7, 0.0, range(rows), columns, place)
        q, r = np.linalg.qr(drawn.astype(np.float64))
        assert abs(factor.numpy() - q * np.sign(np.diag(r))).max() < 1e3 * EPS


@pytest.mark.parametrize("size", GOLDEN)
def test_bases_never_change_to_the_bit(size):
    """Sizes that factor, sizes that are cut, more columns than rows; one factor and two."""
    b = BasisBank("isometric", seed=7).b(*size, torch.float64)
    digest = hashlib.sha256(b.numpy().astype("<f8").tobytes()).hexdigest()[:16]
    assert digest == GOLDEN[size]
    assert abs(b.square().mean() - 1) < 0.05


def test_factors_are_those_of_an_isometric_bank_alone():
    with pytest.raises(ValueError, match="kind must be 'isometric' to have factors"):
        BasisBank("very_sparse").factors(6, 4)
    with pytest.raises(ValueError, match="q must be"):
        BasisBank("isometric").is_isometry(0, 1)


def test_a_factor_is_named_by_its_shape_and_side():
    bank = BasisBank("isometric", seed=7)
    (left, right), (other, _) = bank.factors(768, 768), bank.factors(768, 384)
    assert left.shape == other.shape
    assert torch.equal(left, other)
    left, right = bank.factors(4096, 4096)
    assert left.shape == right.shape
    assert not torch.equal(left, right)
    assert not torch.equal(left, BasisBank("isometric", seed=8).factors(4096, 4096)[0])


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 6, 16, 32])
def test_storage_is_next_to_nothing(rank):
    """The shapes of an 8B Llama, in float32. ``A`` alone has ``4096 r`` numbers."""
    bank = BasisBank("isometric")
    store = bank.store(torch.device("cpu"), torch.float32)
    for q, p in [(4096, 4096), (4096, 1024), (14336, 4096)]:
        store.operands(rank, p, q, -(-p // rank) * rank)
    assert bank.nbytes < 2**20
