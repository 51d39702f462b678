"""The kernel against the oracle and against finite differences, in float64."""

import itertools
from dataclasses import asdict
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from randlora import BasisBank, reference
from randlora.functional import delta_weight, effective_weight, randlora_linear
from randlora.kernel import _Update
from randlora.operators import GatherOperator
from randlora.planning import Choice, Work, plans
from tests import cases
from tests.cases import assert_close, case

# Some hundred roundings of float64, relative to the sum of the magnitudes of what is added up.
EXACT = 1e-13
BY_WEIGHT = Choice("weight", "weight", "weight")
MASKS = {k: list(itertools.product([False, True], repeat=k)) for k in (2, 5)}
SHAPES = {"tall": (7, 5, 2), "wide": (4, 6, 3), "square": (5, 5, 2), "one": (1, 1, 1)}


def run(fn, bases, leaves, probe, needed=None):
    """The value of ``fn`` and the gradients of its product with the probe."""
    needed = needed or [True] * len(leaves)
    leaves = [t.detach().clone().requires_grad_(n) for t, n in zip(leaves, needed, strict=True)]
    y = fn(*bases, *leaves)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), inputs)]


def agree(c, fast, slow, leaves):
    """``fast`` with the operators of the case is ``slow``, its oracle, with the dense bases."""
    probe = torch.randn(slow(*c.bases(), *leaves).shape, dtype=torch.float64)
    got = run(fast, c.operands(), leaves, probe)
    want = run(slow, c.bases(), leaves, probe)
    sizes = run(slow, [t.abs() for t in c.bases()], [t.abs() for t in leaves], probe.abs())
    for one, other, size in zip(got, want, sizes, strict=True):
        assert_close(one, other, EXACT, size)


@given(cases.cases())
def test_delta_weight_and_its_gradients_are_the_oracle_s(c):
    def fast(a, b, lam, gamma):
        return delta_weight(lam, gamma, a, b, scaling=c.scaling, wide=c.wide)

    def slow(a, b, lam, gamma):
        return reference.delta_weight(a, b, lam, gamma, scaling=c.scaling, wide=c.wide)

    agree(c, fast, slow, [c.lam, c.gamma])


@given(cases.cases())
def test_linear_and_all_its_gradients_are_the_oracle_s(c):
    def fast(a, b, x, weight, bias, lam, gamma):
        return randlora_linear(x, weight, bias, lam, gamma, a, b, scaling=c.scaling)

    def slow(a, b, x, weight, bias, lam, gamma):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=c.scaling)

    agree(c, fast, slow, [c.x, c.weight, c.bias, c.lam, c.gamma])


