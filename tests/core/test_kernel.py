"""The linear map next to other operations: in-place writes, equal bits, checkpoints."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from randlora import BasisBank, Choice
from randlora.core.gather import GatherOperator
from randlora.functional import delta_weight, effective_weight, randlora_linear
from tests.support import cases
from tests.support.cases import assert_close, case
from tests.support.oracle import EVERY, SHAPES

# --- written in place ----------------------------------------------------------------------------


def first_to_zero(y):
    y[..., 0] = 0
    return y


# Each change in place, and the same change as a new tensor.
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
    """Inputs in all layouts that occur in models."""
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
    """A selective checkpoint keeps results of operations, so these must not be overwritten."""
    if tiled:
        monkeypatch.setattr("randlora.core.update.tile_width", lambda *_: 2)
    out_features, in_features, r = SHAPES[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=3), out_features, in_features, r, n, lead=(2, 3))
    _, b = c.operands()
    if kind == "very_sparse":
        b = GatherOperator(b.entries, b.scale, torch.float64)
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[policy])

    def read(choice, x, weight, bias, lam, gamma, a):
        return torch.nn.functional.linear(x, effective_weight(weight, lam, gamma, a, b), bias)

    def call(choice, *tensors):
        return randlora_linear(*tensors, b, choice=choice)

    for choice in EVERY[::3]:
        for way in (read, call):
            leaves = [
                t.clone().requires_grad_(needed)
                for t, needed in zip(
                    (c.x, c.weight, c.bias, c.lam, c.gamma, c.a),
                    (True, False, False, True, True, True),
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
                # The same sums in other parts: a few hundred roundings of numbers near one.
                assert_close(one, other, 1e-12)


@pytest.mark.parametrize("recomputed", [1, 2])
@pytest.mark.parametrize("read", [False, True])
def test_a_checkpoint_recomputed_with_another_token_is_an_error(read, recomputed):
    """The saved token has no bytes. Its shape alone causes the error."""
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
