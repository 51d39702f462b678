"""An adapted module works wherever the plain one works: a table of modules, a test per situation.

If torch fails for the plain module, the test of checkpoints skips it.
"""

import copy
import pickle
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import randlora
from tests.support.moving import dumped
from tests.support.situations import (
    close,
    input_of,
    make,
    probe_like,
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


# --- training with less memory -------------------------------------------------------------------


def in_double(row, **around):
    """A trained model all in float64, so that results differ only by roundings of float64."""
    return trained(make(row, **around)[1].double())


def gradients(model, x, call=None):
    """As ``results`` from the same seed, but by ``backward``, as re-entrant checkpoints need."""
    x = x.detach().requires_grad_(x.is_floating_point())
    leaves = [*([x] if x.requires_grad else []), *randlora.adapter_parameters(model)]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(6)
    y = (call or model)(x)
    (y * probe_like(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def recomputed(part, x, reentrant):
    """Re-entrant checkpoints give no gradients if no input requires one, as tokens do not."""
    anchor = torch.zeros((), requires_grad=True)
    return checkpoint(lambda x, _: part(x), x, anchor, use_reentrant=reentrant)


def nested(inner, outer):
    return lambda part, x: recomputed(partial(recomputed, part, reentrant=inner), x, outer)


KINDS = {"re-entrant": True, "not re-entrant": False}
CHECKPOINTS = {name: partial(recomputed, reentrant=kind) for name, kind in KINDS.items()} | {
    f"{inner} in {outer}": nested(KINDS[inner], KINDS[outer]) for inner in KINDS for outer in KINDS
}


@pytest.mark.parametrize("way", CHECKPOINTS.values(), ids=CHECKPOINTS)
@rows
def test_checkpoints_with_dropout(row, way):
    row = replace(row, keywords={**row.keywords, "dropout": 0.4})
    model = in_double(row, before=None if row.tokens else nn.Dropout(0.3), after=nn.Dropout(0.2))
    x = input_of(row)
    want = gradients(model, x)
    assert all(tensor.count_nonzero() for tensor in want)
    assert close(gradients(model, x, partial(way, model)), want)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3)])
@rows
def test_micro_batches_add_up_to_the_large_batch(row, sizes):
    model, x = in_double(row), input_of(row)
    y, *_ = want = gradients(model, x)
    parameters = randlora.adapter_parameters(model)
    for parameter in parameters:
        parameter.grad = None
    for part, probe in zip(x.split(sizes), probe_like(y).split(sizes), strict=True):
        (model(part) * probe).sum().backward()
    assert close([p.grad for p in parameters], want[-len(parameters) :])


HOOKS = {
    "left where they are": torch.autograd.graph.save_on_cpu,
    # Copied, also on a machine without an accelerator. The copies are contiguous, so that torch may
    # choose another product.
    "copied": partial(torch.autograd.graph.save_on_cpu, pin_memory=True),
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@rows
def test_what_is_saved_for_backward_may_be_offloaded(row, hooks):
    model, x = in_double(row), input_of(row)

    def offloaded(x):
        with hooks():
            return model(x)

    assert close(results(model, x, offloaded), results(model, x))


@pytest.mark.parametrize("way", ["called", "recomputed"])
@with_gradients
def test_no_gradient_is_computed_of_an_input_that_needs_none(row, way):
    model = in_double(row)
    parameters, flops = randlora.adapter_parameters(model), {}
    _, _, *want = results(model, input_of(row))
    for needed in (True, False):
        x = input_of(row).requires_grad_(needed)
        y = model(x) if way == "called" else checkpoint(model, x, use_reentrant=False)
        with FlopCounterMode(display=False) as counter:
            (y * probe_like(y)).sum().backward()
        assert close([p.grad for p in parameters], want)
        flops[needed] = counter.get_total_flops()
        for parameter in parameters:
            parameter.grad = None
    assert flops[False] < flops[True]


# --- copies --------------------------------------------------------------------------------------


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: torch.load(dumped(model), weights_only=False),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@rows
def test_a_copy_trains_as_the_original_does_and_apart_from_it(row, duplicate):
    model, x = trained(make(row)[1]), input_of(row)
    want = gradients(model, x)  # a copy may have gradients, too
    copied = duplicate(model)
    assert same(results(copied, x), want)
    with torch.no_grad():
        for parameter in randlora.adapter_parameters(copied):
            parameter.zero_()
    assert not same(results(copied, x), want)
    assert same(results(model, x), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@rows
def test_a_model_converted_to_a_dtype_is_one_made_in_it(row, dtype):
    """The bases are drawn anew in the dtype, and not rounded twice."""
    model, made = (trained(make(row, of)[1]).to(dtype) for of in (torch.float64, dtype))
    x = input_of(row, dtype)
    assert all(p.dtype == dtype for p in randlora.adapter_parameters(model))
    assert same(results(model, x), results(made, x))


@rows
def test_a_model_goes_to_meta_and_takes_its_numbers_again(row):
    model, x = trained(make(row)[1]), input_of(row)
    want, state = results(model, x), model.state_dict()
    empty = copy.deepcopy(model).to("meta")
    assert empty(x.to("meta")).shape == want[0].shape
    empty.load_state_dict(state, assign=True)
    assert same(results(empty, x), want)
