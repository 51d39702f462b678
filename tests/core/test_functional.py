"""The linear map and its gradients against the oracle and finite differences, in float64."""

import itertools
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora import BasisBank, Choice, reference
from randlora.core.gather import GatherOperator
from randlora.core.planning import Work, plans
from randlora.core.update import FactoredUpdate
from randlora.functional import delta_weight, effective_weight, randlora_linear
from tests.support import cases
from tests.support.cases import assert_close, case
from tests.support.oracle import EXACT, SHAPES, agree, linear_agrees, run

BY_WEIGHT = Choice("weight", "weight", "weight")


def masks(k):
    return list(itertools.product([False, True], repeat=k))


# Which of x, weight, bias, Λ, Γ and A need gradients. For A, all or none of the first three do.
MASKS = [(*mask, False) for mask in masks(5)]
MASKS += [(*3 * [mask[0]], *mask[1:], True) for mask in masks(3)]


@given(cases.cases())
def test_delta_weight_and_its_gradients_are_the_oracle_s(c):
    def fast(b, lam, gamma, a):
        return delta_weight(lam, gamma, a, b, scaling=c.scaling, wide=c.wide)

    def slow(b, lam, gamma, a):
        return reference.delta_weight(a, b, lam, gamma, scaling=c.scaling, wide=c.wide)

    agree(c, fast, slow, [c.lam, c.gamma, c.a])


@given(cases.cases())
def test_linear_and_all_its_gradients_are_the_oracle_s(c):
    linear_agrees(c)


@given(cases.cases(), st.booleans(), st.booleans())
def test_every_plan_gives_what_the_oracle_gives(c, needs_weight, tiled):
    """For every plan, in one piece or in tiles of columns."""
    needed = [True, needs_weight, True, True, True, True]
    work = Work(
        tokens=1, p=c.p, q=c.q, m=c.n * c.r, n=c.n, wide=c.wide, needs_weight=needs_weight
    )  # fmt: skip

    def slow(b, x, weight, bias, lam, gamma, a):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=c.scaling)

    leaves = [c.x, c.weight, c.bias, c.lam, c.gamma, c.a]
    (_, operator), (_, dense) = c.operands(), c.bases()
    probe = torch.randn(*c.x.shape[:-1], c.out_features, dtype=torch.float64)
    want = run(slow, dense, leaves, probe, needed)
    sizes = run(slow, dense.abs(), [t.abs() for t in leaves], probe.abs(), needed)
    for plan in plans(work):

        def fast(b, x, weight, bias, lam, gamma, a, plan=plan):
            choice = Choice(**asdict(plan))
            return randlora_linear(
                x, weight, bias, lam, gamma, a, b, scaling=c.scaling, choice=choice
            )

        with pytest.MonkeyPatch.context() as patch:
            if tiled:
                patch.setattr("randlora.core.update.tile_width", lambda *_: 7)
            got = run(fast, operator, leaves, probe, needed)
        for one, other, size in zip(got, want, sizes, strict=True):
            assert_close(one, other, EXACT, size)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_every_plan_can_be_differentiated_twice_while_the_weight_is_trained(shape):
    inputs = linear_inputs(shape, [True] * 6, bias=True)
    out_features, in_features, r = SHAPES[shape]
    p, q = sorted((out_features, in_features))
    m, wide = -(-p // r) * r, out_features < in_features
    for plan in plans(Work(tokens=6, p=p, q=q, m=m, n=m // r, wide=wide, needs_weight=True)):
        choice = Choice(**asdict(plan))

        def fn(*inputs, choice=choice):
            *tensors, b, scaling = inputs
            return randlora_linear(*tensors, b, scaling=scaling, choice=choice)

        assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_plan_gives_the_gradients_of_every_mask(shape, tiled, gather, monkeypatch):
    if tiled:
        monkeypatch.setattr("randlora.core.update.tile_width", lambda *_: 2)
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank("sparse", seed=3), out_features, in_features, r, n, lead=(2, 3))
    leaves = [c.x, c.weight, c.bias, c.lam, c.gamma, c.a]
    probe = torch.randn(2, 3, out_features, dtype=torch.float64)

    def slow(b, x, weight, bias, lam, gamma, a):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=c.scaling)

    (_, operator), (_, dense) = c.operands(), c.bases()
    if gather:
        operator = GatherOperator(operator.entries, operator.scale, torch.float64)
    for mask in MASKS:
        if not any(mask):
            continue
        want = run(slow, dense, leaves, probe, mask)
        sizes = run(slow, dense.abs(), [t.abs() for t in leaves], probe.abs(), mask)
        work = Work(
            tokens=6, p=c.p, q=c.q, m=n * r, n=n, wide=c.wide, needs_input=mask[0],
            needs_weight=mask[1], needs_parameters=any(mask[3:]),
        )  # fmt: skip
        for plan in plans(work):

            def fast(b, x, weight, bias, lam, gamma, a, plan=plan):
                choice = Choice(**asdict(plan))
                return randlora_linear(
                    x, weight, bias, lam, gamma, a, b, scaling=c.scaling, choice=choice
                )

            got = run(fast, operator, leaves, probe, mask)
            for one, other, size in zip(got, want, sizes, strict=True):
                assert_close(one, other, EXACT, size)


def test_the_knob_bounds_the_tiles(monkeypatch):
    c = case(BasisBank(seed=1), 600, 400, 8, 50)
    a, b = c.operands()
    whole = randlora_linear(c.x, c.weight, c.bias, c.lam, c.gamma, a, b, choice=BY_WEIGHT)
    monkeypatch.setattr("randlora.core.machine.TRANSIENT_BYTES", 600 * 8 * 150)
    update = FactoredUpdate(c.lam, c.gamma, a, b, 1.0, wide=False)
    assert [t.stop - t.start for t in update.tiles()] == [133, 133, 134]  # not 150, 150, 100
    tiled = randlora_linear(c.x, c.weight, c.bias, c.lam, c.gamma, a, b, choice=BY_WEIGHT)
    assert_close(tiled, whole, 1e-12)


@given(cases.cases())
def test_the_update_alone_is_the_oracle_s(c):
    def slow(b, x, lam, gamma, a):
        delta = reference.delta_weight(a, b, lam, gamma, scaling=c.scaling, wide=c.wide)
        return x @ delta.T

    for plan in plans(Work(tokens=1, p=c.p, q=c.q, m=c.n * c.r, n=c.n, wide=c.wide)):

        def fast(b, x, lam, gamma, a, plan=plan):
            choice = Choice(**asdict(plan))
            return randlora_linear(
                x, None, None, lam, gamma, a, b, scaling=c.scaling, choice=choice
            )

        agree(c, fast, slow, [c.x, c.lam, c.gamma, c.a])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse", "isometric"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_plan_passes_gradgradcheck(shape, kind, tiled, monkeypatch):
    if tiled:
        monkeypatch.setattr("randlora.core.update.tile_width", lambda *_: 2)
    *inputs, b, scaling = linear_inputs(
        shape, [True, False, True, True, True, True], bias=True, kind=kind
    )
    if kind == "very_sparse":
        b = GatherOperator(b.entries, b.scale, torch.float64)
    inputs = (*inputs, b, scaling)
    out_features, in_features, r = SHAPES[shape]
    p, q = sorted((out_features, in_features))
    n, wide = -(-p // r), out_features < in_features
    for plan in plans(Work(tokens=6, p=p, q=q, m=n * r, n=n, wide=wide)):
        choice = Choice(**asdict(plan))

        def fn(*inputs, choice=choice):
            *tensors, b, scaling = inputs
            return randlora_linear(*tensors, b, scaling=scaling, choice=choice)

        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)  # in a random direction


def linear_inputs(shape, mask, *, bias, kind="dense"):
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=3), out_features, in_features, r, n, lead=(2, 3))
    tensors = [c.x, c.weight, c.bias if bias else None, c.lam, c.gamma, c.a]
    for tensor, needed in zip(tensors, mask, strict=True):
        if tensor is not None:
            tensor.requires_grad_(needed)
    _, b = c.operands()
    return (*tensors, b, c.scaling)


