"""A call of one token without gradients is prepared, and computes what any other call does."""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import randlora
from randlora import BasisBank, Choice, RandLoRALinear
from randlora.core import kernel
from randlora.modules import one_token
from tests.support.cases import KINDS, assert_close

SHAPES = [(64, 48), (48, 64), (64, 64)]


@pytest.fixture
def prepared(monkeypatch):
    """How often a prepared call was used."""
    calls = []

    def few_linear(x, *arguments):
        calls.append(x.shape)
        return kernel.few_linear(x, *arguments)

    monkeypatch.setattr(one_token, "few_linear", few_linear)
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
KEEP_IT_PREPARED = (
    changed_in_place, replaced, replaced_weight, other_data, other_bias, parametrized, merged
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_it_notices_what_is_changed(change, prepared):
    layer = a_layer()
    before = check(layer)
    one = layer._randlora.one_token
    change(layer)
    prepared.clear()
    after = check(layer)
    assert bool(prepared) == (change not in (by_weight, parametrized, merged))
    same = (before.double() - after.double()).norm() < 0.02 * before.norm()
    assert same == (change in KEEP_THE_OUTPUT)
    assert (layer._randlora.one_token is one) == (change in KEEP_IT_PREPARED)
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


@pytest.mark.filterwarnings("ignore:.*jit.script.*is deprecated")
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
    check(layer)
    prepared.clear()
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


@pytest.mark.filterwarnings("ignore:.*jit.trace.*is deprecated")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
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


def test_nothing_of_the_module_is_kept_alive():
    """Offloading puts weights in place for a call and takes them away."""
    layer = a_layer(dtype=torch.float32)
    check(layer)
    gone = [weakref.ref(p) for p in (layer.base_weight, layer.randlora_gamma)]
    layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    assert [ref() for ref in gone] == [None, None]
    check(layer)
    gone = [weakref.ref(layer.base_weight)]
    kept = layer.base_weight.to("meta")
    layer._parameters["weight"] = nn.Parameter(kept, requires_grad=False)
    assert gone[0]() is None


def test_bases_that_grow_are_not_kept_twice(prepared):
    layer = a_layer(dtype=torch.float32)
    check(layer)
    old = weakref.ref(layer.operands(torch.float32)[1].entries.untyped_storage())
    RandLoRALinear(200, 300, rank=8, bank=layer.bank)
    assert old() is None
    check(layer)
    check(layer)
    assert len(prepared) == 3


def test_what_is_kept_for_prepared_calls_is_counted_and_freed():
    bank = BasisBank("dense")
    kept = RandLoRALinear(64, 48, rank=4, bank=bank)
    held = bank.nbytes
    for alpha in (1.0, 2.0, 3.0):
        layer = RandLoRALinear(64, 48, rank=4, bank=bank, alpha=alpha).eval()
        check(layer)
        assert bank.nbytes == held + 4 * 4 * 48
        del layer
        assert bank.nbytes == held
    check(kept)


def test_an_adapter_that_is_switched_while_a_call_is_prepared_is_not_used(monkeypatch):
    layer = a_layer()
    another_adapter(layer)
    randlora.set_adapter(layer, "default")
    original = one_token.OneToken.__init__

    def switch_after(self, *arguments):
        original(self, *arguments)
        monkeypatch.undo()
        randlora.set_adapter(layer, "other")

    monkeypatch.setattr(one_token.OneToken, "__init__", switch_after)
    with torch.no_grad():
        layer(a_token(layer))  # of one of the two
    check(layer)


def test_a_call_that_cannot_be_prepared_is_tried_once(monkeypatch):
    made = []
    original = one_token.OneToken.__init__
    monkeypatch.setattr(
        one_token.OneToken, "__init__", lambda *args: made.append(1) or original(*args)
    )
    for layer in (a_layer(), a_layer(num_bases=1)):
        made.clear()
        layer.choice = Choice(forward="weight") if layer.num_bases > 1 else Choice()
        for _ in range(3):
            check(layer)
        assert len(made) == 1
        assert not layer._randlora.one_token.usable
    made.clear()
    check(a_layer(dropout=0.1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer = a_layer(dtype=torch.float32)
        layer(a_token(layer))
    assert not made


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_of_one_token_is_none():
    layer = a_layer()
    x = a_token(layer, 1)
    want = check(layer, x)
    with torch.no_grad():
        nested = torch.nested.nested_tensor([x])
        torch.testing.assert_close(layer(nested).unbind()[0], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_wider_parameters_than_float32_are_used_as_such(kind, dtype, prepared):
    for shape, train_a in itertools.product(((512, 600), (600, 512)), (False, True)):
        layer = RandLoRALinear(*shape, rank=4, bank=BasisBank(kind), dtype=dtype, train_a=train_a)
        layer.randlora_gamma.data.normal_()
        check(layer, a_token(layer, 1))
        assert prepared
        prepared.clear()
        wider = [layer.randlora_a] if train_a else [layer.randlora_lambda, layer.randlora_gamma]
        for parameter in wider:
            parameter.data = torch.randn_like(parameter, dtype=torch.float64)
        for tokens in (1, 2, 3):
            check(layer, a_token(layer, tokens))
        assert not prepared


@pytest.mark.parametrize("name", ["lambda", "gamma", "a"])
def test_parameters_of_other_shapes_are_refused(name):
    """They could be broadcast."""
    for tokens, before in itertools.product((1, 40), (False, True)):
        layer = a_layer(train_a=True)
        if before:
            check(layer)
        parameter = getattr(layer, f"randlora_{name}")
        parameter.data = parameter.data[:1]
        with torch.no_grad(), pytest.raises(ValueError, match="must have shape"):
            layer(a_token(layer, tokens))


def test_a_plan_that_is_fixed_later_is_followed(prepared):
    layer = a_layer()
    layer.choice = Choice(forward="weight")
    check(layer)
    assert not prepared
    layer.choice = Choice()
    check(layer)
    assert len(prepared) == 1


def test_bases_of_before_are_freed(prepared):
    layer = a_layer(dtype=torch.float32)
    check(layer)
    held = layer.bank.nbytes
    layer.double()
    assert layer.bank.nbytes < 2 * held  # of float64 alone, without what calls keep
    check(layer)
    other = BasisBank("dense", seed=7)
    randlora.inject(nn.Sequential(layer), 6, adapter="other", basis=other)
    randlora.set_adapter(layer, "other")
    check(layer)
    assert other.nbytes
    randlora.set_adapter(layer, "default")
    randlora.delete_adapter(layer, "other")
    assert other.nbytes == 0


def test_an_adapter_of_the_same_name_is_another(prepared):
    layer = a_layer()
    another_adapter(layer)
    check(layer)
    randlora.set_adapter(layer, "default")
    randlora.delete_adapter(layer, "other")
    randlora.inject(nn.Sequential(layer), 6, adapter="other", alpha=100.0)
    randlora.set_adapter(layer, "other")
    nn.init.normal_(layer.double().other_randlora_gamma)
    check(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_low_precision_are_prepared_too(dtype, prepared):
    layer = a_layer(dtype=torch.float32).to(dtype)
    check(layer)
    check(layer)
    assert len(prepared) == 2


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