@given(cases.cases(), st.booleans(), st.booleans())
def test_every_plan_gives_what_the_oracle_gives(c, needs_weight, tiled):
    """Whatever plan the planner may return, in one piece or in tiles of columns."""
    needed = [True, needs_weight, True, True, True]
    work = Work(
        tokens=1, p=c.p, q=c.q, m=c.n * c.r, wide=c.wide, needs_weight=needs_weight
    )  # fmt: skip

    def slow(a, b, x, weight, bias, lam, gamma):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=c.scaling)

    leaves = [c.x, c.weight, c.bias, c.lam, c.gamma]
    probe = torch.randn(*c.x.shape[:-1], c.out_features, dtype=torch.float64)
    want = run(slow, c.bases(), leaves, probe, needed)
    sizes = run(slow, [t.abs() for t in c.bases()], [t.abs() for t in leaves], probe.abs(), needed)
    for plan in plans(work):

        def fast(a, b, x, weight, bias, lam, gamma, plan=plan):
            choice = Choice(**asdict(plan))
            return randlora_linear(
                x, weight, bias, lam, gamma, a, b, scaling=c.scaling, choice=choice
            )

        with pytest.MonkeyPatch.context() as patch:
            if tiled:
                patch.setattr("randlora.kernel.tile_width", lambda *_: 7)
            got = run(fast, c.operands(), leaves, probe, needed)
        for one, other, size in zip(got, want, sizes, strict=True):
            assert_close(one, other, EXACT, size)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_every_plan_can_be_differentiated_twice_while_the_weight_is_trained(shape):
    inputs = linear_inputs(shape, [True] * 5, bias=True)
    out_features, in_features, r = SHAPES[shape]
    p, q = sorted((out_features, in_features))
    m, wide = -(-p // r) * r, out_features < in_features
    for plan in plans(Work(tokens=6, p=p, q=q, m=m, wide=wide, needs_weight=True)):
        choice = Choice(**asdict(plan))

        def fn(*inputs, choice=choice):
            *tensors, a, b, scaling = inputs
            return randlora_linear(*tensors, a, b, scaling=scaling, choice=choice)

        assert torch.autograd.gradgradcheck(fn, inputs)


def test_gradients_of_low_precision_are_summed_in_that_of_the_parameters():
    """From P in bfloat16: exact to float32, where sums in bfloat16 would be off by a hundredth."""
    c = case(BasisBank(seed=2), 2000, 2000, 4, 3)
    a, b = c.operands(torch.bfloat16)
    lam, gamma = c.lam.float(), c.gamma.float()
    p = torch.randn(12, 2000).bfloat16()
    grads = _Update(lam, gamma, a, b, 1.0, wide=False).parameter_grads(
        p, slice(0, 2000), (True, True)
    )
    pa = p.double().view(3, 4, -1) * a.double()
    wants = (pa * gamma.double().unsqueeze(1)).sum(2), (pa * lam.double().unsqueeze(2)).sum(1)
    for got, want in zip(grads, wants, strict=True):
        assert got.dtype == torch.float32
        assert_close(got.double(), want, 1e-5)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_plan_gives_the_gradients_of_every_mask(shape, tiled, gather, monkeypatch):
    if tiled:
        monkeypatch.setattr("randlora.kernel.tile_width", lambda *_: 2)
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank("sparse", seed=3), out_features, in_features, r, n, lead=(2, 3))
    leaves = [c.x, c.weight, c.bias, c.lam, c.gamma]
    probe = torch.randn(2, 3, out_features, dtype=torch.float64)

    def slow(a, b, x, weight, bias, lam, gamma):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=c.scaling)

    a, b = c.operands()
    if gather:
        b = GatherOperator(b.entries, b.scale, torch.float64)
    for mask in MASKS[5]:
        if not any(mask):
            continue
        want = run(slow, c.bases(), leaves, probe, mask)
        sizes = run(
            slow, [t.abs() for t in c.bases()], [t.abs() for t in leaves], probe.abs(), mask
        )
        work = Work(
            tokens=6, p=c.p, q=c.q, m=n * r, wide=c.wide, needs_input=mask[0],
            needs_weight=mask[1], needs_parameters=mask[3] or mask[4],
        )  # fmt: skip
        for plan in plans(work):

            def fast(a, b, x, weight, bias, lam, gamma, plan=plan):
                choice = Choice(**asdict(plan))
                return randlora_linear(
                    x, weight, bias, lam, gamma, a, b, scaling=c.scaling, choice=choice
                )

            got = run(fast, (a, b), leaves, probe, mask)
            for one, other, size in zip(got, want, sizes, strict=True):
                assert_close(one, other, EXACT, size)


def test_the_knob_bounds_the_tiles(monkeypatch):
    c = case(BasisBank(seed=1), 600, 400, 8, 50)
    a, b = c.operands()
    whole = randlora_linear(c.x, c.weight, c.bias, c.lam, c.gamma, a, b, choice=BY_WEIGHT)
    monkeypatch.setattr("randlora.kernel.TRANSIENT_BYTES", 600 * 8 * 150)
    update = _Update(c.lam, c.gamma, a, b, 1.0, wide=False)
    assert [t.stop - t.start for t in update.tiles()] == [133, 133, 134]  # not 150, 150, 100
    tiled = randlora_linear(c.x, c.weight, c.bias, c.lam, c.gamma, a, b, choice=BY_WEIGHT)
    assert_close(tiled, whole, 1e-12)


