"""A call of one token without gradients is prepared, and computes what any other call does."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import randlora
from randlora import BasisBank, Choice, RandLoRALinear
from randlora.modules import one_token
from tests.support.cases import KINDS, assert_close

SHAPES = [(64, 48), (48, 64), (64, 64)]


@pytest.fixture
def prepared(monkeypatch):
    """How often a prepared call was used."""
    calls = []
    original = one_token.OneToken.__call__

    def call(self, x, bias):
        calls.append(x.shape)
        return original(self, x, bias)

    monkeypatch.setattr(one_token.OneToken, "__call__", call)
    return calls


def a_layer(shape=(64, 48), dtype=torch.float64, kind="dense", **keywords):
    torch.manual_seed(0)
    layer = RandLoRALinear(*shape, rank=4, bank=BasisBank(kind, seed=1), dtype=dtype, **keywords)
    layer.randlora_gamma.data.normal_()
    layer.double() if dtype == torch.float64 else None
    return layer.eval()


def a_token(layer, *lead):
    torch.manual_seed(1)
    x = torch.randn(*(lead or (1, 1)), layer.in_features, dtype=torch.float64)
    return x.to(layer.base_weight.dtype)


def check(layer, x=None):
    """Compare with the effective weight, by which a call with more tokens or a gradient may go."""
    x = a_token(layer) if x is None else x
    with torch.no_grad():
        got, want = layer(x), F.linear(x, layer.weight, layer.bias)
    size = F.linear(x.abs(), layer.weight.abs(), None).max()
    assert_close(got / size, want / size, 1e-14 if x.dtype == torch.float64 else 2e-2)
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("train_a", [False, True])
def test_it_is_the_effective_weight_s_output(shape, kind, train_a, prepared):
    layer = a_layer(shape, kind=kind, train_a=train_a)
    for lead in ((1, 1), (1,), (), (1, 1, 1)):
        check(layer, a_token(layer, *lead) if lead else a_token(layer)[0, 0])
    assert len(prepared) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bits_of_the_call_with_gradients(kind, dtype, prepared):
    for shape in SHAPES:
        layer = a_layer(shape, dtype, kind)
        x = a_token(layer)
        want = layer(x).detach()
        with torch.no_grad():
            assert torch.equal(layer(x), want)
            assert torch.equal(layer(x), want)
        with torch.inference_mode():
            assert torch.equal(layer(x), want)
    assert len(prepared) == 9


def changed_in_place(layer):
    with torch.no_grad():
        layer.randlora_lambda.mul_(2)
        layer.randlora_gamma.add_(1)
        layer.base_weight.mul_(3)


def replaced(layer):
    layer.randlora_gamma = nn.Parameter(torch.randn_like(layer.randlora_gamma))


def replaced_weight(layer):
    layer._parameters["weight"] = nn.Parameter(torch.randn_like(layer.base_weight))


def other_data(layer):
    layer.randlora_gamma.data = torch.randn_like(layer.randlora_gamma)


def other_bias(layer):
    layer.bias = nn.Parameter(torch.randn_like(layer.bias))


def in_float32(layer):
    layer.float()


def in_bfloat16_by_hand(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()


def weight_in_bfloat16_by_hand(layer):
    layer.float()
    check(layer)
    for parameter in (layer.base_weight, layer.bias):
        parameter.data = parameter.data.bfloat16()


def by_weight(layer):
    layer.choice = Choice(forward="weight")


def parametrized(layer):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(layer, "randlora_lambda", Twice())


def merged(layer):
    randlora.merge(layer)


def another_adapter(layer):
    model = nn.Sequential(layer)
    randlora.inject(model, 6, adapter="other")
    randlora.set_adapter(model, "other")
    nn.init.normal_(layer.double().other_randlora_gamma)


CHANGES = [
    changed_in_place, replaced, replaced_weight, other_data, other_bias, in_float32,
    in_bfloat16_by_hand, weight_in_bfloat16_by_hand, by_weight, parametrized, merged,
    another_adapter,
]  # fmt: skip
KEEP_THE_OUTPUT = by_weight, merged, in_float32, in_bfloat16_by_hand, weight_in_bfloat16_by_hand
KEEP_IT_PREPARED = changed_in_place, other_data, other_bias


@pytest.mark.parametrize("change", CHANGES)
def test_it_notices_what_is_changed(change, prepared):
    layer = a_layer()
    before = check(layer)
    one = layer._randlora.one_token
    change(layer)
    prepared.clear()
    after = check(layer)
    assert bool(prepared) == (change not in (by_weight, parametrized, merged, in_bfloat16_by_hand))
    same = (before.double() - after.double()).norm() < 0.02 * before.norm()
    assert same == (change in KEEP_THE_OUTPUT)
    assert (layer._randlora.one_token is one) == (change in (*KEEP_IT_PREPARED, merged))
    check(layer)


def test_it_follows_the_active_adapter(prepared):
    layer = a_layer()
    another_adapter(layer)
    other = check(layer)
    randlora.set_adapter(layer, "default")
    default = check(layer)
    assert not torch.allclose(other, default)
    for name, want in (("other", other), ("default", default)):
        randlora.set_adapter(layer, name)
        assert torch.equal(check(layer), want)
    assert len(prepared) == 4


def test_gradients_are_recorded_after_a_prepared_call(prepared):
    layer = a_layer()
    check(layer)
    layer(a_token(layer)).sum().backward()
    assert len(prepared) == 1
    assert layer.randlora_gamma.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*jit.script.*is deprecated:DeprecationWarning")
def test_forward_mode_goes_through_a_prepared_call():
    layer = a_layer()
    x, tangent = a_token(layer), a_token(layer) + 1
    check(layer)
    with torch.no_grad(), forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
        assert_close(y.tangent, F.linear(tangent, layer.weight), 1e-13)


def test_a_scope_that_disables_adapters_is_noticed(prepared):
    layer = a_layer()
    check(layer)
    with randlora.disabled(layer), torch.no_grad():
        x = a_token(layer)
        assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))
    check(layer)
    assert len(prepared) == 2


def test_other_calls_are_not_prepared(prepared):
    layer = a_layer(dtype=torch.float32, dropout=0.5)
    x = a_token(layer)
    check(layer)  # in evaluation it could be, but then training would have to be noticed
    with torch.no_grad():
        assert not torch.equal(layer.train()(x), layer(x))
    layer = a_layer(dtype=torch.float32)
    layer(x)
    check(layer, x.expand(2, 1, -1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer(x.half()).dtype == torch.bfloat16
    assert not prepared
    check(layer, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(prepared) == 1


def test_a_call_with_other_parameters_uses_them(prepared):
    layer = a_layer()
    x = a_token(layer)
    check(layer)
    twice = {"randlora_gamma": 2 * layer.randlora_gamma.detach()}
    with torch.no_grad():
        delta = F.linear(x, layer.delta_weight())
        got = torch.func.functional_call(layer, twice, x)
        assert_close(got, layer(x) + delta, 1e-13)
    check(layer)


@pytest.mark.filterwarnings(
    "ignore:.*(is deprecated|should not be instantiated):DeprecationWarning"
)
def test_a_graph_has_no_prepared_call_in_it():
    layer = a_layer()
    x = a_token(layer)
    want = check(layer)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(2 * x) - layer.bias, 2 * (want - layer.bias))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)


BAD = [torch.ones(1, 63), torch.ones(64, 1), torch.ones(1, 64, dtype=torch.float64)]


@pytest.mark.parametrize("bad", BAD, ids=["short", "turned", "float64"])
def test_bad_input_is_refused_as_before(bad):
    layer = a_layer(dtype=torch.float32)
    check(layer)
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match="input x must"):
        layer(bad)
    with torch.no_grad(), pytest.raises(TypeError, match="input x must be a tensor"):
        layer(None)
    check(layer)
    x = a_token(layer)
    layer.base_weight.data = layer.base_weight.data.bfloat16()
    with torch.no_grad(), pytest.raises(TypeError, match=r"must be a tensor of torch.bfloat16"):
        layer(x)


def test_copies_prepare_their_own(prepared):
    layer = a_layer()
    check(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied._randlora.one_token is None
        copied.randlora_gamma.data.zero_()
        with torch.no_grad():
            x = a_token(layer)
            assert torch.equal(copied(x), F.linear(x, layer.base_weight, layer.bias))
    check(layer)


def test_bases_that_grow_are_not_kept_twice(prepared):
    layer = a_layer(dtype=torch.float32)
    check(layer)
    RandLoRALinear(200, 300, rank=8, bank=layer.bank)
    old = layer._randlora.one_token
    check(layer)
    assert layer._randlora.one_token is not old
    _, b = layer.operands(torch.float32)
    assert layer._randlora.one_token.b is b


def test_a_checkpointed_call_of_another_adapter_is_refused():
    """A re-entrant checkpoint runs its forward without gradients."""
    layer = a_layer()
    another_adapter(layer)
    x = a_token(layer).requires_grad_()
    for _ in range(2):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    randlora.set_adapter(layer, "default")
    with pytest.raises(RuntimeError, match="recomputes it with adapter 'default'"):
        y.sum().backward()