def call(x, weight, bias, lam, gamma, a, b, scaling):
    return randlora_linear(x, weight, bias, lam, gamma, a, b, scaling=scaling)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_passes_gradcheck_for_every_mask(shape, mask):
    if any(mask):
        assert torch.autograd.gradcheck(call, linear_inputs(shape, mask, bias=True))
    else:
        assert not call(*linear_inputs(shape, mask, bias=True)).requires_grad


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_linear_without_bias_passes_gradcheck_for_every_kind(shape, kind):
    mask = [True, True, False, True, True, True]
    assert torch.autograd.gradcheck(call, linear_inputs(shape, mask, bias=False, kind=kind))


@pytest.mark.parametrize("kind", ["dense", "sparse", "isometric"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_can_be_differentiated_twice(shape, kind):
    inputs = linear_inputs(shape, [True] * 6, bias=True, kind=kind)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("mask", masks(3), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_delta_weight_passes_gradcheck_for_every_mask(shape, mask):
    _, _, _, lam, gamma, a, b, scaling = linear_inputs(shape, [False] * 3 + [*mask], bias=True)
    out_features, in_features, _ = SHAPES[shape]

    def fn(lam, gamma, a):
        wide = out_features < in_features
        return delta_weight(lam, gamma, a, b, scaling=scaling, wide=wide)

    if any(mask):
        assert torch.autograd.gradcheck(fn, (lam, gamma, a))
        assert torch.autograd.gradgradcheck(fn, (lam, gamma, a))
    else:
        assert not fn(lam, gamma, a).requires_grad


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([False, False, False, True, True, False], {"x", "lam", "gamma"}),
        ([True, False, False, True, True, False], {"x", "weight", "lam", "gamma"}),
        ([True, False, False, False, False, False], {"weight", "lam", "gamma"}),
        ([False, False, True, False, False, False], {"lam", "gamma"}),
        ([False, False, False, False, False, True], {"x", "lam", "gamma", "a"}),
        ([True, False, False, True, True, True], {"x", "weight", "lam", "gamma", "a"}),
    ],
)
@pytest.mark.parametrize("read", [False, True])
def test_only_inputs_are_saved_and_only_the_needed_ones(mask, expected, read):
    """Hooks on saved tensors, of checkpoints for example, see no frozen base."""
    inputs = linear_inputs("tall", mask, bias=True)
    pointers = [t.data_ptr() for t in inputs[:6]]
    names = dict(zip(pointers, ["x", "weight", "bias", "lam", "gamma", "a"], strict=True))
    saved = set()

    def pack(tensor):
        saved.add(names.get(tensor.untyped_storage().data_ptr(), "something else"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if read:
            effective_weight(*inputs[1:2], *inputs[3:7])
        else:
            call(*inputs)
    if not read:
        assert saved == expected
    elif any(mask[3:]):
        assert saved == {"lam", "gamma", *expected} - {"x", "weight"}
    else:
        assert not saved


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("view", ["transposed", "expanded", "strided"])
def test_inputs_and_gradients_need_not_be_contiguous(shape, view):
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(seed=1), out_features, in_features, r, n, lead=(4, 6))
    x = {
        "transposed": c.x.transpose(0, 1),
        "expanded": c.x[:1].expand(4, -1, -1),
        "strided": c.x[:, ::2],
    }[view]
    assert not x.is_contiguous()
    a, b = c.operands()
    dense_a, dense_b = c.bases()
    probe = torch.randn(out_features, *x.shape[:-1], dtype=torch.float64).movedim(0, -1)
    assert not probe.is_contiguous()

    def fast(x, lam):
        return randlora_linear(x, c.weight, c.bias, lam, c.gamma, a, b)

    def slow(x, lam):
        return reference.linear(x, c.weight, c.bias, dense_a, dense_b, lam, c.gamma)

    leaf = x.detach().requires_grad_()
    lam = c.lam.clone().requires_grad_()
    got = torch.autograd.grad((fast(leaf, lam) * probe).sum(), [leaf, lam])
    want = torch.autograd.grad((slow(leaf, lam) * probe).sum(), [leaf, lam])
    for one, other in zip(got, want, strict=True):
        assert_close(one, other, EXACT)


@given(st.sampled_from(["tall", "wide"]), st.integers(0, 3))
def test_no_tokens_give_zero_gradients(shape, extra):
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    lead = (0,) + (2,) * extra
    c = case(BasisBank(), out_features, in_features, r, n, lead=lead)
    a, b = c.operands()
    lam = c.lam.requires_grad_()
    y = randlora_linear(c.x, c.weight, c.bias, lam, c.gamma, a, b)
    assert y.shape == (*lead, out_features)
    (grad,) = torch.autograd.grad(y.sum(), lam)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_mismatches_are_refused_by_name():
    c = case(BasisBank(), 6, 4, 2, 2)
    a, b = c.operands()
    with pytest.raises(ValueError, match=r"gamma must have shape \(2, 4\).* got \(3, 4\)"):
        delta_weight(c.lam, torch.zeros(3, 4).double(), a, b)
    with pytest.raises(ValueError, match=r"a must have shape \(2, 4\).* got \(2, 3\)"):
        delta_weight(c.lam, c.gamma, a[:, :3], b)
    with pytest.raises(ValueError, match=r"b must have shape \(6, 2\).* got \(6, 4\)"):
        delta_weight(c.lam[:1], c.gamma[:1], a, b)
    with pytest.raises(ValueError, match="bias must be None without a weight"):
        randlora_linear(c.x, None, c.bias, c.lam, c.gamma, a, b)
    with pytest.raises(TypeError, match=r"choice must be a planning\.Choice, got str"):
        randlora_linear(c.x, c.weight, None, c.lam, c.gamma, a, b, choice="weight")
    with pytest.raises(ValueError, match=r"weight of shape \(7, 4\) does not fit"):
        randlora_linear(c.x, torch.zeros(7, 4).double(), None, c.lam, c.gamma, a, b)
    with pytest.raises(ValueError, match=r"input x must have shape \(\.\.\., 4\), got \(7, 3\)"):
        randlora_linear(c.x[:, :3], c.weight, None, c.lam, c.gamma, a, b)
    with pytest.raises(TypeError, match=r"input x must be a tensor of torch.float64, got .*32"):
        randlora_linear(c.x.float(), c.weight, None, c.lam, c.gamma, a, b)