@given(cases.cases())
def test_the_update_alone_is_the_oracle_s(c):
    def slow(a, b, x, lam, gamma):
        delta = reference.delta_weight(a, b, lam, gamma, scaling=c.scaling, wide=c.wide)
        return x @ delta.T

    for plan in plans(Work(tokens=1, p=c.p, q=c.q, m=c.n * c.r, wide=c.wide)):

        def fast(a, b, x, lam, gamma, plan=plan):
            choice = Choice(**asdict(plan))
            return randlora_linear(
                x, None, None, lam, gamma, a, b, scaling=c.scaling, choice=choice
            )

        agree(c, fast, slow, [c.x, c.lam, c.gamma])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse", "isometric"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_plan_passes_gradgradcheck(shape, kind, tiled, monkeypatch):
    if tiled:
        monkeypatch.setattr("randlora.kernel.tile_width", lambda *_: 2)
    *inputs, b, scaling = linear_inputs(
        shape, [True, False, True, True, True], bias=True, kind=kind
    )
    if kind == "very_sparse":
        b = GatherOperator(b.entries, b.scale, torch.float64)
    inputs = (*inputs, b, scaling)
    out_features, in_features, r = SHAPES[shape]
    p, q = sorted((out_features, in_features))
    for plan in plans(Work(tokens=6, p=p, q=q, m=-(-p // r) * r, wide=out_features < in_features)):
        choice = Choice(**asdict(plan))

        def fn(*inputs, choice=choice):
            *tensors, a, b, scaling = inputs
            return randlora_linear(*tensors, a, b, scaling=scaling, choice=choice)

        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True)  # in a random direction


def linear_inputs(shape, mask, *, bias, kind="dense"):
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=3), out_features, in_features, r, n, lead=(2, 3))
    tensors = [c.x, c.weight, c.bias if bias else None, c.lam, c.gamma]
    for tensor, needed in zip(tensors, mask, strict=True):
        if tensor is not None:
            tensor.requires_grad_(needed)
    a, b = c.operands()
    return (*tensors, a, b, c.scaling)


def call(x, weight, bias, lam, gamma, a, b, scaling):
    return randlora_linear(x, weight, bias, lam, gamma, a, b, scaling=scaling)


