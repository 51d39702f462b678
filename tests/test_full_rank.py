"""Full rank: the guarantee that this package is known for.

An adapted weight of ``out × in`` is ``W0 + ΔW`` with

    ΔW = scaling · Σ_j B_j Λ_j A Γ_j    (j = 1 … n; transposed where out < in).

With ``p = min(out, in)`` and ``q = max(out, in)``, the bases ``B_j`` (``q × r``) and ``A``
(``r × p``) are drawn once and frozen. The diagonals ``Λ_j`` and ``Γ_j`` are trained: ``n (r + p)``
numbers, where LoRA trains ``r (p + q)`` for a rank of ``r``.

**Theorem.** Let ``B = [B_1 … B_n]`` have full rank, ``min(q, n r)``, and let no minor of ``A``
vanish. Then for almost all ``Λ`` and ``Γ``

    rank(ΔW) = min(n r, p).

So ``n = ceil(p / r)`` bases, the default, give full rank, whatever ``r``. Fewer limit the rank to
``n r``. (The proof is in ``docs/theorem.md``.) With ``train_a``, ``A`` is trained too. That changes
nothing here: for almost all ``A`` no minor vanishes.

What makes the theorem apply:

1. ``B`` has full rank, for every kind of this package. Small draws of ±1 and 0 are often singular,
   so the bank corrects their diagonal, and refuses what is too sparse for the correction to reach.
2. No minor of ``A`` vanishes: ``A`` is dense and continuous, even where ``B`` is neither.
3. Training leaves the exceptions at once. A layer starts from ``Γ = 0`` and a constant ``Λ``, where
   ``ΔW = 0``. One optimiser step on at least ``p`` tokens makes it full rank. In this step the
   gradient of a trained ``A`` is 0, because ``Γ = 0``.

What fails otherwise: a constant ``Γ`` gives rank ``r``; a sparse ``A`` has zero columns, which are
zero columns of ``ΔW``; a first step on a few tokens gives a rank in proportion to them.

The tests follow this order. A rank is the number of singular values above rounding, always of a
matrix in float64.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora import BasisBank, RandLoRALinear, adapter_parameters, rank_report, reference
from randlora.bases.peft_rule import PeftBank
from randlora.bases.streams import KINDS, PRIME, pivots
from randlora.functional import delta_weight
from randlora.modules.weight_update import A_START
from tests.support import cases

EPS = torch.finfo(torch.float64).eps
OPTIMISERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def rank(matrix):
    """The number of singular values that are larger than the rounding of the largest."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > max(matrix.shape) * EPS * values[0]).sum())


def randomised(layer):
    """Fill all that a layer trains with random numbers, and return the layer."""
    for parameter in adapter_parameters(layer):
        torch.nn.init.normal_(parameter)
    return layer


def step(layer, optimiser, tokens):
    """Do one optimiser step on a random regression with this many tokens."""
    x = torch.randn(tokens, layer.in_features, dtype=torch.float64)
    target = torch.randn(tokens, layer.out_features, dtype=torch.float64)
    chosen = OPTIMISERS[optimiser](adapter_parameters(layer), lr=1e-2)
    (layer(x) - target).square().mean().backward()
    chosen.step()


# --- the theorem ---------------------------------------------------------------------------------


@given(cases.cases())
def test_rank_is_that_of_the_bases_for_generic_parameters(c):
    """``min(n r, p)``, for any kind, seed, shape, rank and number of bases."""
    a, b = c.operands()
    delta = delta_weight(c.lam, c.gamma, a, b, scaling=c.scaling, wide=c.wide)
    assert rank(delta) == min(c.n * c.r, c.p)


