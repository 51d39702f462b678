"""An adapted module stands wherever the plain one stood: one table of modules, one of situations.

Where torch itself fails for the plain module, the situation is none: each test asks it first.
"""

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import randlora
from randlora.adapted import adapted_modules

# --- modules -------------------------------------------------------------------------------------


class Twice(nn.Linear):
    """Reads its weight twice, and by itself."""

    def forward(self, input):
        return F.linear(input, self.weight, self.bias) + F.linear(2 * input, self.weight)


class Kernel(nn.Module):
    """A hand-written layer, registered below."""

    def __init__(self, in_, out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(in_, out) / in_**0.5)

    def forward(self, x):
        return x @ self.kernel


class Experts(nn.Module):
    """A mixture of experts whose weights it holds itself, and reads once for each expert."""

    def __init__(self, experts=3, d=8, hidden=12):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, hidden, d) / d**0.5)
        self.down = nn.Parameter(torch.randn(experts, d, hidden) / hidden**0.5)

    def forward(self, x):
        experts = range(len(self.up))
        return sum(F.linear(F.gelu(F.linear(x, self.up[e])), self.down[e]) for e in experts)


class Coded(nn.Module):
    """A linear layer whose weight is not to be read: eight bits and a scale."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.randint(-128, 128, (out_features, in_features)).char())

    def forward(self, x):
        return F.linear(x, self.codes.to(x.dtype) / 500)


class Attention(nn.Module):
    """Attention by a fused layer, as hand-written models have it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


randlora.register(Kernel, "kernel", transposed=True)
randlora.register(Coded)


@dataclass(frozen=True)
class Row:
    """A module, the shape of its input, and how it is adapted."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 5, 8)
    keywords: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0  # its input is numbers below this one
    reads: bool = False  # its own code uses the weight, in ways that hang on who needs gradients


def linear(out, **keywords):
    return Row(lambda: nn.Linear(8, out), keywords=keywords)


EMBED = {"target_modules": [r".*|"]}
ROWS = {
    "tall": linear(20),
    "wide": linear(5),
    "square": linear(8),
    "sparse": linear(20, basis="sparse"),
    "very sparse": linear(20, basis="very_sparse"),
    "isometric": linear(20, basis="isometric"),
    "isometric, wide": linear(5, basis="isometric"),
    "reading its weight": Row(lambda: Twice(8, 12), reads=True),
    "attention": Row(Attention, reads=True),
    "convolution 1d": Row(lambda: nn.Conv1d(5, 7, 3, padding=1)),
    "convolution 2d": Row(lambda: nn.Conv2d(3, 6, 3), (4, 3, 6, 6)),
    "lstm": Row(Recurrent, reads=True),
    "embedding": Row(lambda: nn.Embedding(30, 8), (4, 5), EMBED, tokens=30),
    "registered": Row(lambda: Kernel(8, 12), reads=True),
    "experts": Row(Experts, keywords={"target_parameters": [r".*\bup", r".*\bdown"]}, reads=True),
    "opaque": Row(lambda: Coded(8, 12)),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
with_gradients = pytest.mark.parametrize(
    "row",
    [r for r in ROWS.values() if not r.tokens],
    ids=[n for n, r in ROWS.items() if not r.tokens],
)


class Model(nn.Module):
    """A module with something before it, and something after it."""

    def __init__(self, inner, before=None, after=None):
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x):
        x = x if self.before is None else self.before(x)
        y = self.inner(x)
        return y if self.after is None else self.after(y)


def make(row, dtype=torch.float64, **around):
    """A frozen plain model, and an adapted one, both of the same numbers."""
    torch.manual_seed(2)
    plain = Model(row.make(), **around).to(dtype).requires_grad_(False)
    model = copy.deepcopy(plain)
    randlora.inject(model, **{"rank": 2, **row.keywords})
    return plain, model


def trained(model):
    """The model with numbers as after training, in a dtype that hides nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in randlora.adapter_parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 4)
    return model


def input_of(row, dtype=torch.float64, shape=None):
    generator = torch.Generator().manual_seed(4)
    shape = shape or row.shape
    if row.tokens:
        return torch.randint(row.tokens, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def results(model, x, call=None):
    """What the model returns, and all gradients of it."""
    x = x.detach().requires_grad_(x.is_floating_point())
    leaves = [*([x] if x.requires_grad else []), *randlora.adapter_parameters(model)]
    y = (model if call is None else call)(x)
    generator = torch.Generator().manual_seed(5)
    probe = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), leaves)]


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def close(got, want, tolerance=1e-12):
    """Some hundred roundings of float64: the same sums, taken in another order."""
    return all(
        a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)
        for a, b in zip(got, want, strict=True)
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
    """As in the issue."""
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
        if not row.reads:  # else torch chooses by whether the weight that is read needs a gradient
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
    x = 8000 * input_of(row, torch.float16)  # of sums of eight numbers, not of a thousand
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
        assert all(p.grad.isfinite().all() for p in plain.parameters())  # it can be had
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


# --- graphs --------------------------------------------------------------------------------------


