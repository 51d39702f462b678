"""Calls of a linear layer: plans, dropout, autocast, compilation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora import BasisBank, Choice, RandLoRALinear, adapter_parameters
from tests.support import cases
from tests.support.small import trained

SPARSITY = {"dense": None, "sparse": None, "very_sparse": 20.0}


# --- plans --------------------------------------------------------------------------------------


def saved_bytes(layer, x):
    """Bytes saved for backward, without the storages of parameters."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(saved.values())


def test_a_choice_holds_for_a_layer_or_for_all(monkeypatch):
    one, two = RandLoRALinear(12, 20, rank=4), RandLoRALinear(12, 20, rank=4)
    one.choice = Choice(forward="weight")
    assert (one.plan(2).forward, two.plan(2).forward) == ("weight", "activations")
    monkeypatch.setattr(RandLoRALinear, "choice", Choice(forward="weight"))
    assert two.plan(2).forward == "weight"


@pytest.mark.parametrize(("dtype", "train_a"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("kind", ["dense", "very_sparse"])
def test_one_activation_is_kept_and_no_more(kind, dtype, train_a):
    """A trained A is saved by reference, whatever the dtype of the layer is."""
    for shape, keeps, kept in [
        ((48, 96), "x", 48),
        ((96, 48), "x", 96),
        ((96, 48), "xb", 48),
        ((48, 48), "x", 48),
    ]:
        keywords = {"dtype": dtype, "rank": 6, "bank": BasisBank(kind), "train_a": train_a}
        layer = RandLoRALinear(*shape, **keywords)
        x = torch.randn(1000, shape[0], dtype=dtype, requires_grad=True)
        by_tokens = "activations" if keeps == "xb" else None
        layer.choice = Choice(grad_parameters=by_tokens, keeps=keeps)
        assert saved_bytes(layer, x) == dtype.itemsize * 1000 * kept
        layer.choice = Choice("weight", "weight", by_tokens, keeps, keep_weight=True)
        assert saved_bytes(layer, x) == dtype.itemsize * (1000 * kept + shape[0] * shape[1])
        layer.requires_grad_(False)
        layer.choice = Choice()
        assert saved_bytes(layer, x) == 0


# --- dropout, autocast, compile ------------------------------------------------------------------


def test_dropout_is_on_the_input_of_the_update_alone():
    layer = RandLoRALinear(12, 20, rank=4, dropout=0.4)
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))
    trained(layer)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    want = F.linear(x, layer.base_weight, layer.bias) + F.linear(dropped, layer.delta_weight())
    cases.assert_close(got, want, 1e-6)
    assert not torch.equal(got, layer.eval()(x))
    cases.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-5)


def test_dropout_keeps_the_gradients():
    layer = trained(RandLoRALinear(6, 4, rank=2, dropout=0.4, train_a=True)).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def fn(x, lam, gamma, a):
        torch.manual_seed(0)
        return layer(x)

    assert torch.autograd.gradcheck(fn, (x, *adapter_parameters(layer)))


