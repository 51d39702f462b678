"""An adapted module works wherever the plain one works: a table of modules, a test per situation.

If torch fails for the plain module, the test of checkpoints skips it.
"""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import randlora
from tests.support.situations import (
    close,
    input_of,
    make,
    results,
    rows,
    same,
    trained,
    with_gradients,
)

# --- other operations beside it ------------------------------------------------------------------


def first_to_zero(y):
    y[..., 0] = 0
    return y


CHANGES = {  # in place, and as a new tensor
    "relu": (torch.relu_, torch.relu),
    "mul": (lambda y: y.mul_(3), lambda y: y * 3),
    "set": (first_to_zero, lambda y: y * (torch.arange(y.shape[-1]) > 0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@rows
def test_what_it_returns_may_be_written_in_place(row, change):
    one, other = (trained(make(row, after=after)[1]) for after in change)
    x = input_of(row)
    assert same(results(one, x), results(other, x))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@with_gradients
def test_what_it_takes_may_have_been_written_in_place(row, change):
    one, other = (
        trained(make(row, before=lambda x, change=change: change(2 * x))[1]) for change in change
    )
    x = input_of(row)
    assert same(results(one, x), results(other, x))


def test_a_layer_before_an_activation_in_place():
    """The activation writes into the layer's output. Autograd allows this only if it is no view."""
    model = randlora.inject(nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True)), rank=2)
    model(torch.randn(2, 8)).sum().backward()


# --- inputs --------------------------------------------------------------------------------------


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "middle": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "token": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@rows
def test_no_layout_of_the_input_changes_a_bit_at_injection(row, dtype, layout):
    plain, model = make(row, dtype)
    x = layout(input_of(row, dtype))
    assert row.tokens or not x.is_contiguous()
    for mode in (True, False):
        with torch.no_grad():
            assert torch.equal(model.train(mode)(x), plain.train(mode)(x))
        if not row.reads:  # else torch's path depends on whether the weight needs gradients
            assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@rows
def test_no_layout_of_the_input_changes_a_gradient(row, layout):
    model = trained(make(row)[1])
    x = layout(input_of(row))
    assert close(results(model, x), results(model, x.contiguous()))


@with_gradients
def test_large_activations_in_float16(row):
    plain, model = make(row, torch.float16)
    x = 8000 * input_of(row, torch.float16)  # 8000, because the sums have only eight terms
    want = plain.requires_grad_()(x)
    assert want.isfinite().all()
    got = model(x)
    assert torch.equal(got, want) or row.reads
    assert got.isfinite().all()
    with torch.no_grad():
        for parameter in randlora.adapter_parameters(model):
            parameter.fill_(0.01)
    probe = torch.randn(want.shape).half() / 64
    if want.requires_grad:
        (want * probe).sum(dtype=torch.float32).backward()
        assert all(p.grad.isfinite().all() for p in plain.parameters())  # the plain ones fit
    (model(x) * probe).sum(dtype=torch.float32).backward()
    assert all(p.grad.isfinite().all() for p in randlora.adapter_parameters(model))


# --- ways of calling -----------------------------------------------------------------------------


@rows
def test_threads(row):
    model = trained(make(row)[1])
    xs = [input_of(row), input_of(row).flip(0)]
    wants, gots = [results(model, x) for x in xs], [None, None]

    def work(i):
        for _ in range(5):
            gots[i] = results(model, xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(got, want) for got, want in zip(gots, wants, strict=True))


def everything(context, op, *args, **keywords):
    return CheckpointPolicy.MUST_SAVE


aten = torch.ops.aten
POLICIES = {
    "matrices": [aten.mm.default, aten.addmm.default],
    "batches": [aten.bmm.default, aten.baddbmm.default],
    "everything": everything,
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@rows
def test_checkpoints_with_a_policy(row, policy):
    def selective(model):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return partial(checkpoint, model, use_reentrant=False, context_fn=contexts)

    plain, model = make(row)
    trained(model)
    x = input_of(row)
    if not row.tokens:
        leaf = x.clone().requires_grad_()
        try:
            selective(plain)(leaf).sum().backward()
        except RuntimeError as error:
            pytest.skip(f"torch: {error}")
    assert close(results(model, x, selective(model)), results(model, x))
