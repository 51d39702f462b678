import copy
import hashlib
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from randlora import BasisBank
from randlora.streams import KINDS, PRIME, pivots
from tests import cases
from tests.memory import Allocated

CPU = torch.device("cpu")

# Of `b(40, 72)` and `a(5, 72)` at seed 7: changing one means a new format version, and breaks every
# adapter that was ever trained.
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


@given(cases.banks(), st.integers(1, 60), st.integers(1, 60), st.data())
def test_a_smaller_base_is_the_leading_block_of_a_larger_one(bank, rows, columns, data):
    small = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    assume(not bank.factored)  # which has no prefixes: tests/test_isometry.py
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_computed_with_is_what_is_read(kind, dtype):
    bank = BasisBank(kind, seed=11)
    bank.reserve(5, 30, 90, 80)
    a, b = bank.store(CPU, dtype).operands(3, 20, 70, 40)
    eye = torch.eye(40, dtype=dtype)
    assert torch.equal(a, bank.a(3, 20).to(dtype))
    # Rounded as they are, and in float16 once more, at most, times the unit.
    unit = getattr(b, "unit", None) or 1
    dense = (bank.b(70, 40, torch.float64) / (b.scale * unit)).to(dtype) * unit
    got = b.mm(eye), b.tmm(torch.eye(70, dtype=dtype)).T
    if bank.factored:  # two factors and two products are rounded, each number at most one
        assert all((one - dense).abs().max() <= 4 * torch.finfo(dtype).eps for one in got)
    else:
        assert all(torch.equal(one, dense) for one in got)
    assert b.shape == (70, 40)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_mean_is_zero_and_variance_one(kind):
    # 4e6 entries; four standard errors of each estimate. The fourth moment of an entry is s / 2 for
    # ternary ones, 16 for the default very sparse kind, which bounds the others.
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


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_is_dense_and_continuous_whatever_the_kind(kind):
    a = BasisBank(kind, seed=2).a(4, 5000)
    assert (a != 0).all()
    assert len(a.abs().unique()) > 10_000


@given(cases.banks(), st.integers(1, 96))
def test_leading_minors_are_not_zero(bank, size):
    """The reason for full rank, exactly: elimination in integers modulo the prime of the rule."""
    if not KINDS[bank.kind].b.signs:
        return
    minors = bank.b(size, size).sign().to(torch.int64).tolist()
    for k in range(size):
        pivot = minors[k][k] % PRIME
        assert pivot != 0
        inverse = pow(pivot, -1, PRIME)
        for i in range(k + 1, size):
            factor = minors[i][k] * inverse % PRIME
            row, top = minors[i], minors[k]
            minors[i] = [(v - factor * u) % PRIME for v, u in zip(row, top, strict=True)]


@pytest.mark.parametrize("sparsity", [2.0, 6.0, 20.0])
def test_the_rule_reaches_as_far_as_it_says(sparsity):
    """At every size up to `pivots` and beyond, in blocks of elimination of any fill."""
    bank = BasisBank("sparse", seed=5, sparsity=sparsity)
    size = pivots(sparsity) + 40
    b = bank.b(size, size).double()
    for k in (1, 2, 63, 64, 65, pivots(sparsity), size):
        assert torch.linalg.matrix_rank(b[:k, :k]) == k


def test_without_the_rule_small_sign_bases_are_singular(monkeypatch):
    """Why the rule is there: half of all 2 x 2 sign matrices are singular."""
    monkeypatch.setattr("randlora.bases.set_pivots", lambda signs: None)
    ranks = [torch.linalg.matrix_rank(BasisBank("binary", seed=s).b(2, 2)) for s in range(100)]
    assert 30 < sum(rank == 1 for rank in ranks) < 70


def test_streams_differ():
    one = BasisBank(seed=0)
    assert not torch.equal(one.b(8, 8), BasisBank(seed=1).b(8, 8))
    assert not torch.equal(one.b(8, 8), one.a(8, 8))
    assert not torch.equal(one.b(8, 8)[0], one.b(8, 8)[1])


def test_the_largest_seed_is_as_good_as_any():
    assert BasisBank(seed=2**64 - 1).b(2, 2).isfinite().all()


def test_signs_are_stored_as_bytes_and_shared():
    bank = BasisBank("sparse")
    bank.reserve(4, 100, 300, 200)
    store = bank.store(CPU, torch.float32)
    assert bank.nbytes == 0
    _, large = store.operands(4, 100, 300, 200)
    held = bank.nbytes
    assert held == 4 * 4 * 100 + 300 * 200  # A in float32, B as int8
    _, small = bank.store(CPU, torch.float32).operands(2, 50, 60, 40)
    assert bank.nbytes == held
    assert small.entries.untyped_storage().data_ptr() == large.entries.untyped_storage().data_ptr()
    del store
    assert bank.nbytes == 0


def test_a_very_sparse_base_is_stored_by_its_non_zeros():
    bank = BasisBank("very_sparse", sparsity=40)
    store = bank.store(CPU, torch.float32)
    _, b = store.operands(4, 100, 1000, 500)
    nonzeros = int((bank.b(1000, 500) != 0).sum())
    assert nonzeros < 1000 * 500 / 15
    # Where it is and its sign, by rows and by columns, and where each row and column starts.
    assert b.nbytes == nonzeros * 2 * (4 + 4) + 4 * (1001 + 501)
    assert store.operands(2, 50, 1000, 500)[1] is b
    assert bank.nbytes == b.nbytes + 4 * 4 * 100