@pytest.mark.parametrize("mask", MASKS[5], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_passes_gradcheck_for_every_mask(shape, mask):
    if any(mask):
        assert torch.autograd.gradcheck(call, linear_inputs(shape, mask, bias=True))
    else:
        assert not call(*linear_inputs(shape, mask, bias=True)).requires_grad


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_linear_without_bias_passes_gradcheck_for_every_kind(shape, kind):
    mask = [True, True, False, True, True]
    assert torch.autograd.gradcheck(call, linear_inputs(shape, mask, bias=False, kind=kind))


@pytest.mark.parametrize("kind", ["dense", "sparse", "isometric"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_can_be_differentiated_twice(shape, kind):
    inputs = linear_inputs(shape, [True] * 5, bias=True, kind=kind)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("mask", MASKS[2], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_delta_weight_passes_gradcheck_for_every_mask(shape, mask):
    _, _, _, lam, gamma, a, b, scaling = linear_inputs(shape, [False] * 3 + [*mask], bias=True)
    out_features, in_features, _ = SHAPES[shape]

    def fn(lam, gamma):
        wide = out_features < in_features
        return delta_weight(lam, gamma, a, b, scaling=scaling, wide=wide)

    if any(mask):
        assert torch.autograd.gradcheck(fn, (lam, gamma))
        assert torch.autograd.gradgradcheck(fn, (lam, gamma))
    else:
        assert not fn(lam, gamma).requires_grad


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([False, False, False, True, True], {"x", "lam", "gamma"}),
        ([True, False, False, True, True], {"x", "weight", "lam", "gamma"}),
        ([True, False, False, False, False], {"weight", "lam", "gamma"}),
        ([False, False, True, False, False], {"lam", "gamma"}),
    ],
)
def test_only_inputs_are_saved_and_only_the_needed_ones(mask, expected):
    inputs = linear_inputs("tall", mask, bias=True)
    pointers = [t.data_ptr() for t in inputs[:5]]
    names = dict(zip(pointers, ["x", "weight", "bias", "lam", "gamma"], strict=True))
    saved = set()

    def pack(tensor):
        saved.add(names.get(tensor.untyped_storage().data_ptr(), "something else"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(*inputs)
    assert saved == expected


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


@pytest.mark.parametrize("way", ["weight", "activations"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse", "isometric"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_follows_float64(shape, dtype, kind, way):
    """Values and gradients within a few roundings of the dtype, with float32 parameters."""
    out_features, in_features, r = {"tall": (96, 64, 6), "wide": (64, 96, 6)}[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=2), out_features, in_features, r, n, scaling=0.01)
    choice = Choice(way, way, way)
    low = [c.x.to(dtype), c.weight.to(dtype), c.bias.to(dtype), c.lam.float(), c.gamma.float()]

    def fast(a, b, x, weight, bias, lam, gamma):
        return randlora_linear(x, weight, bias, lam, gamma, a, b, scaling=c.scaling, choice=choice)

    def slow(a, b, x, weight, bias, lam, gamma):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=c.scaling)

    probe = torch.randn(7, out_features, dtype=torch.float64).to(dtype)
    got = run(fast, c.operands(dtype), low, probe)
    want = run(slow, c.bases(), [t.double() for t in low], probe.double())
    for value, leaf, exact in zip(got, [low[0], *low], want, strict=True):
        assert value.dtype == leaf.dtype
        # Inputs, bases, C, W0 + ΔW, P and the result are rounded: six times, in sums that cancel.
        assert_close(value.double(), exact, 8 * torch.finfo(dtype).eps)


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


# --- where the linear map stands among other operations ------------------------------------------

WAYS = ("weight", "activations")
EVERY = [
    Choice(*ways, keeps, keep_weight)
    for ways in itertools.product(WAYS, repeat=3)
    for keeps in ("x", "xb")
    for keep_weight in (False, True)
]


def first_to_zero(y):
    y[..., 0] = 0
    return y


# In place, and as a new tensor.
CHANGES = {
    "relu": (torch.relu_, torch.relu),
    "add": (lambda y: y.add_(1), lambda y: y + 1),
    "mul": (lambda y: y.mul_(3), lambda y: y * 3),
    "set": (first_to_zero, lambda y: y * (torch.arange(y.shape[-1]) > 0)),
}


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0, 2), (2, 1, 3), (1, 2, 1, 3)], ids=str)
def test_results_may_be_written_in_place(lead, shape, kind):
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=3), out_features, in_features, r, n, lead=lead)
    a, b = c.operands()
    probe = torch.randn(*lead, out_features, dtype=torch.float64)
    for choice, how, alone in zip(
        EVERY, itertools.cycle(CHANGES), itertools.cycle([False, False, True]), strict=False
    ):

        def run(in_place, choice=choice, how=how, alone=alone):
            leaves = [t.clone().requires_grad_() for t in (c.x, c.lam, c.gamma)]
            x, lam, gamma = leaves
            x = CHANGES[how][0](x * 2) if in_place else CHANGES[how][1](x * 2)
            base = (None, None) if alone else (c.weight, c.bias)
            y = randlora_linear(x, *base, lam, gamma, a, b, choice=choice)
            y = CHANGES[how][0](y) if in_place else CHANGES[how][1](y)
            return [y, *torch.autograd.grad((y * probe).sum(), leaves)]

        for one, other in zip(run(True), run(False), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_may_be_written_in_place(shape, kind):
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=3), out_features, in_features, r, n)
    a, b = c.operands()
    probe = torch.randn(out_features, in_features, dtype=torch.float64)

    def form(base, lam):
        if base is None:
            return delta_weight(lam, c.gamma, a, b, wide=c.wide)
        return effective_weight(base, lam, c.gamma, a, b)

    for base, (written, other) in itertools.product((c.weight, None), CHANGES.values()):
        lam = c.lam.clone().requires_grad_()
        one = written(form(base, lam))
        (got,) = torch.autograd.grad((one * probe).sum(), lam)
        two = other(form(base, lam))
        (want,) = torch.autograd.grad((two * probe).sum(), lam)
        assert torch.equal(one, two)
        assert torch.equal(got, want)


# --- bit for bit ---------------------------------------------------------------------------------


