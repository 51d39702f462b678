"""The cost of a plan equals the multiply-adds that are done, and which plan is chosen."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from randlora import BasisBank, Choice
from randlora.core.planning import Plan, Work, choose, cost, plans, saved_numel
from randlora.functional import randlora_linear
from tests.support import cases

sizes = st.integers(1, 5000)


@st.composite
def works(draw) -> Work:
    p, q = sorted((draw(sizes), draw(sizes)))
    return Work(
        tokens=draw(st.integers(0, 20_000)),
        p=p,
        q=q,
        m=(n := draw(st.integers(1, p))) * draw(st.integers(1, -(-p // n))),
        n=n,
        wide=draw(st.booleans()),
        needs_input=draw(st.booleans()),
        needs_parameters=draw(st.booleans()),
        needs_weight=draw(st.booleans()),
        alone=draw(st.booleans()),
        weight_cost=draw(st.integers(10, 1000)),
        token_cost=draw(st.integers(10, 1000)),
        half=draw(st.sampled_from([0, p, q])),
        half_token_cost=draw(st.integers(1, 500)),
        half_weight_cost=draw(st.integers(1, 500)),
        balance=draw(st.sampled_from([0, 260_000, 520_000])),
    )


def products(work, plan):
    """The products that a plan takes beyond the frozen layer's, by name. Each counts once."""
    made = []
    made.append("B C" if plan.forward == "weight" else "forward small")
    if plan.forward == "activations" and not work.wide:
        made.append("H B'")
    if work.wide and (plan.forward == "activations" or (plan.keeps == "xb" and not plan.halves)):
        made.append("x B")
    if work.needs_input:
        if plan.grad_input == "activations":
            made += ["input small", "K B'" if work.wide else "dy B"]
        elif not plan.keep_weight:
            made.append("B C again")
    if work.needs_parameters:
        if plan.grad_parameters == "weight":
            made += ["G", "B' G"]
        else:
            made += ["P small", "dy B" if not work.wide else "x B"]
            if work.wide and plan.keeps == "x":
                made[-1] = "x B again"
            if plan.halves:
                made[-2:] = ["half of tokens", "P from half", "half of P"]
    if work.needs_weight:
        made.append("G")
    if work.alone:
        made += ["x W"] * (plan.forward == "weight")
        made += ["dy W"] * (work.needs_input and plan.grad_input == "weight")
    return set(made)


