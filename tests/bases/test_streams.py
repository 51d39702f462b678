"""The entries of bases never change, and have the distributions of the paper."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from randlora import BasisBank
from randlora.bases.streams import KINDS
from tests.support import cases

# Hashes of `b(40, 72)` and `a(5, 72)` at seed 7. A changed hash needs a new format version, and
# breaks all adapters that exist.
GOLDEN = {
    "dense": (
        "f32829cc9cbe6c9b8e4d21228d6fae215d771508cbfcf52cae835184cfcf4b4d",
        "87c35c1a1fb80635f3f78a19e0b6cb69ba1ac62995fca36b755ee46309a9f590",
    ),
    "normal": (
        "67d45ad73e79a811b4f401edd77f9d80bd58cdf10146b5bf5b7d7a7a29eca0fb",
        "68a989b6862ad36af44d97eb0866e6881418f1f47c04432f56fa0ec916f27ffc",
    ),
    "binary": (
        "d38faf4f8a08619bde6a7d8521fb5d8d095b58b1f740ed73cc6c685b7dac9def",
        "87c35c1a1fb80635f3f78a19e0b6cb69ba1ac62995fca36b755ee46309a9f590",
    ),
    "sparse": (
        "182d74bc39ad72a44ee5ec953addf2fc029eb83814cf9f2e5707f971485f73aa",
        "87c35c1a1fb80635f3f78a19e0b6cb69ba1ac62995fca36b755ee46309a9f590",
    ),
    "very_sparse": (
        "1eaf89e39296ad58092b30ec6b5356f6185d7fce392dd463f8024bba2d0cfb8a",
        "87c35c1a1fb80635f3f78a19e0b6cb69ba1ac62995fca36b755ee46309a9f590",
    ),
    "sparse, s = 3.5": (
        "904a16e474d8f13b44b5ca71514409d0eabdf39aeb702fc6623dc999f52dfa9b",
        "87c35c1a1fb80635f3f78a19e0b6cb69ba1ac62995fca36b755ee46309a9f590",
    ),
}


def digest(tensor):
    return hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()


def named_bank(name):
    kind, _, sparsity = name.partition(", s = ")
    return BasisBank(kind, seed=7, sparsity=float(sparsity) if sparsity else None)


@pytest.mark.parametrize("name", GOLDEN)
def test_entries_never_change(name):
    bank = named_bank(name)
    assert (digest(bank.b(40, 72)), digest(bank.a(5, 72))) == GOLDEN[name]


def test_every_kind_has_golden_hashes():
    assert {*KINDS} <= {*GOLDEN, "isometric"}  # the hashes of isometric bases: test_isometry.py


@given(cases.banks(), st.integers(1, 60), st.integers(1, 60), st.data())
def test_a_smaller_base_is_the_leading_block_of_a_larger_one(bank, rows, columns, data):
    small = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    assume(not bank.factored)  # isometric bases have no prefixes
    block = np.s_[: small[0], : small[1]]
    assert torch.equal(bank.b(*small), bank.b(rows, columns)[block])
    assert torch.equal(bank.a(*small), bank.a(rows, columns)[block])


@pytest.mark.parametrize("kind", [kind for kind in cases.KINDS if kind != "isometric"])
def test_prefixes_agree_past_the_pivots_and_the_chunks_of_generation(kind):
    bank = BasisBank(kind, seed=3)
    large = bank.b(700, 650)
    for q, m in [(700, 1), (1, 650), (513, 511), (257, 64), (600, 600)]:
        assert torch.equal(bank.b(q, m), large[:q, :m])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_mean_is_zero_and_variance_one(kind):
    # 4e6 entries; four standard errors of each estimate. The fourth moment of a ternary entry is
    # s / 2: 16 for the default very sparse kind. It is the largest of all kinds.
    entries = BasisBank(kind, seed=1).b(2000, 2000).double()
    assert abs(entries.mean()) < 4 / 2000
    assert abs(entries.square().mean() - 1) < 4 * 4 / 2000


@pytest.mark.parametrize(("kind", "sparsity"), [("sparse", 6), ("very_sparse", 32), ("sparse", 2)])
def test_sign_entries_have_the_probabilities_of_the_paper(kind, sparsity):
    b = BasisBank(kind, seed=1, sparsity=sparsity).b(1000, 1000)
    magnitude = np.float32(np.sqrt(sparsity / 2))
    assert set(b.unique().tolist()) <= {-float(magnitude), 0.0, float(magnitude)}
    for sign in (1, -1):  # 1e6 Bernoulli entries; four standard errors, and the few pivots
        share = (b.sign() == sign).double().mean()
        assert abs(share - 1 / sparsity) < 4 * 0.5 / 1000 + 1e-3


def test_streams_differ():
    one = BasisBank(seed=0)
    assert not torch.equal(one.b(8, 8), BasisBank(seed=1).b(8, 8))
    assert not torch.equal(one.b(8, 8), one.a(8, 8))
    assert not torch.equal(one.b(8, 8)[0], one.b(8, 8)[1])


def test_the_largest_seed_is_as_good_as_any():
    assert BasisBank(seed=2**64 - 1).b(2, 2).isfinite().all()