def inputs(width, dtype):
    """Inputs in every layout that models are known to give."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "rows": normal(2, 50, width),
        "one": normal(width),
        "class token": normal(2, 50, width)[:, :1],
        "transposed": normal(2, width, 50).transpose(1, 2),
        "sequence first": normal(50, 2, width).transpose(0, 1),
        "expanded": normal(1, 50, width).expand(3, -1, -1),
        "expanded token": normal(1, 1, width).expand(3, 7, -1),
        "channels last": normal(2, width, 7, 7).permute(0, 2, 3, 1),
        "four": normal(2, 3, 5, width),
        "strided": normal(6, 2 * width)[:, ::2],
        "part": normal(6, width + 8)[:, 3:-5],
        "empty": normal(0, 3, width),
    }


WEIGHTS = {
    "rows": lambda w: w,
    "columns": lambda w: w.T.contiguous().T,
}


@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize("kind", ["dense", "very_sparse", "isometric"])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (80, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_without_an_update_it_is_the_plain_layer_to_the_bit(dtype, size, kind, layout):
    """In every layout of the input and of the weight, for every plan."""
    out_features, in_features = size
    r = 8
    n = -(-min(size) // r)
    c = case(BasisBank(kind, seed=3), out_features, in_features, r, n)
    a, b = c.operands(dtype)
    weight, bias = WEIGHTS[layout](c.weight.to(dtype)), c.bias.to(dtype)
    lam, gamma = c.lam.float().requires_grad_(), torch.zeros_like(c.gamma).float().requires_grad_()
    for x in inputs(in_features, dtype).values():
        for bias_or_not in (bias, None):
            plain = torch.nn.functional.linear(x, weight, bias_or_not)
            for choice in (
                Choice("weight"),
                Choice("weight", "weight", keep_weight=True),
                Choice("activations"),
                Choice("activations", keeps="xb"),
            ):
                for needed in (False, True):
                    y = randlora_linear(
                        x.detach().requires_grad_(needed),
                        weight,
                        bias_or_not,
                        lam,
                        gamma,
                        a,
                        b,
                        choice=choice,
                    )
                    assert torch.equal(y, plain)
    w = effective_weight(weight, lam, gamma, a, b)
    assert torch.equal(w, weight)
    assert w.stride() == weight.stride()


# --- checkpoints ---------------------------------------------------------------------------------


def everything(context, op, *args, **keywords):
    return CheckpointPolicy.MUST_SAVE


aten = torch.ops.aten
POLICIES = {
    "matrices": [aten.mm.default, aten.addmm.default],
    "batches": [aten.bmm.default, aten.baddbmm.default],
    "everything": everything,
}


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse", "isometric"])
@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_a_checkpoint_may_keep_any_result(shape, kind, policy, tiled, monkeypatch):
    """Its mode keeps results of operations, which may then not be written in place."""
    if tiled:
        monkeypatch.setattr("randlora.kernel.tile_width", lambda *_: 2)
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=3), out_features, in_features, r, n, lead=(2, 3))
    a, b = c.operands()
    if kind == "very_sparse":
        b = GatherOperator(b.entries, b.scale, torch.float64)
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[policy])

    def read(choice, x, weight, bias, lam, gamma):
        return torch.nn.functional.linear(x, effective_weight(weight, lam, gamma, a, b), bias)

    def call(choice, *tensors):
        return randlora_linear(*tensors, a, b, choice=choice)

    for choice in EVERY[::3]:
        for way in (read, call):
            leaves = [
                t.clone().requires_grad_(needed)
                for t, needed in zip(
                    (c.x, c.weight, c.bias, c.lam, c.gamma),
                    (True, False, False, True, True),
                    strict=True,
                )
            ]
            trained = [leaf for leaf in leaves if leaf.requires_grad]
            want = way(choice, *leaves).sin()
            wants = torch.autograd.grad(want.sum(), trained)
            got = checkpoint(
                lambda *leaves, way=way, choice=choice: way(choice, *leaves).sin(),
                *leaves,
                use_reentrant=False,
                context_fn=contexts,
            )
            grads = torch.autograd.grad(got.sum(), trained)
            for one, other in zip((got, *grads), (want, *wants), strict=True):
                # The same sums, taken in other parts: some hundred roundings of numbers near one.
                assert_close(one, other, 1e-12)


# --- float16 -------------------------------------------------------------------------------------


def large(kind, size, of_x, of_dy, tokens=16):
    """A float16 layer near what a trained one is, with large activations and gradients."""
    out_features, in_features = size
    n = -(-min(size) // 8)
    c = case(BasisBank(kind, seed=2), out_features, in_features, 8, n, lead=(tokens,), scaling=1)
    half = (in_features**-0.5 * c.weight).half(), c.bias.half()
    trained = (c.lam / (8 * n) ** 0.5).float(), (in_features**-0.5 * c.gamma).float()
    dy = of_dy * torch.randn(tokens, out_features, dtype=torch.float64)
    return c, [(of_x * c.x).half(), *half, *trained], dy.half()


def compare(c, leaves, dy, choice):
    def fast(a, b, x, weight, bias, lam, gamma):
        return randlora_linear(x, weight, bias, lam, gamma, a, b, choice=choice)

    def slow(a, b, x, weight, bias, lam, gamma):
        return reference.linear(x, weight, bias, a, b, lam, gamma)

    needed = [True, False, False, True, True]
    got = run(fast, c.operands(torch.float16), leaves, dy, needed)
    want = run(slow, c.bases(), [t.double() for t in leaves], dy.double(), needed)
    for one, other in zip(got, want, strict=True):
        assert other.abs().max() < torch.finfo(one.dtype).max  # it can be had at all
        # Inputs are exact; bases, C, W0 + ΔW, what lies between factors, P and the result are
        # rounded: as in the test of low precision above, in sums that cancel.
        assert_close(one.double(), other, 8 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize(("of_x", "of_dy"), [(300, 100), (3000, 3000), (1, 2**12), (1, 1e-3)])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("size", [(192, 64), (64, 192), (96, 96)], ids=str)
def test_float16_overflows_no_sooner_than_the_plain_layer(size, kind, of_x, of_dy):
    """Every plan, where the oracle's numbers fit in the dtype that each is to be in."""
    c, leaves, dy = large(kind, size, of_x, of_dy)
    for choice in EVERY[::3]:
        compare(c, leaves, dy, choice)