def test_gathering_is_left_where_it_would_lose():
    def operator(sparsity, m, dtype):
        bank = BasisBank("very_sparse", sparsity=sparsity)
        return type(bank.store(CPU, dtype).operands(1, 1, 512, m)[1]).__name__

    assert operator(32, 512, torch.float32) == "GatherOperator"
    assert operator(32, 6, torch.float32) == "SignOperator"
    assert operator(20, 2048, torch.float32) == "GatherOperator"
    assert operator(20, 2048, torch.bfloat16) == "SignOperator"


def test_a_continuous_base_is_stored_in_the_dtype_it_is_used_in():
    bank = BasisBank("dense")
    store = bank.store(CPU, torch.bfloat16)
    store.operands(4, 10, 30, 20)
    assert bank.nbytes == 2 * (4 * 10 + 30 * 20)


def test_growing_replaces_and_keeps_entries():
    bank = BasisBank("dense", seed=4)
    store = bank.store(CPU, torch.float32)
    _, small = store.operands(2, 10, 10, 10)
    _, large = store.operands(4, 8, 20, 30)
    assert torch.equal(large.entries[:10, :10], small.entries)
    assert bank.nbytes == 4 * (4 * 10 + 20 * 30)


def test_the_smaller_base_is_freed_before_the_larger_is_drawn(monkeypatch):
    bank = BasisBank("dense")
    store = bank.store(CPU, torch.float32)
    store.operands(1, 1, 100, 100)
    held = []
    draw = bank.draw
    monkeypatch.setattr(bank, "draw", lambda *args: held.append(dict(store.tensors)) or draw(*args))
    store.operands(1, 1, 200, 100)
    assert [list(tensors) for tensors in held] == [[(0, 0)]]  # A alone


def test_copies_share_and_pickles_hold_only_the_recipe():
    bank = BasisBank("sparse", seed=9, sparsity=4)
    bank.store(CPU, torch.float32).operands(2, 100, 1000, 100)
    assert copy.deepcopy([bank, bank])[0] is bank
    data = pickle.dumps([bank, bank])
    assert len(data) < 1000
    first, second = pickle.loads(data)
    assert first is second
    assert repr(first) == repr(bank) == "BasisBank('sparse', seed=9, sparsity=4)"
    assert torch.equal(first.b(9, 9), bank.b(9, 9))


def test_bases_drawn_in_inference_mode_can_be_trained_with():
    bank = BasisBank("dense")
    with torch.inference_mode():
        _, b = bank.store(CPU, torch.float32).operands(1, 1, 4, 4)
    assert not b.entries.is_inference()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"kind": "gaussian"}, ValueError, "kind must be one of dense, .* got 'gaussian'"),
        ({"kind": 3}, TypeError, "kind must be a string, got 3 of type int"),
        ({"kind": "sparse", "sparsity": 1.9}, ValueError, r"sparsity must be in \[2, .* got 1.9"),
        ({"kind": "sparse", "sparsity": float("inf")}, ValueError, "sparsity must be finite"),
        ({"kind": "sparse", "sparsity": float("nan")}, ValueError, "sparsity must be finite"),
        ({"kind": "sparse", "sparsity": 10**400}, ValueError, "sparsity must be one finite number"),
        ({"kind": "sparse", "sparsity": "6"}, TypeError, "sparsity must be a number, got '6'"),
        ({"kind": "dense", "sparsity": 6}, ValueError, "sparsity=6 .* 'dense' has none"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got 1.0 of type float"),
        ({"seed": True}, TypeError, "seed must be an integer, got True of type bool"),
    ],
)
def test_bad_recipes_are_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        BasisBank(**keywords)


def test_what_is_too_sparse_for_full_rank_is_refused():
    BasisBank("sparse", sparsity=1000).reserve(1, 1, 14336, 4096)
    BasisBank("sparse", sparsity=1e6).reserve(1, 1, 2048, 2048)  # all pivots
    with pytest.raises(ValueError, match=r"sparsity must be smaller .* 4096 x 4096: with 1000, 1 "):
        BasisBank("sparse", sparsity=1000).reserve(1, 1, 4096, 4096)


def test_bad_sizes_are_refused():
    bank = BasisBank()
    with pytest.raises(ValueError, match=r"q must be at least 1, got 0"):
        bank.b(0, 4)
    with pytest.raises(TypeError, match=r"p must be an integer, got 2\.5"):
        bank.a(1, 2.5)


@pytest.mark.parametrize(
    ("kind", "sparsity"),
    [*((k, None) for k in cases.KINDS), ("very_sparse", 119.7), ("sparse", 200)],
)
def test_bases_of_an_8b_model_take_little_memory(kind, sparsity):
    """Drawing them takes no more than 0.2 times what is stored and 200 MB, at every moment."""
    with Allocated() as allocated:
        bank = BasisBank(kind, sparsity=sparsity)
        bank.reserve(16, 4096, 14336, 4096)
        store = bank.store(torch.device("cpu"), torch.float32)
        store.operands(16, 4096, 14336, 4096)
    assert bank.nbytes <= allocated.peak <= 1.2 * bank.nbytes + 200e6


@pytest.mark.cuda
@pytest.mark.parametrize("kind", cases.KINDS)
def test_entries_are_the_same_on_cuda(kind):
    bank = BasisBank(kind, seed=6)
    a, b = bank.store(torch.device("cuda"), torch.float32).operands(3, 20, 70, 40)
    assert torch.equal(a.cpu(), bank.a(3, 20))
    assert torch.equal(b.scale * b.mm(torch.eye(40, device="cuda")).cpu(), bank.b(70, 40))
