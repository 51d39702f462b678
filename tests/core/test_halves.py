"""``P`` from tokens in halves: one factor of ``B`` on tokens, the other on what they give."""

import itertools

import pytest
import torch
from torch import nn

from randlora import BasisBank, Choice, RandLoRALinear
from randlora.core.kronecker import KroneckerOperator
from randlora.core.operators import DenseOperator
from randlora.core.planning import choose, plans
from randlora.functional import randlora_linear, work_of
from tests.support.cases import assert_close, case
from tests.support.oracle import linear_agrees

# Isometric bases of these sizes have two factors, some with rows or columns cut; q, p and r.
SIZES = [(160, 160, 8), (320, 96, 6), (331, 160, 7), (180, 167, 5)]
HALVES = [
    Choice(forward, grad_input, "activations", keeps, keep_weight, halves=True)
    for forward, grad_input in itertools.product(("weight", "activations"), repeat=2)
    for keeps in ("x", "xb")
    for keep_weight in (False, True)
]


def cases_of(sizes, lead=(5, 70)):
    q, p, r = sizes
    for out, in_ in sorted({(q, p), (p, q)}):
        yield case(BasisBank("isometric", seed=2), out, in_, r, -(-p // r), lead=lead)


def plan_of(c, choice):
    a, b = c.operands()
    return choose(work_of(c.x.numel() // c.in_features, a, b, c.wide), choice)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_plan_gives_what_the_oracle_gives(sizes, tiled, monkeypatch):
    if tiled:
        monkeypatch.setattr("randlora.core.update.tile_width", lambda *_: 70)
    halved = 0
    for c in cases_of(sizes):
        for choice in HALVES:
            halved += plan_of(c, choice).halves
            linear_agrees(c, choice, needs_weight=False)
    assert halved


@pytest.mark.parametrize("sizes", SIZES)
def test_the_whole_is_its_halves(sizes):
    for c in cases_of(sizes):
        _, b = c.operands()
        q, k = b.shape[0], 9
        assert isinstance(b, KroneckerOperator)
        x, y, h = (torch.randn(k, size, dtype=torch.float64) for size in (q, 11, b.half))
        half = b.tokens_half(x)
        assert_close(b.half_tmm(half.T @ y), b.tmm(x.T @ y), 1e-13)
        total = torch.randn(k, q, dtype=torch.float64)
        got = ((b.half_addmm_(total.clone(), h) - total) * x).sum()
        assert_close(got, (half * h).sum(), 1e-12)
        strided = h.T.contiguous().T
        assert_close(b.half_addmm_(total.clone(), strided), b.half_addmm_(total.clone(), h), 1e-14)


def test_what_has_no_halves_is_whole():
    b = DenseOperator(torch.randn(6, 4, dtype=torch.float64))
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert torch.equal(b.tokens_half(x), b.tokens_mm(x))
    assert torch.equal(b.half_tmm(x.T @ y), x.T @ y)
    h = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(b.half_addmm_(x.clone(), h), b.tokens_addmm_(x.clone(), h))
    work = work_of(50, torch.empty(2, 5), b, False)
    assert not any(plan.halves for plan in plans(work))


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_every_plan_can_be_differentiated_twice(sizes):
    for c in cases_of(sizes, lead=(3,)):
        a, b = c.operands()
        leaves = [t.detach().requires_grad_() for t in (c.x, c.lam, c.gamma)]
        for choice in HALVES:

            def fn(x, lam, gamma, c=c, a=a, b=b, choice=choice):
                return randlora_linear(x, c.weight.detach(), None, lam, gamma, a, b, choice=choice)

            assert torch.autograd.gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(320, 96), (96, 320)])
def test_in_low_precision_it_is_as_near_as_the_whole(shape, dtype):
    torch.manual_seed(0)
    layer = RandLoRALinear(*shape, rank=6, bank=BasisBank("isometric"), dtype=dtype)
    nn.init.normal_(layer.randlora_gamma)
    x, dy = torch.randn(700, shape[0]).to(dtype), torch.randn(700, shape[1]).to(dtype)
    found = {}
    for halves in (False, True):
        layer.choice = Choice("weight", "weight", "activations", "x", halves=halves)
        assert layer.plan(700).halves == halves
        found[halves] = torch.autograd.grad(
            layer(x), list(layer.weight_update.parameters(layer)), dy
        )
    exact = layer.double()
    exact.choice = Choice("weight", "weight", "weight")
    wanted = torch.autograd.grad(
        exact(x.double()), list(exact.weight_update.parameters(exact)), dy.double()
    )
    for whole, half, want in zip(found[False], found[True], wanted, strict=True):
        errors = [(got.double() - want).norm() / want.norm() for got in (whole, half)]
        assert errors[1] < 2 * errors[0] + torch.finfo(dtype).eps / 8


def test_they_are_chosen_if_there_are_more_tokens_than_columns():
    layer = RandLoRALinear(768, 3072, rank=6, bank=BasisBank("isometric"))
    layer.choice = Choice("weight", "weight", "activations")
    assert layer.plan(20_000).halves
    assert not layer.plan(100).halves
    layer.choice = Choice("weight", "activations", "activations")  # dy B serves both gradients
    assert not layer.plan(20_000).halves
