"""``RandLoRALinear``: construction, ``from_linear``, copies, ``state_dict``."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora import BasisBank, RandLoRALinear, adapter_parameters
from randlora.bases.bank import STRENGTH
from randlora.modules.weight_update import A_START
from tests.support import cases
from tests.support.small import trained

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


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_made_and_used_like_a_linear(in_features, out_features, bias):
    layer = RandLoRALinear(in_features, out_features, bias, rank=5)
    assert isinstance(layer, nn.Linear)
    assert (layer.bias is not None) == bias
    assert layer.rank == 5
    assert layer.num_bases == math.ceil(12 / 5)
    size = in_features * out_features * layer.num_bases
    assert layer.scaling == pytest.approx(STRENGTH / math.sqrt(size))
    x = torch.randn(2, 3, in_features)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))
    layer = trained(layer)
    want = F.linear(x, layer.base_weight + layer.delta_weight(), layer.bias)
    cases.assert_close(layer(x), want, 1e-5)
    cases.assert_close(layer.weight, layer.base_weight + layer.delta_weight(), 1e-5)


def test_the_line_of_the_layer_says_what_it_is():
    layer = RandLoRALinear(12, 20, rank=5, alpha=10, dropout=0.1, train_a=True)
    assert repr(layer) == (
        "RandLoRALinear(in_features=12, out_features=20, bias=True, rank=5, num_bases=3, "
        "scaling=2, dropout=0.1, train_a=True)"
    )


def test_initialisation_is_gamma_zero_and_lambda_constant():
    layer = RandLoRALinear(96, 48, rank=6)
    assert torch.equal(layer.randlora_gamma, torch.zeros(8, 48))
    assert torch.equal(layer.randlora_lambda, torch.ones(8, 6))
    assert layer.delta_weight().count_nonzero() == 0


STEPS = [(64, 64, 8), (512, 512, 2), (512, 512, 64), (128, 512, 16), (512, 128, 2), (384, 96, 8)]


@pytest.mark.parametrize(("out", "in_", "rank"), STEPS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_first_step_has_the_same_spectral_norm_for_every_size_and_rank(kind, out, in_, rank):
    """The reason for the default scaling, for a gradient of rank one (``docs/rates.md``).

    With orthonormal columns of ``B`` the norm is ``√(2/π + r/p)`` of ``STRENGTH`` times the rate.
    Other columns overlap, which adds up to a factor of ``√2``. Ranks are at most an eighth of
    ``p``; near ``p`` the norm is larger. Sums of few random terms leave it uncertain by a quarter,
    but a wrong power of a size would show.
    """
    torch.manual_seed(0)
    layer = RandLoRALinear(in_, out, bias=False, rank=rank, bank=BasisBank(kind, seed=1)).double()
    optimiser = torch.optim.AdamW(adapter_parameters(layer), lr=1e-3)
    (layer(torch.randn(1, in_).double()) * torch.randn(1, out)).sum().backward()
    optimiser.step()
    norm = torch.linalg.matrix_norm(layer.delta_weight(), 2)
    expected = 1e-3 * STRENGTH * math.sqrt(2 / math.pi + rank / min(out, in_))
    most = expected if kind == "isometric" else math.sqrt(2) * expected
    assert 0.75 * expected < norm < 1.25 * most, norm / expected


def test_a_trained_a_makes_the_same_first_step():
    """It starts smaller than the shared one, and its default scaling makes up for that, exactly."""
    results = []
    for train_a in (False, True):
        layer = RandLoRALinear(48, 60, rank=4, bank=BasisBank(seed=1), train_a=train_a)
        torch.manual_seed(0)
        torch.nn.init.normal_(layer.randlora_gamma)
        results.append((layer.delta_weight(), layer.scaling))
    (frozen, scaling), (own, larger) = results
    assert torch.equal(own, frozen)
    assert larger == scaling / A_START == 8 * scaling
    assert RandLoRALinear(48, 60, rank=4, alpha=2, train_a=True).scaling == 0.5


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_delta_weight_scales_with_alpha_over_rank(in_features, out_features):
    one = trained(RandLoRALinear(in_features, out_features, rank=4))
    two = RandLoRALinear(in_features, out_features, rank=4, alpha=12)
    two.load_state_dict(one.state_dict())
    assert two.scaling == 3.0
    cases.assert_close(two.delta_weight(), 3 / one.scaling * one.delta_weight(), 1e-6)


@pytest.mark.parametrize("own", [(), ("randlora_a",)])
def test_only_lambda_and_gamma_and_if_asked_a_are_trained_and_float32(own):
    layer = RandLoRALinear(12, 20, rank=4, dtype=torch.bfloat16, train_a=bool(own))
    kinds = {n: (p.requires_grad, p.dtype) for n, p in layer.named_parameters()}
    assert kinds == {
        "weight": (False, torch.bfloat16),
        "bias": (False, torch.bfloat16),
        "randlora_lambda": (True, torch.float32),
        "randlora_gamma": (True, torch.float32),
        **dict.fromkeys(own, (True, torch.float32)),
    }
    assert list(layer.state_dict()) == list(kinds)
    trained(layer)(torch.randn(3, 12, dtype=torch.bfloat16)).sum().backward()
    for parameter in adapter_parameters(layer):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.count_nonzero()


def test_an_a_of_its_own_starts_as_a_part_of_the_shared_one():
    bank = BasisBank(seed=2)
    one, other = (RandLoRALinear(12, 20, rank=4, bank=bank, train_a=True) for _ in range(2))
    assert torch.equal(one.randlora_a, A_START * bank.a(4, 12))
    with torch.no_grad():
        one.randlora_a.add_(1)
    assert torch.equal(other.randlora_a, A_START * bank.a(4, 12))
    assert torch.equal(one.operands(torch.float32)[0], bank.a(4, 12))  # the bank's is frozen
    assert trained(one).delta_weight().ne(0).all()
    one.reset_parameters()
    assert torch.equal(one.randlora_a, A_START * bank.a(4, 12))
    assert not one.delta_weight().count_nonzero()


def test_the_effective_weight_is_differentiable():
    layer = trained(RandLoRALinear(12, 20, rank=4, train_a=True)).double()
    x = torch.randn(7, 12, dtype=torch.float64)
    adapter = adapter_parameters(layer)
    assert len(adapter) == 3
    through_forward = torch.autograd.grad(layer(x).square().sum(), adapter)
    y = F.linear(x, layer.weight, layer.bias)
    through_weight = torch.autograd.grad(y.square().sum(), adapter)
    for one, other in zip(through_forward, through_weight, strict=True):
        cases.assert_close(one, other, 1e-12)


def test_a_failure_of_the_effective_weight_is_not_taken_for_the_base_weight():
    layer = RandLoRALinear(12, 20, rank=4)
    del layer.weight_update.bank
    layer.weight_update.forget_bases()
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
    layers = [
        trained(RandLoRALinear.from_linear(kind(12, 20), rank=2, bank=bank, train_a=train_a))
        for train_a in (False, True)
    ]
    nn.init.normal_(layers[1].randlora_a)
    copied = duplicate(nn.ModuleList(layers))
    assert copied[0].bank is copied[1].bank
    x = torch.randn(3, 12)
    for one, other in zip(layers, copied, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one(x), other(x))
        for p, q in zip(adapter_parameters(one), adapter_parameters(other), strict=True):
            assert p.data_ptr() != q.data_ptr()


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


def test_layers_made_without_a_bank_share_one_and_do_not_keep_it(monkeypatch):
    # A layer of another test may be alive still, in a reference cycle, and with it its bank.
    monkeypatch.setattr("randlora.modules.linear._default_bank", None)
    one, two = RandLoRALinear(12, 20, rank=4), RandLoRALinear(8, 30, rank=2)
    assert one.bank is two.bank
    assert repr(one.bank) == "BasisBank('isometric', seed=0)"
    del one, two
    assert RandLoRALinear(4, 4, rank=2).bank.nbytes == 4 * (2 * 4 + 4 * 4)  # small: one factor


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_a", [False, True])
def test_state_dicts_of_plain_and_adapted_layers_load(train_a):
    linear, layer = nn.Linear(12, 20), trained(RandLoRALinear(12, 20, rank=4, train_a=train_a))
    nn.init.normal_(adapter_parameters(layer)[-1])
    before = layer.delta_weight()
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.base_weight, linear.weight)
    assert torch.equal(layer.delta_weight(), before)
    other = RandLoRALinear(12, 20, rank=4, train_a=train_a)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("key", ["randlora_gamma", "randlora_a"])
def test_half_an_adapter_does_not_load(key):
    layer = RandLoRALinear(12, 20, rank=4, train_a=True)
    state = layer.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
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


@pytest.mark.parametrize("train_a", [False, True])
def test_a_layer_on_the_meta_device_costs_nothing_and_comes_alive(train_a):
    with torch.device("meta"):
        layer = RandLoRALinear(12, 20, rank=4, bank=BasisBank(seed=5), train_a=train_a)
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


@pytest.mark.cuda
@pytest.mark.parametrize("kind", cases.KINDS)
def test_moving_to_cuda_changes_nothing(kind):
    layer = trained(RandLoRALinear(12, 20, rank=4, bank=BasisBank(kind)))
    x = torch.randn(5, 12)
    before = layer(x)
    layer.cuda()
    cases.assert_close(layer(x.cuda()).cpu(), before, 1e-5)
    assert {device.type for device, _ in layer.bank._stores} == {"cuda"}
