"""Tracing, exporting and compiling adapted modules."""

import warnings

import pytest
import torch
from torch import nn

import randlora
from randlora.model.index import adapted_modules
from tests.support.rows import Opaque
from tests.support.situations import ROWS, close, input_of, make, results, rows, same, trained


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
    if not isinstance(row.make(), Opaque):
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
    """The trace of a model, and where its warnings come from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, (x,), check_trace=False)
    return traced, {(w.filename, w.lineno) for w in caught}


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch")
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
    model(x)  # draws the bases of unreadable weights, whose dtype is the input's
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for batch in (row.shape[0], 7, 300) if dynamic else (row.shape[0],):
        x = input_of(row, shape=(batch, *row.shape[1:]))
        assert close([exported(x)], [model(x)])


def counted(graphs):
    """A backend of torch.compile that counts its graphs."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


LINEAR = ("wide", "very sparse", "isometric")
linear_rows = pytest.mark.parametrize("row", [ROWS[name] for name in LINEAR], ids=LINEAR)
# A warning of torch.compile itself.
instances = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("dynamic", [True, None])
@instances
@linear_rows
def test_compiled_for_any_batch(row, dynamic):
    """One graph for all batch sizes, or two if torch has to detect that the size varies."""
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
            # The same operations, except that without a compiler some sums are computed in parts.
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