@pytest.mark.parametrize("way", ["weight", "activations"])
def test_autocast_computes_in_its_dtype_and_rounds_the_weight_once(way):
    layer = trained(RandLoRALinear(12, 20, rank=4))
    layer.choice = Choice(way, way, way, keep_weight=None)
    x = torch.randn(5, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    want = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    cases.assert_close(y.double(), want, 4 * torch.finfo(torch.bfloat16).eps)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.randlora_gamma.grad.dtype == torch.float32
    exact = layer.weight.sum(0).expand(5, -1)
    cases.assert_close(x.grad, exact.detach(), 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("way", ["weight", "activations"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_of_a_trained_a_is_float32_in_low_precision(autocast, way):
    dtype = torch.float32 if autocast else torch.bfloat16
    layer = trained(RandLoRALinear(12, 20, rank=4, dtype=dtype, train_a=True))
    layer.choice = Choice(way, way, way)
    exact, x = copy.deepcopy(layer).double(), torch.randn(5, 12, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        layer(x).float().sum().backward()
    exact(x.double()).sum().backward()
    for got, want in zip(adapter_parameters(layer), adapter_parameters(exact), strict=True):
        assert got.grad.dtype == torch.float32
        # x, B, C, the output's gradient and P are rounded, in sums that cancel.
        cases.assert_close(got.grad.double(), want.grad, 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_is_adapted_under_autocast_has_its_bases(dtype):
    bank = BasisBank("dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = RandLoRALinear(12, 9, rank=3, bank=bank, dtype=dtype)
        held = bank.nbytes
        layer(torch.randn(4, 12, dtype=dtype))
    assert bank.nbytes == held
    assert held == (3 * 9 + 12 * 9) * (8 if dtype == torch.float64 else 4 + 2)


def test_autocast_leaves_float64_alone():
    layer = trained(RandLoRALinear(12, 20, rank=4)).double()
    x = torch.randn(5, 12).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer.eval()(x))
        assert layer(x).dtype == torch.float64


@pytest.mark.parametrize("read", [lambda layer, x: layer(x), lambda layer, x: layer.weight])
def test_backward_does_not_depend_on_autocast_being_on(read):
    layer = trained(RandLoRALinear(12, 20, rank=4))
    x = torch.randn(5, 12)
    want = torch.autograd.grad(read(layer, x).sum(), layer.randlora_gamma)[0]
    y = read(layer, x).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(y, layer.randlora_gamma)[0]
    assert torch.equal(got, want)


def test_shapes_are_inferred_on_the_meta_device():
    with torch.device("meta"):
        layer = RandLoRALinear(12, 20, rank=4)
        assert layer(torch.empty(5, 12)).shape == (5, 20)


# torch 2.13's own tracer instantiates autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse", "isometric"])
@pytest.mark.parametrize("read", ["forward", "weight"])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
def test_it_compiles_as_one_graph(kind, read, shape):
    layer = trained(
        RandLoRALinear(*shape, rank=4, bank=BasisBank(kind, sparsity=SPARSITY.get(kind)))
    )

    def fn(x):
        return layer(x) if read == "forward" else F.linear(x, layer.weight)

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for tokens in (5, 500):  # through the activations, and through the weight
        x = torch.randn(tokens, shape[0])
        got = torch.autograd.grad(compiled(x).sum(), layer.randlora_gamma)[0]
        want = torch.autograd.grad(fn(x).sum(), layer.randlora_gamma)[0]
        cases.assert_close(compiled(x), fn(x), 1e-5)
        cases.assert_close(got, want, 1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiling_before_the_bases_are_drawn_draws_them():
    torch.compiler.reset()
    layer = trained(RandLoRALinear(12, 20, rank=4))
    x = torch.randn(5, 12)

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    got = torch.compile(fn, fullgraph=True, backend="eager")(x)
    assert torch.equal(got, fn(x))


@pytest.mark.parametrize("train_a", [False, True])
def test_torch_func_takes_gradients(train_a):
    layer = trained(RandLoRALinear(12, 20, rank=4, train_a=train_a)).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    want = torch.autograd.grad(layer(x).square().sum(), [layer.get_parameter(n) for n in got])
    for one, other in zip(got.values(), want, strict=True):
        cases.assert_close(one, other, 1e-12)


def test_attention_that_only_reads_the_weight_sees_the_update():
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    attention.out_proj = RandLoRALinear.from_linear(attention.out_proj, rank=4)
    x = torch.randn(2, 5, 12)
    before = attention(x, x, x)[0]
    trained(attention.out_proj)
    after = attention(x, x, x)[0]
    assert (after - before).abs().max() > 1e-2
    after.sum().backward()
    assert attention.out_proj.randlora_gamma.grad.abs().min() > 0
    with torch.no_grad():
        fast = attention.eval()(x, x, x, need_weights=False)[0]
    cases.assert_close(fast, after.detach(), 1e-5)


def test_a_tensor_that_outlived_a_transform_is_an_input_like_others():
    """It is a wrapper, which an autograd function has to unwrap."""
    layer, escaped = RandLoRALinear(6, 5, rank=2), []
    nn.init.normal_(layer.randlora_gamma)
    x = torch.randn(3, 6, requires_grad=True)
    torch.func.grad(lambda x: escaped.append(2 * x) or x.sum())(x)
    layer(escaped[0]).sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer.weight.sum(0).expand(3, 6))