@pytest.mark.parametrize("kind", ["dense", "very_sparse", "isometric"])
@pytest.mark.parametrize("size", [(1024, 256), (256, 1024)], ids=str)
def test_large_layers_in_float16_do_not_overflow_either(size, kind):
    c, leaves, dy = large(kind, size, 300, 1000, tokens=8)
    for way in WAYS:
        compare(c, leaves, dy, Choice(way, way, way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(192, 64), (64, 192)], ids=str)
def test_what_is_not_finite_stays_so(size, way):
    """A scaler of losses looks for it."""
    c, leaves, dy = large("dense", size, 1, 1)
    a, b = c.operands(torch.float16)
    for leaf in leaves[3:]:
        leaf.requires_grad_()
    dy[0, 0] = torch.inf
    y = randlora_linear(*leaves, a, b, choice=Choice(way, way, way))
    y.backward(dy)
    assert not any(leaf.grad.isfinite().all() for leaf in leaves[3:])


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("size", [(192, 64), (64, 192)], ids=str)
def test_the_gradient_of_a_read_weight_does_not_overflow_in_float16(size, kind):
    c, (_, weight, _, *trained), _ = large(kind, size, 1, 1)
    a, b = c.operands(torch.float16)
    dw = (15000 * torch.randn(size, dtype=torch.float64)).clamp(-65000, 65000).half()

    def fast(a, b, lam, gamma):
        return effective_weight(weight, lam, gamma, a, b)

    def slow(a, b, lam, gamma):
        return reference.delta_weight(a, b, lam, gamma, wide=c.wide)

    got = run(fast, (a, b), trained, dw)[1:]
    want = run(slow, c.bases(), [t.double() for t in trained], dw.double())[1:]
    for one, other in zip(got, want, strict=True):
        assert_close(one.double(), other, 8 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("recomputed", [1, 2])
@pytest.mark.parametrize("read", [False, True])
def test_a_checkpoint_recomputed_with_another_token_is_an_error(read, recomputed):
    """Of as many bytes as before: a token saves none."""
    c = case(BasisBank(seed=3), 7, 5, 2, 3)
    a, b = c.operands()
    tokens = iter([1, recomputed])
    lam = c.lam.requires_grad_()

    def call(x):
        token = next(tokens)
        if read:
            w = effective_weight(c.weight, lam, c.gamma, a, b, token=token)
            return torch.nn.functional.linear(x, w).sin()
        return randlora_linear(x, c.weight, c.bias, lam, c.gamma, a, b, token=token).sin()

    y = checkpoint(call, c.x.requires_grad_(), use_reentrant=False)
    if recomputed == 1:
        y.sum().backward()
        assert lam.grad.count_nonzero()
    else:
        with pytest.raises(CheckpointError, match="different metadata"):
            y.sum().backward()


def test_a_token_saves_nothing_where_nobody_looks():
    c = case(BasisBank(seed=3), 7, 5, 2, 3)
    a, b = c.operands()
    lam = c.lam.requires_grad_()
    y = randlora_linear(c.x, c.weight, c.bias, lam, c.gamma, a, b, token=3)
    assert not any(t is not None and not t.numel() for t in y.grad_fn.saved_tensors)
    y.sum().backward()
