"""``Store``: its entries are those of the bank, and how much memory it takes."""

import pytest
import torch

from randlora import BasisBank
from tests.support import cases
from tests.support.memory import Allocated

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_computed_with_is_what_is_read(kind, dtype):
    bank = BasisBank(kind, seed=11)
    bank.reserve(5, 30, 90, 80)
    a, b = bank.store(CPU, dtype).operands(3, 20, 70, 40)
    eye = torch.eye(40, dtype=dtype)
    assert torch.equal(a, bank.a(3, 20).to(dtype))
    # The store rounds the entries once; in float16 it then multiplies them by the unit.
    unit = getattr(b, "unit", None) or 1
    dense = (bank.b(70, 40, torch.float64) / (b.scale * unit)).to(dtype) * unit
    got = b.mm(eye), b.tmm(torch.eye(70, dtype=dtype)).T
    if bank.factored:  # 4 roundings (two factors, two products) of numbers of at most 1
        assert all((one - dense).abs().max() <= 4 * torch.finfo(dtype).eps for one in got)
    else:
        assert all(torch.equal(one, dense) for one in got)
    assert b.shape == (70, 40)


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
    # Place and sign of each non-zero, by rows and by columns; the start of each row and column.
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
    assert [list(tensors) for tensors in held] == [[(0, 0)]]  # only A is held


def test_bases_drawn_in_inference_mode_can_be_trained_with():
    bank = BasisBank("dense")
    with torch.inference_mode():
        _, b = bank.store(CPU, torch.float32).operands(1, 1, 4, 4)
    assert not b.entries.is_inference()


@pytest.mark.parametrize(
    ("kind", "sparsity"),
    [*((k, None) for k in cases.KINDS), ("very_sparse", 119.7), ("sparse", 200)],
)
def test_bases_of_an_8b_model_take_little_memory(kind, sparsity):
    """The draw needs at most 0.2 times the stored bytes plus 200 MB of extra memory."""
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
    entries = b.scale * b.mm(torch.eye(40, device="cuda")).cpu()
    # The entries of isometric bases are products of two stored ones, rounded by the device.
    torch.testing.assert_close(entries, bank.b(70, 40), rtol=1e-6 * (kind == "isometric"), atol=0)


def test_bases_are_not_drawn_while_a_graph_is_captured(monkeypatch):
    store = BasisBank("dense").store(CPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured: call the layer once"):
        store.operands(2, 8, 8, 8)
    monkeypatch.undo()
    store.operands(2, 8, 8, 8)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    store.operands(2, 8, 8, 8)  # they are there
