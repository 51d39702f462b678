import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora import BasisBank, RandLoRALinear
from randlora.planning import Choice
from tests import cases

SPARSITY = {"dense": None, "sparse": None, "very_sparse": 20.0}
SHAPES = [(12, 20), (20, 12), (12, 12)]  # (in, out)


class Doubled(nn.Linear):
    """A subclass with a forward of its own, which reads the weight."""

    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass with the forward of nn.Linear and state of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "kept"


def trained(layer):
    nn.init.normal_(layer.randlora_gamma, std=0.1)
    return layer


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_made_and_used_like_a_linear(in_features, out_features, bias):
    layer = RandLoRALinear(in_features, out_features, bias, rank=5)
    assert isinstance(layer, nn.Linear)
    assert (layer.bias is not None) == bias
    assert layer.rank == 5
    assert layer.num_bases == math.ceil(12 / 5)
    assert layer.scaling == 1.0
    x = torch.randn(2, 3, in_features)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))
    layer = trained(layer)
    want = F.linear(x, layer.base_weight + layer.delta_weight(), layer.bias)
    cases.assert_close(layer(x), want, 1e-5)
    cases.assert_close(layer.weight, layer.base_weight + layer.delta_weight(), 1e-6)


def test_the_line_of_the_layer_says_what_it_is():
    layer = RandLoRALinear(12, 20, rank=5, alpha=10, dropout=0.1)
    assert repr(layer) == (
        "RandLoRALinear(in_features=12, out_features=20, bias=True, rank=5, num_bases=3, "
        "scaling=2, dropout=0.1)"
    )


def test_initialisation_is_gamma_zero_and_lambda_constant():
    layer = RandLoRALinear(96, 48, rank=6)
    assert torch.equal(layer.randlora_gamma, torch.zeros(8, 48))
    assert torch.equal(layer.randlora_lambda, torch.full((8, 6), 1 / math.sqrt(48)))
    assert layer.delta_weight().count_nonzero() == 0


def test_the_default_scale_makes_the_update_as_large_as_gamma():
    """Whatever the size and the rank: what Λ = 1/√m is for.

    A column of ΔW shares its Γ and A, so the spread of its variance is about √(2 / p): over p
    columns the standard error of the whole is some 2 %.
    """
    for size, rank in [(128, 2), (128, 64), (512, 4)]:
        layer = RandLoRALinear(size, size, rank=rank)
        nn.init.normal_(layer.randlora_gamma)
        assert abs(layer.delta_weight().std() - 1) < 0.1


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_delta_weight_scales_with_alpha_over_rank(in_features, out_features):
    one = trained(RandLoRALinear(in_features, out_features, rank=4))
    two = RandLoRALinear(in_features, out_features, rank=4, alpha=12)
    two.load_state_dict(one.state_dict())
    assert two.scaling == 3.0
    cases.assert_close(two.delta_weight(), 3 * one.delta_weight(), 1e-6)


def test_only_lambda_and_gamma_are_trained_and_float32():
    layer = RandLoRALinear(12, 20, rank=4, dtype=torch.bfloat16)
    kinds = {n: (p.requires_grad, p.dtype) for n, p in layer.named_parameters()}
    assert kinds == {
        "weight": (False, torch.bfloat16),
        "bias": (False, torch.bfloat16),
        "randlora_lambda": (True, torch.float32),
        "randlora_gamma": (True, torch.float32),
    }
    assert list(layer.state_dict()) == list(kinds)
    trained(layer)(torch.randn(3, 12, dtype=torch.bfloat16)).sum().backward()
    assert layer.randlora_gamma.grad.dtype == torch.float32


def test_the_effective_weight_is_differentiable():
    layer = trained(RandLoRALinear(12, 20, rank=4)).double()
    x = torch.randn(7, 12, dtype=torch.float64)
    adapter = [layer.randlora_lambda, layer.randlora_gamma]
    through_forward = torch.autograd.grad(layer(x).square().sum(), adapter)
    y = F.linear(x, layer.weight, layer.bias)
    through_weight = torch.autograd.grad(y.square().sum(), adapter)
    for one, other in zip(through_forward, through_weight, strict=True):
        cases.assert_close(one, other, 1e-12)