def price(work, product):
    """The larger of the multiply-adds and the numbers moved: both arguments, and the result.

    ``C`` is written before it is read, and ``P`` is read after it is written.
    """
    t, p, q, m = work.tokens, work.p, work.q, work.m
    if product.startswith("B C"):  # C, C, W0, W0 + ΔW
        multiplied = work.weight_cost * m * q * p
        moved = m * p + m * p + q * p + q * p + 2 * work.half * p  # between two factors
    elif product == "B' G":  # G, P, P
        multiplied = work.weight_cost * m * q * p
        moved = q * p + m * p + m * p + 2 * work.half * p
    elif product == "P small" and 8 * t <= min(work.n, 64):  # as below, for Λ and for Γ
        return 2 * price(work, "forward small")
    elif product.endswith("small") and 2 * t <= min(work.n, 64) and product != "P small":
        a_x = t * (m // work.n) * p  # A ∘ x is written and read; Γ is read
        multiplied, moved = 1000 * t * m * p, t * m + t * p + a_x + a_x + work.n * p
    elif product.endswith("small"):
        multiplied, moved = 1000 * t * m * p, t * m + t * p + m * p + m * p
    elif product == "half of tokens":
        multiplied, moved = work.half_token_cost * m * q * t, t * q + t * work.half
    elif product == "half of P":
        multiplied, moved = work.half_weight_cost * m * q * p, work.half * p + m * p + m * p
    elif product == "P from half":
        h = work.half
        multiplied, moved = 1000 * t * h * p, t * h + t * p + h * p
    elif product in ("G", "x W", "dy W"):
        multiplied, moved = 1000 * t * p * q, t * p + t * q + p * q
    else:
        multiplied = work.token_cost * m * q * t
        moved = t * m + t * q + 2 * work.half * t
    return max(multiplied, work.balance * moved)


@given(works())
def test_the_cost_is_the_sum_of_the_products(work):
    for plan in plans(work):
        assert cost(work, plan) == sum(price(work, product) for product in products(work, plan))


@given(works())
def test_the_choice_is_that_of_brute_force(work):
    """Of all plans within 1/64 of the whole work of the cheapest, the one that keeps least."""
    everything = []
    for ways in itertools.product(("weight", "activations"), repeat=3):
        for keeps, halves in itertools.product(("x", "xb"), (False, True)):
            plan = Plan(*ways, keeps=keeps, halves=halves)
            if halves and (
                not work.half
                or plan.grad_parameters == "weight"
                or (work.wide and plan.forward == "activations" and keeps == "xb")
                or (not work.wide and plan.grad_input == "activations")
            ):
                continue
            if keeps == "xb" and (
                not work.wide or work.needs_weight or plan.grad_parameters == "weight"
            ):
                continue
            if plan.grad_input == "activations" and not work.needs_input:
                continue
            if plan.grad_parameters == "activations" and not work.needs_parameters:
                continue
            total = sum(price(work, product) for product in products(work, plan))
            x = (work.q if work.wide else work.p) * (work.needs_parameters or work.needs_weight)
            xb = work.half if halves else work.m
            everything.append((work.tokens * (xb if keeps == "xb" else x), total))
    least = min(total for _, total in everything)
    own = 0 if work.alone else price(work, "G") * (1 + work.needs_input)
    best = min(entry for entry in everything if 64 * (entry[1] - least) <= own + least)
    plan = choose(work)
    assert (saved_numel(work, plan), cost(work, plan)) == best


@given(works(), st.sampled_from(["forward", "grad_input", "grad_parameters"]), st.data())
def test_what_is_fixed_is_kept_to_and_the_rest_is_best(work, name, data):
    way = data.draw(st.sampled_from(["weight", "activations"]))
    plan = choose(work, Choice(**{name: way}))
    possible = [p for p in plans(work) if getattr(p, name) == way and not p.keep_weight]
    if possible:
        assert plan in possible
        least = min(cost(work, p) for p in possible)
        own = 0 if work.alone else price(work, "G") * (1 + work.needs_input)
        good = [p for p in possible if 64 * (cost(work, p) - least) <= own + least]
        assert saved_numel(work, plan) == min(saved_numel(work, p) for p in good)


def test_small_and_large_batches_go_different_ways():
    few = Work(tokens=50, p=768, q=768, m=768, n=128, wide=False)
    many = few._replace(tokens=5000)
    assert choose(few).forward == "activations"
    assert choose(few).grad_parameters == "activations"
    assert choose(many).forward == "weight"
    cheap = many._replace(q=3072, weight_cost=80, token_cost=160)
    assert choose(cheap).grad_parameters == "activations"


def test_a_wide_layer_keeps_the_smaller_activation():
    work = Work(tokens=3200, p=768, q=3072, m=768, n=128, wide=True)
    assert choose(work).keeps == "xb"
    assert saved_numel(work, choose(work)) == 3200 * 768


def test_one_half_is_kept_of_x_b():
    work = Work(tokens=30, p=8, q=12, m=8, n=4, wide=True, half=10)
    plan = Plan("weight", "weight", "activations", "xb", halves=True)
    assert plan in plans(work)
    assert saved_numel(work, plan) == 30 * 10


def test_the_weight_is_kept_only_on_request():
    work = Work(tokens=3200, p=768, q=768, m=768, n=128, wide=False)
    assert not choose(work).keep_weight
    assert choose(work, Choice(keep_weight=True)).keep_weight
    assert choose(work, Choice(keep_weight=None)).keep_weight
    few = work._replace(tokens=20)
    assert not choose(few, Choice(keep_weight=None)).keep_weight


@pytest.mark.parametrize(
    "keywords",
    [{"forward": "fast"}, {"grad_input": 1}, {"keeps": "y"}, {"keep_weight": 2}, {"halves": 2}],
)
def test_bad_choices_are_refused(keywords):
    (name,) = keywords
    with pytest.raises(ValueError, match=f"{name} must be"):
        Choice(**keywords)


def addmm(total, one, other, *_, **__):
    """Multiply-adds of the in-place ``addmm_``, which torch's counter does not count."""
    return 2 * one[0] * one[1] * other[1]


MASKS = [
    (True, False, False, True, False),
    (False, False, False, True, False),
    (True, False, False, False, False),
    (True, True, True, True, False),
    (True, False, False, True, True),
    (True, False, False, False, True),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_kernel_multiplies_as_often_as_the_plan_costs(shape, mask):
    """Compare the cost model with a count of the multiply-adds of a real call."""
    out_features, in_features = shape
    c = cases.case(BasisBank(seed=1), out_features, in_features, 5, 4, lead=(17,))
    _, b = c.operands()
    needs = dict(zip(("x", "weight", "bias", "lam", "a"), mask, strict=True))
    leaves = {n: getattr(c, n).detach().clone().requires_grad_(on) for n, on in needs.items()}
    work = Work(
        tokens=17, p=24, q=max(shape), m=20, n=4, wide=c.wide,
        needs_input=mask[0], needs_weight=mask[1], needs_parameters=mask[3] or mask[4],
    )  # fmt: skip
    own = 17 * in_features * out_features * (1 + mask[0])
    reductions = 20 * 24 * (mask[3] + mask[4])  # dΛ and dA, from P
    for plan in plans(work):
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: addmm}
        ) as counter:
            y = randlora_linear(
                leaves["x"], leaves["weight"], leaves["bias"], leaves["lam"], c.gamma, leaves["a"],
                b, choice=Choice(**dataclasses.asdict(plan)),
            )  # fmt: skip
            y.sum().backward()
        done = counter.get_total_flops() // 2
        formed = 20 * 24 * (1 + (mask[0] and not plan.keep_weight))  # C, once for each product
        assert done == own + cost(work, plan) // 1000 + formed + reductions, plan


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_update_alone_multiplies_as_often_as_the_plan_costs(shape):
    out_features, in_features = shape
    c = cases.case(BasisBank(seed=1), out_features, in_features, 5, 4, lead=(17,))
    a, b = c.operands()
    x, lam = c.x.clone().requires_grad_(), c.lam.clone().requires_grad_()
    work = Work(tokens=17, p=24, q=max(shape), m=20, n=4, wide=c.wide, alone=True)
    mapping = {torch.ops.aten.addmm_: addmm}
    for plan in plans(work):
        choice = Choice(**dataclasses.asdict(plan))
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            randlora_linear(x, None, None, lam, c.gamma, a, b, choice=choice).sum().backward()
        formed = 20 * 24 * (1 + (not plan.keep_weight))
        assert counter.get_total_flops() // 2 == cost(work, plan) // 1000 + formed + 20 * 24, plan
