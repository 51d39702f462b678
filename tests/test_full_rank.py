"""The guarantee: the update has full rank, and what it hangs on. Ranks are judged in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora import BasisBank, RandLoRALinear, rank_report, reference
from randlora.functional import delta_weight
from tests import cases

OPTIMISERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def rank(matrix):
    return int(torch.linalg.matrix_rank(matrix.double()))


@given(cases.cases())
def test_rank_is_that_of_the_bases_for_generic_parameters(c):
    a, b = c.operands()
    delta = delta_weight(c.lam, c.gamma, a, b, scaling=c.scaling, wide=c.wide)
    assert rank(delta) == min(c.n * c.r, c.p)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", [(512, 512), (640, 300), (300, 640)])
def test_rank_is_full_at_hundreds_of_columns(kind, shape):
    layer = RandLoRALinear(*shape, rank=7, bank=BasisBank(kind, seed=1))
    torch.nn.init.normal_(layer.randlora_lambda)
    torch.nn.init.normal_(layer.randlora_gamma)
    assert rank(layer.delta_weight(torch.float64)) == min(shape)


@given(
    cases.banks(),
    st.integers(1, 48),
    st.integers(1, 48),
    st.sampled_from(sorted(OPTIMISERS)),
    st.data(),
)
def test_one_optimiser_step_makes_it_full(bank, out_features, in_features, optimiser, data):
    """From the default initialisation, with as many tokens as p (a rank cannot come from fewer)."""
    p = min(out_features, in_features)
    r = data.draw(st.integers(1, p))
    layer = RandLoRALinear(in_features, out_features, rank=r, bank=bank).double()
    step(layer, optimiser, tokens=p + 1)
    assert rank_report(layer).layers[0].rank == p


def step(layer, optimiser, tokens):
    x = torch.randn(tokens, layer.in_features, dtype=torch.float64)
    target = torch.randn(tokens, layer.out_features, dtype=torch.float64)
    adapter = [layer.randlora_lambda, layer.randlora_gamma]
    chosen = OPTIMISERS[optimiser](adapter, lr=1e-2)
    (layer(x) - target).square().mean().backward()
    chosen.step()


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_constant_gamma_would_start_at_rank_r(optimiser):
    """Why the initialisation is Γ = 0 and Λ constant, and not the other way round as in PEFT."""
    ranks = {}
    for start in ("ours", "other"):
        layer = RandLoRALinear(96, 96, rank=6).double()
        if start == "other":
            torch.nn.init.zeros_(layer.randlora_lambda)
            torch.nn.init.constant_(layer.randlora_gamma, 1 / 96)
        step(layer, optimiser, tokens=128)
        ranks[start] = rank_report(layer).layers[0].rank
    assert ranks == {"ours": 96, "other": 6}


@pytest.mark.parametrize("kind", cases.KINDS)
def test_half_of_the_bases_give_half_of_the_rank(kind):
    layer = RandLoRALinear(96, 128, rank=6, num_bases=8, bank=BasisBank(kind)).double()
    step(layer, "adamw", tokens=128)
    assert rank_report(layer).layers[0].rank == 48


def test_a_sparse_a_would_break_it():
    """Why A is dense with every kind: a zero column of A is a zero column of ΔW.

    At 768 x 768 and r = 6 an A with P(0) = 2/3 has about (2/3)^6 · 768 = 67 zero columns.
    """
    p, r = 768, 6
    n = p // r
    b = BasisBank("sparse", seed=1).b(p, n * r).double()
    sparse_a = BasisBank("sparse", seed=2).b(r, p).double()
    dense_a = BasisBank("sparse", seed=1).a(r, p).double()
    lam, gamma = torch.randn(n, r).double(), torch.randn(n, p).double()
    zero_columns = int((sparse_a == 0).all(0).sum())
    assert zero_columns > 20
    assert rank(reference.delta_weight(sparse_a, b, lam, gamma)) <= p - zero_columns
    assert rank(reference.delta_weight(dense_a, b, lam, gamma)) == p


def test_a_very_sparse_layer_far_smaller_than_its_bank_is_full_rank_too():
    """At s = 200 a 20 x 20 draw is nearly empty; the pivots alone carry it."""
    bank = BasisBank("very_sparse", sparsity=200)
    assert (bank.b(20, 20) == 0).double().mean() > 0.9
    layer = RandLoRALinear(20, 20, rank=3, bank=bank).double()
    step(layer, "sgd", tokens=30)
    assert rank_report(layer).layers[0].rank == 20