def test_a_failure_of_the_effective_weight_is_not_taken_for_the_base_weight():
    layer = RandLoRALinear(12, 20, rank=4)
    del layer.adapter.bank
    layer.adapter.forget_bases()
    with pytest.raises(RuntimeError, match="effective weight could not be computed"):
        _ = layer.weight


# --- from_linear, subclasses ---------------------------------------------------------------------


def test_from_linear_shares_and_freezes_the_parameters():
    linear = nn.Linear(12, 20)
    layer = RandLoRALinear.from_linear(linear, rank=4)
    assert type(layer) is RandLoRALinear
    assert layer.base_weight is linear.weight
    assert layer.bias is linear.bias
    assert not linear.weight.requires_grad
    assert type(linear) is nn.Linear
    assert [n for n, _ in linear.named_parameters()] == ["weight", "bias"]
    x = torch.randn(3, 12)
    cases.assert_close(trained(layer)(x), F.linear(x, layer.weight, layer.bias), 1e-5)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_hooks_of_the_copy_are_its_own():
    linear = nn.Linear(12, 20)
    layer = RandLoRALinear.from_linear(linear, rank=4)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    linear(torch.randn(3, 12))
    assert calls == []


def test_a_subclass_keeps_its_forward_its_type_and_its_state():
    doubled = RandLoRALinear.from_linear(Doubled(12, 20), rank=4)
    x = torch.randn(3, 12)
    assert isinstance(trained(doubled), RandLoRALinear)
    assert isinstance(doubled, Doubled)
    cases.assert_close(doubled(x), 2 * F.linear(x, doubled.weight, doubled.bias), 1e-5)
    named = RandLoRALinear.from_linear(Named(12, 20), rank=4)
    assert named.note == "kept"
    assert type(named) is type(RandLoRALinear.from_linear(Named(5, 5), rank=1))


@pytest.mark.parametrize("kind", [nn.Linear, Doubled, Named])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_compute_the_same_and_still_share_a_bank(kind, duplicate):
    bank = BasisBank("sparse", seed=3)
    layers = [trained(RandLoRALinear.from_linear(kind(12, 20), rank=r, bank=bank)) for r in (2, 3)]
    copied = duplicate(nn.ModuleList(layers))
    assert copied[0].bank is copied[1].bank
    x = torch.randn(3, 12)
    for one, other in zip(layers, copied, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one(x), other(x))
        assert one.randlora_gamma.data_ptr() != other.randlora_gamma.data_ptr()


def test_a_copy_in_another_dtype_leaves_the_bases_of_the_original():
    layer = RandLoRALinear(12, 20, rank=4, bank=BasisBank())
    held = layer.bank.nbytes
    other = copy.deepcopy(layer).double()
    assert layer.bank.nbytes == 3 * held
    del other
    assert layer.bank.nbytes == held


def test_a_copy_has_its_bases_at_once():
    layer = RandLoRALinear(12, 20, rank=4, bank=BasisBank())
    assert pickle.loads(pickle.dumps(layer)).bank.nbytes == layer.bank.nbytes > 0


def test_from_linear_of_a_compiled_layer_does_not_go_on_calling_it():
    linear = nn.Linear(12, 20)
    linear.compile(backend="eager")
    layer = trained(RandLoRALinear.from_linear(linear, rank=4))
    x = torch.randn(3, 12)
    cases.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-5)


def test_a_layer_made_in_inference_mode_can_be_trained():
    linear = nn.Linear(12, 20)
    with torch.inference_mode():
        layer = RandLoRALinear.from_linear(linear, rank=4)
    layer(torch.randn(3, 12)).sum().backward()
    assert layer.randlora_gamma.grad.abs().max() > 0


