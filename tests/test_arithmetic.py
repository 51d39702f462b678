"""Sums of adapters: exact where a sum of updates is one, refused or merged where it is not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import add_weighted_adapter, inject, set_adapter, unload
from randlora.adapted import adapted_modules, delta
from tests.test_checkpoint import Net, plain, same, snapshot

TOKENS = torch.arange(10).reshape(2, 5)
CHOICES = {"rank": 3, "target_parameters": ["up", "down"]}


def several(*alphas, **keywords):
    """A model with adapters ``0``, ``1``, … that share all their bases, each with its alpha."""
    model = plain()
    for number, alpha in enumerate(alphas):
        inject(model, alpha=alpha, adapter=f"a{number}", **{**CHOICES, **keywords})
    return model


@torch.no_grad()
def train(model, adapter, what, seed):
    """Change ``lambda`` or ``gamma``, or both, of one adapter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapted_modules(model).values():
        for update in module._randlora.adapters.get(adapter, {}).values():
            for side, parameter in zip(("lambda", "gamma"), update.parameters(module), strict=True):
                if side in what:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))


def deltas(model, adapter):
    """The updates of one adapter in float64, by weight."""
    return {
        (name, parameter): delta(module, update, torch.float64).detach()
        for name, module in adapted_modules(model).items()
        for parameter, update in module._randlora.adapters.get(adapter, {}).items()
    }


def assert_is_sum(model, weights, adapter):
    """To a rounding of the numbers of each term, which float32 holds."""
    terms = [(w, deltas(model, name)) for name, w in weights.items()]
    got = deltas(model, adapter)
    assert got.keys() == set().union(*(term for _, term in terms))
    for place, update in got.items():
        parts = [w * term[place] for w, term in terms if place in term]
        size = sum(part.norm() for part in parts)
        assert (update - sum(parts)).norm() <= 2 * torch.finfo(torch.float32).eps * size


@given(
    st.lists(st.floats(-3, 3, width=16, allow_subnormal=False), min_size=1, max_size=3),
    st.lists(st.sampled_from([None, 1.0, 6, -2]), min_size=3, max_size=3),
    st.sampled_from(["lambda", "gamma"]),
)
def test_adapters_that_share_a_side_are_summed_exactly(amounts, alphas, side):
    model = several(*alphas)
    other = "gamma" if side == "lambda" else "lambda"
    for number in range(3):
        train(model, f"a{number}", other, seed=1)
        train(model, f"a{number}", side, seed=2 + number)
    weights = {f"a{number}": amount for number, amount in enumerate(amounts)}
    assert add_weighted_adapter(model, weights, "sum") is model
    assert_is_sum(model, weights, "sum")


@torch.no_grad()
def test_each_block_may_share_another_side_and_a_term_that_is_zero_shares_any():
    model = several(2, 3, 5)
    for number in range(3):
        train(model, f"a{number}", "lambda gamma", seed=number)
    for module in adapted_modules(model).values():
        ones, twos, threes = (module._randlora.adapters.get(f"a{i}", {}) for i in range(3))
        for parameter, one in ones.items():
            (lam, gamma), (other_lam, other_gamma), (third_lam, third_gamma) = (
                update.parameters(module) for update in (one, twos[parameter], threes[parameter])
            )
            other_lam[..., ::2, :] = lam[..., ::2, :]
            other_gamma[..., 1::2, :] = gamma[..., 1::2, :]
            third_lam[..., ::2, :] = 0
            third_gamma[..., 1::2, :] = 0
    weights = {"a0": 0.5, "a1": -2.0, "a2": 1.0}
    add_weighted_adapter(model, weights, "sum")
    assert_is_sum(model, weights, "sum")
    add_weighted_adapter(model, {"a2": 0.0, "a0": 1.0}, "same")
    assert_is_sum(model, {"a0": 1.0}, "same")


def test_adapters_of_different_layers_are_put_side_by_side():
    model = plain()
    inject(model, 3, adapter="one", target_modules="attention")
    inject(model, 2, adapter="two", target_modules="embed", alpha=3)
    inject(model, 2, adapter="three", target_modules=["conv", "head"], alpha=5)
    for number, name in enumerate(("one", "two", "three")):
        train(model, name, "lambda gamma", seed=number)
    weights = {"one": 2.0, "two": 3.0, "three": -1.0}
    add_weighted_adapter(model, weights, "all")
    assert_is_sum(model, weights, "all")
    # Nothing else moved, and the new one is an adapter like any other.
    assert {m._randlora.active for m in adapted_modules(model).values()} == {"one"}
    before = model(TOKENS)
    set_adapter(model, "all")
    assert not torch.equal(model(TOKENS), before)
    randlora.delete_adapter(model, "three")


