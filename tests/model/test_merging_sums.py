"""Merging a weighted sum of adapters into a model, by ``unload(model, merge={name: weight})``."""

import math

import pytest
import torch
from torch import nn

from randlora import adapter_parameters, inject, set_adapter, unload
from randlora.model.index import adapted_modules
from randlora.modules.effective import delta_of
from tests.support.adapters import TOKENS, Net, plain, same, snapshot
from tests.support.cases import assert_close

CHOICES = {"rank": 3, "target_parameters": ["up", "down"]}


def several(*alphas, **keywords):
    """A model with adapters ``a0``, ``a1``, …, each with its alpha."""
    model = plain()
    for number, alpha in enumerate(alphas):
        inject(model, alpha=alpha, adapter=f"a{number}", **{**CHOICES, **keywords})
    return model


@torch.no_grad()
def train(model, adapter, seed):
    """Change all that one adapter trains of its updates, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapted_modules(model).values():
        for update in module._randlora.updates.get(adapter, {}).values():
            for parameter in update.parameters(module):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def deltas(model, adapter):
    """The updates of one adapter in float64, by weight."""
    return {
        (name, parameter): delta_of(module, update, torch.float64).detach()
        for name, module in adapted_modules(model).items()
        for parameter, update in module._randlora.updates.get(adapter, {}).items()
    }


# Other settings for a second adapter: the sum of two updates need not be a RandLoRA update.
OTHERS = {
    "like the first": {},
    "another rank": {"rank": 2},
    "another seed": {"seed": 1},
    "another kind": {"basis": "sparse"},
    "fewer bases": {"num_bases": 1},
    "an A of its own": {"train_a": True},
    "other layers": {"target_modules": ["embed", "conv"], "target_parameters": ["up"]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_sum_of_adapters_is_merged(name):
    model = several(2)
    inject(model, adapter="a1", **{"alpha": 3, **CHOICES, **OTHERS[name]})
    train(model, "a0", seed=1)
    train(model, "a1", seed=2)
    weights = {"a0": 0.7, "a1": -0.3}
    terms = [(w, deltas(model, adapter)) for adapter, w in weights.items()]
    assert all(term for _, term in terms)
    reference = plain().double()
    with torch.no_grad():
        for weight, term in terms:
            for (path, parameter), update in term.items():
                target = reference.get_submodule(path).get_parameter(parameter)
                target += weight * update.reshape(target.shape)
    assert unload(model, merge=weights) is model
    assert type(model) is Net
    assert not [m for m in model.modules() if hasattr(m, "_randlora")]
    assert dict(plain().named_parameters()).keys() == dict(model.named_parameters()).keys()
    for path, parameter in model.named_parameters():
        want = reference.get_parameter(path)
        # Roundings of float32: of sums of m products, and of their sum, which may cancel.
        key = tuple(path.rpartition(".")[::2])
        size = max([1, *(abs(w) * t[key].abs().max() for w, t in terms if key in t)])
        assert (parameter - want).abs().max() <= 16 * 6e-8 * size, path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_merged_is_rounded_once(dtype):
    model = nn.Sequential(nn.Linear(6, 9)).to(dtype)
    inject(model, 2, adapter="one")
    inject(model, 2, adapter="two")
    train(model, "one", seed=1)
    train(model, "two", seed=2)
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
    train(model, "one", seed=1)
    update = deltas(model, "one")["0", "weight"]  # (out, in)
    unload(model, merge={"one": 2.0})
    assert_close(model[0].weight.detach(), (base + 2 * update.T).float(), 1e-6)


def test_differences_of_what_was_trained_in_full_are_added():
    model = several(1, 1, modules_to_save=["head"])
    base, trained = plain().head.weight, {}
    for seed, name in enumerate(("a0", "a1")):
        set_adapter(model, name)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            model.head.weight.copy_(torch.randn(base.shape, generator=generator))
        trained[name] = model.head.weight.detach().double()
        assert any(p is model.head.weight for p in adapter_parameters(model))
    unload(model, merge={"a0": 0.5, "a1": -2.0})
    want = base.double() + 0.5 * (trained["a0"] - base) - 2.0 * (trained["a1"] - base)
    # A few roundings of float32, of terms below ten.
    torch.testing.assert_close(model.head.weight.double(), want, rtol=0, atol=1e-5)


def test_what_no_adapter_that_is_named_touches_stays_as_it_is():
    """Tied weights of other adapters, and weights that cannot be merged."""
    model = nn.ModuleDict({n: nn.Linear(6, 6) for n in ("a", "b", "c", "free")})
    model["b"].weight = model["c"].weight
    inject(model, 2, adapter="one", target_modules="a")
    inject(model, 2, adapter="two", target_modules="b")
    train(model, "one", seed=1)
    with torch.no_grad():
        model["b"].two_randlora_gamma.fill_(torch.inf)
    model["free"].weight.requires_grad_(True)  # unfrozen by hand
    want = model["a"].base_weight + 2 * deltas(model, "one")["a", "weight"]
    unload(model, merge={"one": 2.0})
    assert model["free"].weight.requires_grad
    assert model["b"].weight is model["c"].weight
    torch.testing.assert_close(model["a"].weight, want.float(), rtol=1e-6, atol=1e-6)


def test_a_sum_that_is_not_finite_is_not_merged():
    model = several(1, 1)
    train(model, "a0", seed=1)
    before, output = snapshot(model), model(TOKENS)
    with pytest.raises(ValueError, match="must be finite to be merged"):
        unload(model, merge={"a0": 1e38, "a1": 1})
    assert same(snapshot(model), before)
    assert torch.equal(model(TOKENS), output)


WRONG = {
    "no weights": ({}, ValueError, "merge must name an adapter"),
    "an unknown adapter": ({"a7": 1}, ValueError, "adapter must be one of 'a0', 'a1'"),
    "a name of another type": ({3: 1}, TypeError, "adapter must be a name"),
    "a weight of another type": ({"a0": "1"}, TypeError, r"merge\['a0'\] must be a num"),
    "an infinite weight": ({"a0": math.inf}, ValueError, r"merge\['a0'\] must be finite"),
    "no mapping": ([("a0", 1)], TypeError, "merge must be True or False, or a mapping"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_are_refused(name):
    weights, error, message = WRONG[name]
    model = several(1, 1)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        unload(model, merge=weights)
    assert same(snapshot(model), before)