def test_layers_made_without_a_bank_share_one_and_do_not_keep_it():
    one, two = RandLoRALinear(12, 20, rank=4), RandLoRALinear(8, 30, rank=2)
    assert one.bank is two.bank
    assert repr(one.bank) == "BasisBank('dense', seed=0)"
    del one, two
    assert RandLoRALinear(4, 4, rank=2).bank.nbytes == 4 * (2 * 4 + 4 * 4)


# --- state ---------------------------------------------------------------------------------------


def test_state_dicts_of_plain_and_adapted_layers_load():
    linear, layer = nn.Linear(12, 20), trained(RandLoRALinear(12, 20, rank=4))
    before = layer.delta_weight()
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.base_weight, linear.weight)
    assert torch.equal(layer.delta_weight(), before)
    other = RandLoRALinear(12, 20, rank=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


def test_half_an_adapter_does_not_load():
    layer = RandLoRALinear(12, 20, rank=4)
    state = layer.state_dict()
    del state["randlora_gamma"]
    with pytest.raises(RuntimeError, match=r"Missing key.*randlora_gamma"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_bank_follows_dtype_and_device(kind):
    bank = BasisBank(kind, seed=1)
    layers = nn.ModuleList(trained(RandLoRALinear(12, 20, rank=r, bank=bank)) for r in (3, 4))
    before, held = layers[0].delta_weight(), bank.nbytes
    layers.to(torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert layers[0](x).dtype == torch.float64
    cases.assert_close(layers[0].delta_weight().float(), before, 1e-6)
    layers.to(torch.float32)
    assert bank.nbytes == held
    assert torch.equal(layers[0].delta_weight(), before)


def test_a_layer_on_the_meta_device_costs_nothing_and_comes_alive():
    with torch.device("meta"):
        layer = RandLoRALinear(12, 20, rank=4, bank=BasisBank(seed=5))
    assert layer.bank.nbytes == 0
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.delta_weight().count_nonzero() == 0
    twin = RandLoRALinear(12, 20, rank=4, bank=BasisBank(seed=5))
    with torch.no_grad():
        twin.randlora_gamma.copy_(trained(layer).randlora_gamma)
    assert torch.equal(layer.delta_weight(), twin.delta_weight())


def test_parameters_made_in_a_default_dtype_or_device_are_still_float32():
    torch.set_default_dtype(torch.float64)
    try:
        layer = RandLoRALinear(12, 20, rank=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.base_weight.dtype == torch.float64
    assert layer.randlora_gamma.dtype == torch.float32
    trained(layer)(torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    assert layer.randlora_gamma.grad.dtype == torch.float32


# --- plans --------------------------------------------------------------------------------------


def saved_bytes(layer, x):
    """Bytes kept for backward in storages that are no parameter's."""
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


@pytest.mark.parametrize("kind", ["dense", "very_sparse"])
def test_one_activation_is_kept_and_no_more(kind):
    for shape, keeps, kept in [
        ((48, 96), "x", 48),
        ((96, 48), "x", 96),
        ((96, 48), "xb", 48),
        ((48, 48), "x", 48),
    ]:
        layer = RandLoRALinear(*shape, rank=6, bank=BasisBank(kind))
        x = torch.randn(1000, shape[0], requires_grad=True)
        by_tokens = "activations" if keeps == "xb" else None
        layer.choice = Choice(grad_parameters=by_tokens, keeps=keeps)
        assert saved_bytes(layer, x) == 4 * 1000 * kept
        layer.choice = Choice("weight", "weight", by_tokens, keeps, keep_weight=True)
        assert saved_bytes(layer, x) == 4 * (1000 * kept + shape[0] * shape[1])
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
    layer = trained(RandLoRALinear(6, 4, rank=2, dropout=0.4)).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def fn(x, lam, gamma):
        torch.manual_seed(0)
        return layer(x)

    assert torch.autograd.gradcheck(fn, (x, layer.randlora_lambda, layer.randlora_gamma))


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


def test_torch_func_takes_gradients():
    layer = trained(RandLoRALinear(12, 20, rank=4)).double()
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


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": -3}, ValueError, "rank must be at least 1, got -3"),
        ({"rank": 13}, ValueError, r"rank must be at most min\(.*\) = 12 .* got 13"),
        ({"rank": 4.0}, TypeError, "rank must be an integer, got 4.0 of type float"),
        ({"rank": True}, TypeError, "rank must be an integer, got True"),
        ({"rank": "4"}, TypeError, "rank must be an integer, got '4'"),
        ({"rank": 4, "alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
        ({"rank": 4, "alpha": math.inf}, ValueError, "alpha must be finite, got inf"),
        ({"rank": 4, "alpha": "8"}, TypeError, "alpha must be a number, got '8'"),
        ({"rank": 4, "dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1"),
        ({"rank": 4, "dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
        ({"rank": 4, "dropout": math.nan}, ValueError, "dropout must be finite, got nan"),
        ({"rank": 4, "num_bases": 0}, ValueError, "num_bases must be at least 1, got 0"),
        ({"rank": 4, "num_bases": 4}, ValueError, r"num_bases must be at most ceil\(12 / 4\) = 3"),
        ({"rank": 4, "num_bases": 1.5}, TypeError, "num_bases must be an integer, got 1.5"),
        ({"rank": 4, "bank": "dense"}, TypeError, "bank must be a BasisBank, got str"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_changed(keywords, error, message):
    linear = nn.Linear(12, 20)
    with pytest.raises(error, match=message):
        RandLoRALinear(12, 20, **keywords)
    with pytest.raises(error, match=message):
        RandLoRALinear.from_linear(linear, **keywords)
    assert linear.weight.requires_grad


class Planned(nn.Linear):
    def plan(self):
        return "mine"


def with_scaling():
    linear = nn.Linear(12, 20)
    linear.scaling = 3.0
    return linear


def with_forward(linear):
    linear.forward = linear.forward
    return linear


def quantised():
    linear = nn.Linear(12, 20)
    linear.weight = nn.Parameter(torch.zeros(20, 12, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv1d(3, 4, 1), "must be an nn.Linear, got Conv1d"),
        (lambda: nn.Bilinear(3, 4, 5), "must be an nn.Linear, got Bilinear"),
        (lambda: RandLoRALinear(3, 4, rank=1), "RandLoRALinear is adapted already"),
        (lambda: nn.Linear(0, 4), "Linear has an empty weight"),
        (with_scaling, "Linear has an attribute 'scaling' of its own"),
        (lambda: Planned(3, 4), "Planned has an attribute 'plan' of its own"),
        (lambda: with_forward(nn.Linear(3, 4)), "its forward is bound to it"),
        (lambda: nn.LazyLinear(4), "LazyLinear has no sizes before it is run once"),
        (quantised, "Linear has a weight of torch.int8, which is not floating"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
            "ParametrizedLinear computes its weight",
        ),
    ],
)
def test_what_is_no_plain_linear_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        RandLoRALinear.from_linear(make(), rank=1)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 11), ValueError, r"x must have shape \(\.\.\., 12\), got \(3, 11\)"),
        (torch.zeros(()), ValueError, r"x must have shape \(\.\.\., 12\), got \(\)"),
        (torch.zeros(3, 12).long(), TypeError, "x must be a tensor of torch.float32, got .*int64"),
        (torch.zeros(3, 12).double(), TypeError, "x must be a tensor of .*32, got torch.float64"),
        ([0.0] * 12, TypeError, "x must be a tensor, got list"),
    ],
)
def test_bad_inputs_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        RandLoRALinear(12, 20, rank=4)(x)
    with pytest.raises(error, match=message):
        RandLoRALinear(12, 20, rank=4, dropout=0.5)(x)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", cases.KINDS)
def test_moving_to_cuda_changes_nothing(kind):
    layer = trained(RandLoRALinear(12, 20, rank=4, bank=BasisBank(kind)))
    x = torch.randn(5, 12)
    before = layer(x)
    layer.cuda()
    cases.assert_close(layer(x.cuda()).cpu(), before, 1e-5)
    assert {device.type for device, _ in layer.bank._stores} == {"cuda"}