def test_a_sum_that_is_no_update_is_refused_and_can_be_merged():
    model = several(2, 3)
    train(model, "a0", "lambda gamma", seed=1)
    train(model, "a1", "lambda gamma", seed=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'attention.in_proj_weight' must share.*in block 0; unl"):
        add_weighted_adapter(model, {"a0": 0.5, "a1": 0.5}, "sum")
    assert same(snapshot(model), before)
    weights = {"a0": 0.7, "a1": -0.3}
    terms = [(w, deltas(model, name)) for name, w in weights.items()]
    reference = plain().double()
    with torch.no_grad():
        for weight, term in terms:
            for (name, parameter), update in term.items():
                target = reference.get_submodule(name).get_parameter(parameter)
                target += weight * update.reshape(target.shape)
    assert unload(model, merge=weights) is model
    assert type(model) is Net
    assert not [m for m in model.modules() if hasattr(m, "_randlora")]
    for name, parameter in model.named_parameters():
        want = reference.get_parameter(name)
        # The sum of three in float32.
        assert (parameter - want).abs().max() <= 4 * 6e-8 * max(1, want.abs().max()), name
    assert dict(plain().named_parameters()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_merged_is_rounded_once(dtype):
    model = nn.Sequential(nn.Linear(6, 9)).to(dtype)
    inject(model, 2, adapter="one")
    inject(model, 2, adapter="two")
    train(model, "one", "lambda gamma", seed=1)
    train(model, "two", "lambda gamma", seed=2)
    want = model[0].base_weight.double() + sum(
        deltas(model, name)["0", "weight"] * 0.5 for name in ("one", "two")
    )
    unload(model, merge={"one": 0.5, "two": 0.5})
    assert model[0].weight.dtype == dtype
    bound = (0.5 + 2**-6) * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-15
    assert ((model[0].weight - want).abs() <= bound * want.abs() + 1e-15).all()


def test_a_single_adapter_is_scaled_and_transposed_weights_are_merged():
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(12, 5))
    base = model[0].weight.detach().clone()
    inject(model, 2, adapter="one")
    train(model, "one", "lambda gamma", seed=1)
    update = deltas(model, "one")["0", "weight"]  # (out, in)
    add_weighted_adapter(model, {"one": -1}, "minus")
    torch.testing.assert_close(deltas(model, "minus")["0", "weight"], -update, rtol=0, atol=0)
    unload(model, merge={"one": 2.0})
    torch.testing.assert_close(model[0].weight, (base + 2 * update.T).float(), rtol=1e-6, atol=1e-6)


OTHERS = {
    "another rank": {"rank": 2},
    "another seed": {"seed": 1},
    "another kind": {"basis": "sparse"},
    "fewer bases": {"num_bases": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_updates_that_do_not_go_together_are_refused(name):
    model = inject(plain(), 3, adapter="one")
    inject(model, **{"rank": 3, "adapter": "two", **OTHERS[name]})
    before = snapshot(model)
    with pytest.raises(ValueError, match="must be of one rank, number of bases and bank"):
        add_weighted_adapter(model, {"one": 1, "two": 1}, "sum")
    assert same(snapshot(model), before)


WRONG = {
    "no weights": ({}, "sum", ValueError, "weights must name an adapter"),
    "an unknown adapter": ({"a7": 1}, "sum", ValueError, "adapter must be one of 'a0', 'a1'"),
    "a name of another type": ({3: 1}, "sum", TypeError, "adapter must be a name"),
    "a weight of another type": ({"a0": "1"}, "sum", TypeError, r"weights\['a0'\] must be a num"),
    "an infinite weight": ({"a0": math.inf}, "sum", ValueError, r"weights\['a0'\] must be finite"),
    "no mapping": ([("a0", 1)], "sum", TypeError, "weights must be a mapping"),
    "a name that is there": ({"a0": 1}, "a1", ValueError, "adapter must be a new name"),
    "no name": ({"a0": 1}, "a b", ValueError, "adapter must be a name of letters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_refused(name):
    weights, adapter, error, message = WRONG[name]
    model = several(1, 1)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        add_weighted_adapter(model, weights, adapter)
    if adapter == "sum" and name != "no mapping":
        with pytest.raises(error, match=message.replace("weights", "merge")):
            unload(model, merge=weights)
    assert same(snapshot(model), before)


def test_what_no_adapter_that_is_named_touches_stays_as_it_is():
    """Tied weights of other adapters, weights that cannot be merged, what was unfrozen by hand."""
    model = nn.ModuleDict({n: nn.Linear(6, 6) for n in ("a", "b", "c", "free")})
    model["b"].weight = model["c"].weight
    inject(model, 2, adapter="one", target_modules="a")
    inject(model, 2, adapter="two", target_modules="b")
    train(model, "one", "lambda gamma", seed=1)
    with torch.no_grad():
        model["b"].two_randlora_gamma.fill_(torch.inf)
    model["free"].weight.requires_grad_(True)
    add_weighted_adapter(model, {"one": 2.0}, "twice")
    assert model["free"].weight.requires_grad
    assert not model["a"].base_weight.requires_grad
    want = model["a"].base_weight + deltas(model, "twice")["a", "weight"]
    unload(model, merge={"one": 2.0})
    assert model["b"].weight is model["c"].weight
    torch.testing.assert_close(model["a"].weight, want.float(), rtol=1e-6, atol=1e-6)


def test_a_sum_that_is_not_finite_is_not_merged():
    model = several(1, 1)
    train(model, "a0", "lambda gamma", seed=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="weights must give finite numbers"):
        add_weighted_adapter(model, {"a0": 1e39}, "sum")
    assert same(snapshot(model), before)
    with pytest.raises(ValueError, match="must be finite to be merged"):
        unload(model, merge={"a0": 1e38, "a1": 1})
    assert same(snapshot(model), before)
