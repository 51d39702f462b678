"""Optimisers: the groups of ``adapter_parameters``, training by torch's optimisers, resuming."""

import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from randlora import adapter_parameters, inject, load_adapter, save_adapter, set_adapter
from tests.support.adapters import CHOICES, TOKENS, plain

LABELS = torch.arange(2)
NAMES = ("lambda", "gamma", "a", "modules_to_save")


def net():
    """Updates of many shapes with an A of their own, and a norm and a head trained in full."""
    return inject(plain(), **CHOICES, train_a=True).train()


def linear_layers():
    """Matrices only, as Muon needs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 8), nn.Flatten(), nn.Linear(40, 8), nn.Linear(8, 3))


def loss_of(model):
    return F.cross_entropy(model(TOKENS), LABELS)


def train(model, optimiser, steps, scheduler=None):
    def closure():
        optimiser.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    losses = []
    for _ in range(steps):
        losses.append(optimiser.step(closure).item())
        if scheduler:
            scheduler.step()
    return losses


def numbers(model):
    return [p.detach().clone() for p in adapter_parameters(model)]


def equal(ones, others):
    return all(map(torch.equal, ones, others))


# --- the groups ----------------------------------------------------------------------------------


def test_there_is_one_group_of_each_kind():
    model = net()
    groups = adapter_parameters(model, lr=1e-3, multipliers={"lambda": 4.0, "modules_to_save": 0.5})
    assert [group["name"] for group in groups] == list(NAMES)
    assert [group["lr"] for group in groups] == [4e-3, 1e-3, 1e-3, 5e-4]
    assert [group.get("weight_decay") for group in groups] == [0.0, 0.0, 0.0, None]
    ends = ("randlora_lambda", "randlora_gamma", "randlora_a", ("copy_weight", "copy_bias"))
    for group, end in zip(groups, ends, strict=True):
        of_end = [p for name, p in model.named_parameters() if name.endswith(end)]
        assert set(group["params"]) == set(of_end)
        assert len(group["params"]) == len(of_end)
    listed = adapter_parameters(model)
    assert {p for group in groups for p in group["params"]} == set(listed)
    for group in groups:  # each in the order of the list
        assert list(map(id, group["params"])) == [id(p) for p in listed if p in {*group["params"]}]


def test_groups_without_parameters_are_left_out():
    model = inject(linear_layers(), rank=2, modules_to_save=[])
    groups = adapter_parameters(model, lr=1e-3, multipliers={"a": 2.0})
    assert [group["name"] for group in groups] == ["lambda", "gamma"]


def test_groups_are_those_of_the_active_adapter():
    model = inject(net(), rank=2, target_modules="conv", adapter="other")
    set_adapter(model, "other")
    groups = adapter_parameters(model, lr=1e-3)
    assert {p for group in groups for p in group["params"]} == set(adapter_parameters(model))


def test_a_parametrized_update_is_in_its_group():
    model = inject(nn.Sequential(nn.Linear(8, 8)), rank=2)
    nn.utils.parametrizations.weight_norm(model[0], "randlora_gamma")
    first, second = adapter_parameters(model, lr=1e-3)
    assert [p.shape for p in first["params"]] == [model[0].randlora_lambda.shape]
    assert set(second["params"]) == set(model[0].parametrizations.randlora_gamma.parameters())


def test_the_multiplier_of_a_group_multiplies_its_steps():
    model = net()
    groups = adapter_parameters(model, lr=0.25, multipliers={"gamma": 2.0})  # exact in binary
    before = numbers(model)
    optimiser = SGD(groups)
    train(model, optimiser, 1)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert set(rates.values()) == {0.25, 0.5}
    for parameter, old in zip(adapter_parameters(model), before, strict=True):
        assert torch.equal(parameter, old - rates[parameter] * parameter.grad)


def test_only_modules_to_save_decay():
    model = net()
    for parameter in adapter_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimiser = AdamW(adapter_parameters(model, lr=1e-2), weight_decay=0.1)
    before = {name: [p.clone() for p in group["params"]] for name, group in by_name(optimiser)}
    optimiser.step()
    for name, group in by_name(optimiser):
        kept = 1 - 1e-2 * 0.1 if name == "modules_to_save" else 1
        wanted = [kept * p for p in before[name]]
        assert equal(group["params"], wanted)


def by_name(optimiser):
    return [(group["name"], group) for group in optimiser.param_groups]


def test_groups_without_multipliers_train_as_the_list_does():
    one, other = net(), net()
    train(one, AdamW(adapter_parameters(one), lr=1e-2, weight_decay=0.0), 3)
    train(other, AdamW(adapter_parameters(other, lr=1e-2), weight_decay=0.0), 3)
    assert equal(numbers(one), numbers(other))


def test_a_schedule_scales_the_rate_of_each_group():
    model = net()
    groups = adapter_parameters(model, lr=1e-3, multipliers={"lambda": 4.0})
    scheduler = LambdaLR(AdamW(groups), lambda step: min(1.0, (step + 1) / 4))
    for step in range(6):
        warm = min(1.0, (step + 1) / 4)
        assert scheduler.get_last_lr() == [4e-3 * warm, 1e-3 * warm, 1e-3 * warm, 1e-3 * warm]
        train(model, scheduler.optimizer, 1, scheduler)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be positive, got 0"),
        ({"lr": -1e-3}, ValueError, "lr must be positive, got -0.001"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3'"),
        ({"multipliers": {"a": 2.0}}, ValueError, "multipliers need lr"),
        ({"multipliers": {}}, ValueError, "multipliers need lr"),
        ({"lr": 1e-3, "multipliers": {"Λ": 2.0}}, ValueError, "names from 'lambda', .* got 'Λ'"),
        ({"lr": 1e-3, "multipliers": {"a": 0}}, ValueError, "multipliers['a'] must be positive"),
        ({"lr": 1e-3, "multipliers": {"a": "2"}}, TypeError, "multipliers['a'] must be a number"),
        ({"lr": 1e-3, "multipliers": 2.0}, TypeError, "multipliers must be a mapping .* a float"),
    ],
)
def test_what_is_refused(keywords, error, message):
    with pytest.raises(error, match=message.replace("['a']", re.escape("['a']"))):
        adapter_parameters(net(), **keywords)


# --- the optimisers ------------------------------------------------------------------------------


def groups(model):
    return adapter_parameters(model, lr=1e-2, multipliers={"lambda": 2.0})


# How an optimiser is made. Muon takes matrices only, LBFGS takes no groups.
OPTIMISERS = {
    "adamw": (net, lambda model: AdamW(groups(model), foreach=False)),
    "adamw, foreach": (net, lambda model: AdamW(groups(model), foreach=True)),
    "adamw, fused": (net, lambda model: AdamW(groups(model), fused=True)),
    "sgd": (net, lambda model: SGD(groups(model), momentum=0.9)),
    "adafactor": (net, lambda model: Adafactor(groups(model))),
    "muon": (lambda: inject(linear_layers(), 2, modules_to_save=[]), lambda m: Muon(groups(m))),
    "lbfgs": (net, lambda model: LBFGS(adapter_parameters(model), lr=0.1, max_iter=4)),
}
each = pytest.mark.parametrize(("make", "optimiser"), OPTIMISERS.values(), ids=OPTIMISERS)


@each
def test_a_few_steps_train_the_adapter_and_nothing_else(make, optimiser):
    model = make()
    trained = dict.fromkeys(adapter_parameters(model))
    frozen = {p: p.detach().clone() for p in model.parameters() if p not in trained}
    before = numbers(model)
    losses = train(model, optimiser(model), 5)
    assert losses[-1] < losses[0]
    assert not any(map(torch.equal, trained, before))
    assert equal(frozen, frozen.values())


@each
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(make, optimiser, tmp_path):
    """The adapter comes from its file, the optimiser and the schedule from their states."""

    def schedule(made):
        return LambdaLR(made, lambda step: 1 / (1 + step))

    model = make()
    made = optimiser(model)
    scheduler = schedule(made)
    train(model, made, 3, scheduler)
    save_adapter(model, tmp_path / "adapter.safetensors")
    states = io.BytesIO()
    torch.save({"optimiser": made.state_dict(), "schedule": scheduler.state_dict()}, states)
    train(model, made, 3, scheduler)

    resumed = make()
    load_adapter(resumed, tmp_path / "adapter.safetensors")
    made = optimiser(resumed)
    scheduler = schedule(made)
    states.seek(0)
    loaded = torch.load(states, weights_only=True)
    made.load_state_dict(loaded["optimiser"])
    scheduler.load_state_dict(loaded["schedule"])
    train(resumed, made, 3, scheduler)
    assert equal(numbers(resumed), numbers(model))


def test_the_ways_of_adamw_agree():
    """In float64 they differ by the order of a few operations on each entry, 1e-16 of its size.

    The gradients pass such differences on from step to step. 1e-9 leaves room for that.
    """
    results = []
    for keywords in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        model = net().double()
        train(model, AdamW(groups(model), **keywords), 3)
        results.append(numbers(model))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