@rows
def test_fx(row):
    plain, model = make(row, after=torch.relu)
    try:
        torch.fx.symbolic_trace(plain)
    except Exception as error:
        pytest.skip(f"torch: {error}")
    trained(model)
    graph = torch.fx.symbolic_trace(model)
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert called >= set(adapted_modules(model)) - {"inner.attention.out_proj"}
    for shape in (row.shape, (7, *row.shape[1:])):
        x = input_of(row, shape=shape)
        assert same(results(graph, x), results(model, x))
    want = graph.eval()(x).detach()
    if not isinstance(row.make(), Coded):
        randlora.merge(graph)
        assert close([graph(x)], [want])
        randlora.unmerge(graph)
    with randlora.disabled(graph):
        assert torch.equal(graph(x), plain.eval()(x))


def test_fx_says_what_it_cannot_trace():
    layer = randlora.inject(nn.Linear(8, 12), rank=2)
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch\.fx by itself"):
        torch.fx.symbolic_trace(layer)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="has hooks"):
        torch.fx.symbolic_trace(nn.Sequential(layer))


def trace(model, x):
    """The trace, and what it warns of: where."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, (x,), check_trace=False)
    return traced, {(w.filename, w.lineno) for w in caught}


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch:DeprecationWarning")
@rows
def test_jit_trace(row, tmp_path):
    plain, model = make(row, after=torch.sin)
    x = input_of(row)
    try:
        _, known = trace(plain, x)
    except Exception as error:
        pytest.skip(f"torch: {error}")
    traced, warned = trace(trained(model), x)
    assert warned <= known
    torch.jit.save(traced, tmp_path / "traced.pt")
    for graph in (traced, torch.jit.load(tmp_path / "traced.pt")):
        for shape in (row.shape, (7, *row.shape[1:])):
            x = input_of(row, shape=shape)
            leaves = [x.clone().requires_grad_(not row.tokens) for _ in range(2)]
            got, want = graph(leaves[0]), model(leaves[1])
            assert close([got], [want])
            if not row.tokens:
                got.sum().backward()
                want.sum().backward()
                assert close([leaves[0].grad], [leaves[1].grad])


@pytest.mark.parametrize("dynamic", [False, True])
@rows
def test_export(row, dynamic):
    plain, model = make(row, after=torch.sin)
    trained(model).eval()
    x = input_of(row)
    shapes = ({0: torch.export.Dim("batch", min=2, max=500)},) if dynamic else None
    try:
        torch.export.export(plain.eval(), (x,), dynamic_shapes=shapes)
    except Exception as error:
        pytest.skip(f"torch: {error}")
    model(x)  # draws the bases of what cannot know their dtype before
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for batch in (row.shape[0], 7, 300) if dynamic else (row.shape[0],):
        x = input_of(row, shape=(batch, *row.shape[1:]))
        assert close([exported(x)], [model(x)])


# Of torch.compile itself.
instances = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def counted(graphs):
    """A backend of torch.compile that counts its graphs."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


LINEAR = ("wide", "very sparse", "isometric")
linear_rows = pytest.mark.parametrize("row", [ROWS[name] for name in LINEAR], ids=LINEAR)


@pytest.mark.parametrize("dynamic", [True, None])
@instances
@linear_rows
def test_compiled_for_any_batch(row, dynamic):
    """In one graph, or where torch finds out by itself in two: none for each size."""
    torch._dynamo.reset()
    model, graphs = trained(make(row)[1]), []
    compiled = torch.compile(model, backend=counted(graphs), dynamic=dynamic, fullgraph=True)
    for batch in (3, 9, 300, 3000):
        x = input_of(row, shape=(batch, *row.shape[1:]))
        assert close(results(model, x, compiled), results(model, x))
    assert len(graphs) <= (1 if dynamic else 2)


@pytest.mark.parametrize("fullgraph", [False, True])
@instances
@linear_rows
def test_compiled_under_autocast_without_a_call_before(row, fullgraph):
    torch._dynamo.reset()
    torch.manual_seed(2)
    model = nn.Sequential(row.make(), nn.ReLU(inplace=True), nn.Linear(row.make().out_features, 6))
    randlora.inject(model, **{"rank": 2, **row.keywords})
    trained(model)
    graphs = []
    compiled = torch.compile(model, backend=counted(graphs), fullgraph=fullgraph)
    x = input_of(row, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            # The same operations but for sums that are formed in parts where nobody watches.
            assert close([compiled(x)], [model(x)], 2 * torch.finfo(torch.bfloat16).eps)
    assert len(graphs) == 1


def test_exported_under_autocast_it_asks_for_a_call_before():
    _, model = make(ROWS["tall"], torch.float32)
    x = input_of(ROWS["tall"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="call the layer once before, under autocast"):
            torch.export.export(model, (x,), strict=False)
        want = model(x)
        exported = torch.export.export(model, (x,), strict=False).module()
        assert exported(x).shape == want.shape


@instances
@linear_rows
def test_compiled_it_may_be_written_in_place(row):
    torch._dynamo.reset()
    model = trained(make(row, after=torch.relu_)[1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = input_of(row)
    assert close(results(model, x, compiled), results(model, x))
