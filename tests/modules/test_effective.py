"""Effective weights: each is computed once per call, and only if the call reads it."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora import inject
from randlora.modules import effective, embedding, weight_update
from tests.support.rows import (
    ROWS,
    Experts,
    Kernel,
    inputs_of,
    loss_of,
    make,
    shuffled,
)
from tests.support.rows import inject as inject_row
from tests.support.small import adapted


@pytest.fixture
def formed(monkeypatch):
    """Record the shapes of the effective weights that are computed."""
    shapes, whole = [], weight_update.effective_weight

    def record(weight, *args, **keywords):
        shapes.append(tuple(weight.shape))
        return whole(weight, *args, **keywords)

    for module in (weight_update, embedding):
        monkeypatch.setattr(module, "effective_weight", record)
    return shapes


@pytest.mark.parametrize(
    ("row", "shapes"),
    [
        ("attention", [(24, 8), (8, 8)]),
        ("attention of three sizes", [(8, 8), (8, 6), (8, 10), (8, 8)]),
        ("lstm", [(24, 8), (24, 6)]),
        ("convolution 2d", [(6, 36)]),
        ("experts", 3 * [(12, 8)] + 3 * [(8, 12)]),
        ("linear that reads its weight", [(12, 8)]),
    ],
)
def test_a_weight_read_many_times_is_formed_once(row, shapes, formed):
    row = next(r for r in ROWS if r.name == row)
    model = inject_row(row, make(row))
    formed.clear()
    loss_of(model(*inputs_of(row))).backward()
    assert sorted(formed) == sorted(shapes)


@pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse", "isometric"])
def test_an_embedding_forms_the_rows_looked_up_and_no_others(basis, formed):
    layer = inject(nn.Embedding(500, 16), rank=4, target_modules=".*|", basis=basis)
    layer(torch.arange(6).view(2, 3)).sum().backward()
    assert formed == [(6, 16)]
    assert layer(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 16)
    with pytest.raises(IndexError):
        layer(torch.tensor([500]))


def test_gradients_recorded_or_not_do_not_mix_within_a_call():
    class Both(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                scale = self.weight.norm()
            return F.linear(x, self.weight) / scale

    layer = inject(Both(8, 8), rank=2)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.randlora_gamma.grad.count_nonzero()


def test_an_error_within_a_call_leaves_nothing_held():
    model = inject(Experts(), rank=2, target_modules=[], target_parameters="up")
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(3, 5))
    assert not model._randlora.call_caches


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "linear that reads its weight",
        "attention, no weights",
        "encoder layer",
        "convolution 2d",
        "embedding",
        "gru cell",
        "experts",
        "registered",
        "opaque, registered",
        "linear, wide, A trained",
        "embedding, A trained",
    ],
)
def test_they_compile_as_one_graph(name):
    row = next(r for r in ROWS if r.name == name)
    model = inject_row(row, make(row))
    shuffled(model)
    inputs = inputs_of(row)
    want = model(*inputs)
    torch.compiler.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    trained = randlora.adapter_parameters(model)
    torch.testing.assert_close(got, want)
    for one, other in zip(
        torch.autograd.grad(loss_of(got), trained),
        torch.autograd.grad(loss_of(want), trained),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "name",
    [
        *("attention", "convolution 2d", "lstm", "experts", "embedding"),
        *("experts, A trained", "embedding, wide, A trained"),
    ],
)
def test_autocast_computes_in_its_dtype(name):
    row = next(r for r in ROWS if r.name == name)
    inputs = [x.float() if x.is_floating_point() else x for x in row.inputs]
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    try:
        with autocast:
            make(row).float()(*inputs)
    except RuntimeError as error:
        if name != "lstm":  # by oneDNN on processors without AVX-512
            raise
        pytest.skip(f"the plain module cannot do it here: {str(error)[:60]}")
    model = inject_row(row, make(row)).float()
    shuffled(model)
    want = model(*inputs)
    with autocast:
        got = model(*inputs)
    loss_of(got.float()).backward()
    assert all(p.grad.count_nonzero() for p in randlora.adapter_parameters(model))
    assert (got - want).abs().max() <= 0.1 * want.abs().max()


def test_ids_out_of_range_are_refused_as_before():
    layer = adapted(nn.Embedding(20, 4), target_modules="0")
    for ids in (torch.tensor([-1]), torch.tensor([20])):
        with pytest.raises(IndexError):
            layer(ids)
    with pytest.raises(RuntimeError, match="indices"):
        layer(torch.tensor([1, 0], dtype=torch.uint8))


def test_a_part_of_a_call_can_be_recomputed_in_backward():
    class Part(nn.Linear):
        def body(self, x):
            return F.linear(x, self.weight, self.bias).tanh()

        def forward(self, x):
            y = checkpoint(self.body, x, use_reentrant=False)
            y = checkpoint(self.body, y, use_reentrant=False)
            return y + F.linear(x, self.weight)

    model = adapted(Part(8, 8)).double()
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = model[0].delta_weight() + model[0].base_weight, model[0].bias
    one = F.linear(x, weight, bias).tanh()
    want = F.linear(one, weight, bias).tanh() + F.linear(x, weight)
    trained = randlora.adapter_parameters(model)
    for got, expected in zip(
        torch.autograd.grad(model(x).sum(), trained),
        torch.autograd.grad(want.sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_threads_do_not_share_a_call():
    model, x = adapted(nn.LSTM(8, 6)), torch.randn(5, 2, 8)
    trained = randlora.adapter_parameters(model)
    want = torch.autograd.grad(model(x)[0].sum(), trained)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            step = lambda _: torch.autograd.grad(model(x)[0].sum(), trained)  # noqa: E731
            for got in pool.map(step, range(24)):
                torch.testing.assert_close(got, want)
    finally:
        sys.setswitchinterval(interval)


def test_a_call_within_a_call_forms_a_weight_once(monkeypatch):
    class Again(nn.Linear):
        def forward(self, x, depth=2):
            y = F.linear(x, self.weight)
            return self.forward(x, depth - 1) + F.linear(x, self.weight) if depth else y

    formed, compute = [], effective._compute_effective_weight
    monkeypatch.setattr(
        effective, "_compute_effective_weight", lambda *a: (formed.append(1), compute(*a))[1]
    )
    inject(nn.Sequential(Again(4, 4)), 2)(torch.randn(2, 4))
    assert len(formed) == 1


@pytest.mark.parametrize(
    ("build", "layout"),
    [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)],
)
def test_a_kernel_keeps_its_layout(build, layout):
    conv = adapted(build(4, 6, 3).to(memory_format=layout))[0]
    assert conv.weight.stride() == conv._parameters["weight"].stride()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_go_through_a_linear_layer(layout):
    model = adapted(nn.Linear(8, 6))
    rows = [torch.randn(2, 8), torch.randn(3, 8)]
    got = model(torch.nested.nested_tensor(rows, layout=layout))
    for one, row in zip(got.unbind(), rows, strict=True):
        torch.testing.assert_close(one, model(row))


def test_the_update_of_a_transposed_weight_is_out_by_in():
    model = adapted(Kernel(8, 12))
    update = effective.delta_of(model[0], model[0]._randlora.active_updates["kernel"])
    assert update.shape == (12, 8)
    torch.testing.assert_close(model[0].kernel, model[0]._parameters["kernel"] + update.T)