@given(cases.banks(), st.integers(1, 48), st.integers(1, 48), st.booleans(), st.data())
def test_rank_is_full_with_the_default_number_of_bases(
    bank, out_features, in_features, train_a, data
):
    p = min(out_features, in_features)
    keywords = {"rank": data.draw(st.integers(1, p)), "bank": bank, "train_a": train_a}
    layer = randomised(RandLoRALinear(in_features, out_features, **keywords).double())
    assert layer.num_bases == -(-p // layer.rank)
    assert rank(layer.delta_weight(torch.float64)) == p


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", [(512, 512), (640, 300), (300, 640)])
def test_rank_is_full_at_hundreds_of_columns(kind, shape):
    layer = randomised(RandLoRALinear(*shape, rank=7, bank=BasisBank(kind, seed=1)))
    assert rank(layer.delta_weight(torch.float64)) == min(shape)


def test_a_very_sparse_layer_far_smaller_than_its_bank_is_full_rank_too():
    """At s = 200 a 20 x 20 draw is nearly empty: only the corrected diagonal gives full rank."""
    bank = BasisBank("very_sparse", sparsity=200)
    assert (bank.b(20, 20) == 0).double().mean() > 0.9
    layer = RandLoRALinear(20, 20, rank=3, bank=bank).double()
    step(layer, "sgd", tokens=30)
    assert rank(layer.delta_weight(torch.float64)) == 20


# --- 1. B has full rank --------------------------------------------------------------------------


@given(cases.banks(), st.integers(1, 96), st.integers(1, 96))
def test_every_b_has_full_rank(bank, q, m):
    assert rank(bank.b(q, m, torch.float64)) == min(q, m)


@given(cases.banks(), st.integers(1, 96))
def test_leading_minors_are_not_zero(bank, size):
    """The reason for full rank, tested exactly: integer elimination modulo the rule's prime."""
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
    """Full rank at sizes up to `pivots` and beyond, also around 64, the block of elimination."""
    bank = BasisBank("sparse", seed=5, sparsity=sparsity)
    size = pivots(sparsity) + 40
    b = bank.b(size, size).double()
    for k in (1, 2, 63, 64, 65, pivots(sparsity), size):
        assert rank(b[:k, :k]) == k


def test_without_the_rule_small_sign_bases_are_singular(monkeypatch):
    """Why the rule is there: half of all 2 x 2 sign matrices are singular."""
    monkeypatch.setattr("randlora.bases.bank.set_pivots", lambda signs: None)
    ranks = [rank(BasisBank("binary", seed=s).b(2, 2)) for s in range(100)]
    assert 30 < sum(rank == 1 for rank in ranks) < 70


def test_what_is_too_sparse_for_full_rank_is_refused():
    """The rule does not reach blocks this large, in which an empty column is likely."""
    BasisBank("sparse", sparsity=1000).reserve(1, 1, 14336, 4096)
    BasisBank("sparse", sparsity=1e6).reserve(1, 1, 2048, 2048)  # no larger than the pivots
    with pytest.raises(ValueError, match=r"sparsity must be smaller .* 4096 x 4096: with 1000, 1 "):
        BasisBank("sparse", sparsity=1000).reserve(1, 1, 4096, 4096)


# --- 2. no minor of A vanishes -------------------------------------------------------------------


@given(cases.banks(), st.integers(1, 4), st.integers(1, 7))
def test_no_minor_of_a_vanishes(bank, r, p):
    """All square submatrices of ``A``, of every order, are invertible."""
    a = bank.a(r, p).double()
    for order in range(1, min(r, p) + 1):
        places = itertools.product(
            itertools.combinations(range(r), order), itertools.combinations(range(p), order)
        )
        blocks = torch.stack([a[list(rows)][:, list(columns)] for rows, columns in places])
        values = torch.linalg.svdvals(blocks)
        assert (values[:, -1] > order * EPS * values[:, 0]).all()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_is_dense_and_continuous_whatever_the_kind(kind):
    a = BasisBank(kind, seed=2).a(4, 5000)
    assert (a != 0).all()
    assert len(a.abs().unique()) > 10_000


# --- 3. training leaves the exceptions at once ---------------------------------------------------


@given(
    cases.banks(),
    st.integers(1, 48),
    st.integers(1, 48),
    st.sampled_from(sorted(OPTIMISERS)),
    st.booleans(),
    st.data(),
)
def test_one_optimiser_step_makes_it_full(
    bank, out_features, in_features, optimiser, train_a, data
):
    """The rank is 0 before the step and full after it. `rank_report` says so too."""
    p = min(out_features, in_features)
    keywords = {"rank": data.draw(st.integers(1, p)), "bank": bank, "train_a": train_a}
    layer = RandLoRALinear(in_features, out_features, **keywords).double()
    assert rank(layer.delta_weight(torch.float64)) == 0
    step(layer, optimiser, tokens=p + 1)
    assert rank(layer.delta_weight(torch.float64)) == p
    assert rank_report(layer).layers[0].rank == p


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("shape", [(60, 48), (48, 60)])
def test_a_trained_a_starts_as_a_part_of_the_shared_one_and_moves_from_the_second_step_on(
    shape, optimiser
):
    layer = RandLoRALinear(*shape, rank=4, train_a=True).double()
    assert torch.equal(layer.randlora_a, A_START * layer.bank.a(4, 48).double())
    for numbers in (0, 4 * 48):
        step(layer, optimiser, tokens=64)
        assert layer.randlora_a.grad.count_nonzero() == numbers
        assert rank(layer.delta_weight(torch.float64)) == 48


@given(cases.banks(), st.integers(1, 48), st.integers(1, 48), st.data())
def test_a_constant_lambda_is_no_exception(bank, out_features, in_features, data):
    """The first step keeps ``Λ`` constant: its gradient is zero while ``Γ`` is zero."""
    p = min(out_features, in_features)
    r = data.draw(st.integers(1, p))
    layer = RandLoRALinear(in_features, out_features, rank=r, bank=bank).double()
    torch.nn.init.normal_(layer.randlora_gamma)
    assert len(layer.randlora_lambda.unique()) == 1
    assert rank(layer.delta_weight(torch.float64)) == p


@pytest.mark.parametrize("kind", cases.KINDS)
def test_half_of_the_bases_give_half_of_the_rank(kind):
    layer = RandLoRALinear(96, 128, rank=6, num_bases=8, bank=BasisBank(kind)).double()
    step(layer, "adamw", tokens=128)
    assert rank(layer.delta_weight(torch.float64)) == 48
    assert rank_report(layer).layers[0].rank == 48


# --- what fails otherwise ------------------------------------------------------------------------


@given(cases.cases())
def test_a_constant_gamma_gives_rank_r(c):
    """With ``Γ_j = γ_j I``, ``ΔW`` is ``(Σ_j γ_j B_j Λ_j) A``, for any number of bases."""
    a, b = c.operands()
    constant = c.gamma[:, :1].expand_as(c.gamma)
    assert rank(delta_weight(c.lam, constant, a, b, scaling=c.scaling, wide=c.wide)) == c.r


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_constant_gamma_would_start_at_rank_r(optimiser):
    """The reason to start from Γ = 0 and Λ constant. PEFT starts from Λ = 0 and Γ constant."""
    ranks = {}
    for start in ("ours", "other"):
        layer = RandLoRALinear(96, 96, rank=6).double()
        if start == "other":
            torch.nn.init.zeros_(layer.randlora_lambda)
            torch.nn.init.constant_(layer.randlora_gamma, 1 / 96)
        step(layer, optimiser, tokens=128)
        ranks[start] = rank(layer.delta_weight(torch.float64))
    assert ranks == {"ours": 96, "other": 6}


def test_a_sparse_a_would_break_it():
    """A zero column of A is a zero column of ΔW.

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


@pytest.mark.parametrize("kind", ["peft", "peft_sparse", "peft_very_sparse"])
def test_of_the_bases_of_peft_only_the_dense_ones_give_full_rank(kind):
    """In PEFT's sparse kinds, ``A`` is sparse like ``B``."""
    bank = PeftBank(kind, rank=4, smaller=96, larger=128)
    layer = randomised(RandLoRALinear(128, 96, rank=4, bank=bank).double())
    zero_columns = int((bank.a(4, 96) == 0).all(0).sum())
    assert (zero_columns > 0) == (kind != "peft")
    assert rank(layer.delta_weight(torch.float64)) == 96 - zero_columns


@given(cases.banks(), st.integers(1, 48), st.integers(1, 48), st.integers(1, 4), st.integers(1, 5))
def test_a_first_step_on_few_tokens_gives_a_small_rank(bank, out_features, in_features, r, tokens):
    """After one SGD step, the rank is at most ``r (r + 1) / 2`` for each token.

    The gradient of Γ for one token ``x, dy`` makes column ``c`` of ΔW, if tall, a multiple of
    ``Σ_j B_j (A_c A_cᵀ) B_jᵀ dy``. This is linear in the symmetric ``r × r`` matrix ``A_c A_cᵀ``,
    and these matrices have ``r (r + 1) / 2`` dimensions.
    """
    p = min(out_features, in_features)
    r = min(r, p)
    layer = RandLoRALinear(in_features, out_features, rank=r, bank=bank).double()
    step(layer, "sgd", tokens)
    assert rank(layer.delta_weight(torch.float64)) <= min(p, tokens * r * (r + 1) // 2)


@pytest.mark.parametrize("shape", [(48, 48), (60, 48), (48, 60)])
@pytest.mark.parametrize(("r", "tokens"), [(1, 1), (1, 30), (2, 1), (2, 5), (3, 2), (3, 7), (4, 4)])
def test_the_small_rank_of_a_first_step_is_in_proportion_to_its_tokens(shape, r, tokens):
    """If there are many more bases than ``r``, the rank is equal to the bound above."""
    layer = RandLoRALinear(*shape, rank=r, bank=BasisBank(seed=1)).double()
    step(layer, "sgd", tokens)
    assert rank(layer.delta_weight(torch.float64)) == tokens * r * (r + 1) // 2
