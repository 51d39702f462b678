"""The bases of PEFT's RandLora: their entries, and which of them a layer takes."""

import pytest
import torch
from torch import nn

import randlora
from randlora import inject
from randlora.bases.peft_rule import PeftBank

# torch 2.13 draws in bfloat16 what it draws in float32, rounded; torch 2.9 draws other numbers.
ROUNDED, FLOAT32 = (
    torch.rand(9, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32)
)
GOLDEN = {
    "peft": "dc9734c986cea1cc" if ROUNDED.equal(FLOAT32.bfloat16()) else "f8925bb78838b00b",
    "peft_sparse": "60e08bd434f34a6a",
    "peft_very_sparse": "a42c939ddf6a5249",
}
SIZES = {"rank": 5, "smaller": 12, "larger": 24}


@pytest.mark.parametrize("kind", GOLDEN)
def test_layers_of_all_widths_take_their_columns_by_the_rule(kind):
    """Compare with the flattened slices that the docstring of ``peft_rule`` describes."""
    bank = PeftBank(kind, **SIZES, seed=4)
    a, b = bank.projections(12, 24)  # (r, 1, p'), (q', N, r)
    assert (a.shape, b.shape) == ((5, 1, 12), (24, 3, 5))
    for q, p, n in ((24, 12, 3), (20, 10, 2), (7, 3, 1)):
        lam, gamma = torch.randn(n, 5).double(), torch.randn(n, p).double()
        flat_b = b[:q, :n].flatten(1).double()
        flat_a = (a[:, :, :p].double() * lam.T[:, :, None] * gamma).flatten(0, 1)
        want = flat_b @ flat_a
        bases = bank.a(5, p).double(), bank.b(q, n * 5, torch.float64)
        got = randlora.reference.delta_weight(*bases, lam, gamma, scaling=1.0, wide=False)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        held_a, held_b = bank.store(torch.device("cpu"), torch.float64).operands(5, p, q, n * 5)
        torch.testing.assert_close(held_a, bases[0], rtol=0, atol=0)
        dense = held_b.mm(torch.eye(n * 5, dtype=torch.float64)) * held_b.scale
        torch.testing.assert_close(dense, bases[1], rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_entries_are_peft_s_whatever_the_defaults(kind):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(9)
        one = PeftBank(kind, **SIZES, seed=4).digest(())
    finally:
        torch.set_default_dtype(before)
    assert one == PeftBank(kind, **SIZES, seed=4).digest(())
    assert one != PeftBank(kind, **SIZES, seed=5).digest(())
    assert one[:16] == GOLDEN[kind]


@pytest.mark.parametrize("basis", ["peft", "peft_sparse", "peft_very_sparse"])
def test_bases_that_cannot_be_normalised_are_refused(basis):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="basis must be of another kind for layers this small"):
        inject(model, rank=1, basis=basis)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
