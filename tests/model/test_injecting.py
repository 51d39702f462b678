"""Injection: what a call does, which ranks and scales it gives, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import randlora
from randlora import BasisBank, RandLoRALinear, adapter_parameters, inject
from randlora.modules.weight_update import A_START
from tests.support import cases
from tests.support.rows import Experts
from tests.support.transformer import LAYERS, TOKENS, Block, Model, adapted_layers

SPARSE = BasisBank("sparse", sparsity=5000)


def snapshot(model):
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return (
        {n: type(m) for n, m in model.named_modules(remove_duplicate=False)},
        {n: sorted(vars(m)) for n, m in model.named_modules()},
        {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in parameters.items()},
    )


def same(one, other):
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    for name, (identity, requires_grad, value) in one[2].items():
        assert other[2][name][:2] == (identity, requires_grad)
        assert torch.equal(other[2][name][2], value)


def train(model, steps=2):
    optimiser = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        logits = model(TOKENS)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


# --- what a call does ----------------------------------------------------------------------------


@pytest.mark.parametrize("own", [(), ("a",)])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injection_changes_no_output_bit_and_no_key(kind, dtype, own):
    model = Model().to(dtype)
    before, keys = model(TOKENS), list(model.state_dict())
    assert inject(model, rank=3, basis=kind, train_a=bool(own)) is model
    assert torch.equal(model(TOKENS), before)
    added = [key for key in model.state_dict() if key not in keys]
    assert [key for key in model.state_dict() if key in keys] == keys
    layers = [*adapted_layers(model), "gate_alias"]  # the gate has two names
    symbols = ("lambda", "gamma", *own)
    assert {*added} == {f"{layer}.randlora_{symbol}" for layer in layers for symbol in symbols}


def test_everything_but_the_head_is_adapted_by_default():
    model = inject(Model(), rank=3)
    assert adapted_layers(model) == [*LAYERS, "gate"]
    assert model.gate is model.gate_alias
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight


def test_only_adapters_and_modules_to_save_are_trained():
    model = inject(Model(), rank=3, modules_to_save=["norm", "gate"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert adapted_layers(model) == LAYERS
    assert trained == {
        *(f"{layer}.randlora_{kind}" for layer in LAYERS for kind in ("lambda", "gamma")),
        *(f"blocks.{i}.attn.norm.randlora_copy_{k}" for i in (0, 1) for k in ("weight", "bias")),
        "gate.randlora_copy_weight",
    }
    listed = adapter_parameters(model)
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(listed) == len({id(p) for p in listed})


def test_training_changes_adapters_only_and_lowers_the_loss():
    model = inject(Model(), rank=3)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, steps=8)
    assert losses[-1] < losses[0]
    for name, value in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], value)
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model))


def test_a_checkpoint_of_the_plain_model_loads_before_and_after():
    plain = Model()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    before = inject(Model(), rank=3)
    train(before)
    adapter = {n: p.detach().clone() for n, p in before.named_parameters() if p.requires_grad}
    before.load_state_dict(state)
    after = Model()
    after.load_state_dict(state)
    inject(after, rank=3)
    after.load_state_dict(adapter, strict=False)
    assert torch.equal(before(TOKENS), after(TOKENS))
    assert not torch.equal(before(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_adapting_a_subset_gives_the_same_bases(kind):
    everything = inject(Model(), rank=3, basis=kind, seed=5)
    subset = inject(Model(), rank=3, basis=kind, seed=5, target_modules="blocks.1.attn.proj")
    reverse = inject(Model(), rank=2, basis=kind, seed=5, target_modules=["gate", "mlp"])
    for other in (subset, reverse):
        assert repr(other.get_submodule(adapted_layers(other)[0]).bank) == repr(
            everything.gate.bank
        )
    one, two = (m.blocks[1].attn.proj for m in (everything, subset))
    generator = torch.Generator().manual_seed(0)
    gamma = torch.randn(one.randlora_gamma.shape, generator=generator)
    with torch.no_grad():
        one.randlora_gamma.copy_(gamma)
        two.randlora_gamma.copy_(gamma)
    assert torch.equal(one.delta_weight(), two.delta_weight())


def test_one_bank_serves_the_model():
    model = inject(Model(), rank=3, basis="dense")
    banks = {id(model.get_submodule(name).bank) for name in adapted_layers(model)}
    assert len(banks) == 1
    bank = model.gate.bank
    m = -(-16 // 3) * 3
    assert bank.nbytes == 4 * (3 * 16 + 48 * m)
    deeper = inject(nn.Sequential(*(Block(16) for _ in range(9))), rank=3, basis="dense")
    assert deeper[0].mlp[0].bank.nbytes == bank.nbytes


def test_a_very_sparse_bank_does_not_grow_with_depth():
    sizes = []
    for depth in (1, 4):
        model = inject(nn.Sequential(*(Block(64) for _ in range(depth))), basis="very_sparse")
        sizes.append(model[0].mlp[0].bank.nbytes)
    assert sizes[0] == sizes[1]


def test_a_bank_of_ones_own_is_used():
    bank = BasisBank("sparse", seed=8, sparsity=4)
    assert inject(Model(), rank=3, basis=bank).gate.bank is bank


def test_very_sparse_follows_the_largest_layer():
    assert inject(Model(), rank=3, basis="very_sparse").gate.bank.sparsity == np.sqrt(48)
    assert inject(nn.Linear(2, 3), rank=1, basis="very_sparse").bank.sparsity == 2


def test_a_root_linear_is_adapted_in_place_with_its_hooks():
    linear = nn.Linear(6, 8)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    assert inject(linear, rank=2) is linear
    assert isinstance(linear, RandLoRALinear)
    linear(torch.randn(2, 6))
    assert calls == [1]


def test_names_and_references_to_a_layer_go_on_holding():
    model = Model()
    gate = model.gate
    inject(model, rank=3)
    assert gate is model.gate is model.gate_alias
    assert isinstance(gate, RandLoRALinear)


def test_each_matrix_of_a_stack_gets_an_a_of_its_own():
    model = inject(Experts(), 3, target_modules=[], target_parameters=["up"], train_a=True)
    assert model.up_randlora_a.shape == (3, 3, 8)
    bank = model._randlora.active_updates["up"].bank
    assert torch.equal(model.up_randlora_a, A_START * bank.a(3, 8).expand(3, 3, 8))
    assert len(adapter_parameters(model)) == 3
    with torch.no_grad():
        model.up_randlora_gamma.normal_()
        before = model.up - model._parameters["up"]
        model.up_randlora_a[1].zero_()
        after = model.up - model._parameters["up"]
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [False, True, False]


# --- ranks and scales ----------------------------------------------------------------------------


def test_a_rank_too_large_for_a_layer_is_lowered_there_and_keeps_the_scaling():
    model = inject(Model(), rank=6, alpha=12)
    assert (model.gate.rank, model.gate.num_bases, model.gate.scaling) == (4, 1, 2.0)
    proj = model.blocks[0].attn.proj
    assert (proj.rank, proj.num_bases, proj.scaling) == (6, 3, 2.0)


def test_ranks_by_pattern():
    model = inject(Model(), rank={"attn": 5, r"blocks\.\d\.mlp\..*": 2, re.compile(".*"): 3})
    ranks = {name: model.get_submodule(name).rank for name in adapted_layers(model)}
    assert ranks == {n: 5 if "attn" in n else 2 if "mlp" in n else 3 for n in [*LAYERS, "gate"]}


def test_num_bases_is_kept_or_lowered_to_what_full_rank_takes():
    model = inject(Model(), rank=4, num_bases=3)
    assert model.blocks[0].attn.proj.num_bases == 3
    assert model.gate.num_bases == 1


def test_integers_of_numpy_are_integers():
    assert inject(nn.Linear(6, 8), rank=np.int64(2)).rank == 2


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": -6}, ValueError, "rank must be at least 1, got -6"),
        ({"rank": 2.5}, TypeError, "rank must be an integer, got 2.5"),
        ({"rank": None}, TypeError, "rank must be an integer, got None"),
        ({"rank": 17}, ValueError, "rank must be at most .*, here 16, got 17"),
        ({"rank": {"gate": 5, "blocks": 2}}, ValueError, "rank must be at most .* 4, got 5"),
        ({"rank": {"attn": 2}}, ValueError, "rank must have a pattern .* 'blocks.0.mlp.0'"),
        ({"rank": {"attention": 2}}, ValueError, "rank='attention' matches no module"),
        (
            {"rank": {"": 2, "norm": 3}},
            ValueError,
            "rank must match adapted layers only, but 'norm'",
        ),
        ({"rank": {"attn": 0}}, ValueError, r"rank\['attn'\] must be at least 1, got 0"),
        ({"basis": "gaussian"}, ValueError, "basis must be .* dense, .* got 'gaussian'"),
        ({"basis": 6}, TypeError, "basis must be a kind or a BasisBank, got int"),
        ({"basis": BasisBank(seed=3), "seed": 4}, ValueError, "seed must be that of the bank"),
        ({"seed": -1}, ValueError, "seed must be in .* got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite, got inf"),
        ({"alpha": "6"}, TypeError, "alpha must be a number, got '6'"),
        ({"dropout": 1}, ValueError, r"dropout must be in \[0, 1\), got 1"),
        ({"dropout": -0.5}, ValueError, r"dropout must be in \[0, 1\), got -0.5"),
        ({"train_a": "yes"}, TypeError, "train_a must be True or False, got 'yes'"),
        ({"num_bases": 0}, ValueError, "num_bases must be at least 1, got 0"),
        ({"num_bases": 7}, ValueError, "num_bases must be at most .* here 6, got 7"),
        ({"target_modules": "q_proj"}, ValueError, "target_modules='q_proj' matches no module"),
        ({"target_modules": "attm"}, ValueError, "close to it: 'attn'"),
        ({"target_modules": "roj"}, ValueError, "target_modules='roj' matches no module"),
        ({"target_modules": ["qkv", "kv"]}, ValueError, "target_modules='kv' matches no module"),
        ({"target_modules": []}, ValueError, "target_modules, .* leave none; .* 'gate'"),
        ({"target_modules": lambda *_: False}, ValueError, "leave none; .*'lm_head' .output head"),
        ({"target_modules": "norm"}, TypeError, "norm'.* LayerNorm is not of a class"),
        ({"target_modules": ["qkv", "pool"]}, TypeError, "'pool', but EmbeddingBag adds"),
        ({"target_modules": "(qkv"}, ValueError, r"'\(qkv' is neither"),
        ({"target_modules": nn.Linear}, TypeError, "target_modules must be a name, .* got <class"),
        ({"alpha": torch.ones(2)}, ValueError, "alpha must be one finite number"),
        ({"alpha": 1e40}, ValueError, "alpha must leave alpha / rank within float32"),
        ({"target_modules": 3}, TypeError, "target_modules must be a name, .* got 3 of type int"),
        ({"target_modules": ["qkv", 3]}, TypeError, "target_modules must hold names .* got 3"),
        ({"exclude_modules": "mpl"}, ValueError, "exclude_modules='mpl' matches no module"),
        ({"exclude_modules": ".*"}, ValueError, "leave none"),
        ({"modules_to_save": "norms"}, ValueError, "modules_to_save='norms' matches no module"),
        ({"target_modules": "gate", "modules_to_save": "gate"}, ValueError, "leave none"),
    ],
)
def test_bad_calls_are_refused_and_leave_the_model_untouched(keywords, error, message):
    model = Model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, **{"rank": 3, **keywords})
    same(snapshot(model), before)


def broken_bank():
    bank = BasisBank()
    bank.draw = lambda *args: 1 / 0
    return bank


def with_inference_tensors():
    model = Model()
    with torch.inference_mode():
        model.other = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("make", "keywords", "error"),
    [
        (Model, {"basis": broken_bank()}, ZeroDivisionError),
        (with_inference_tensors, {"modules_to_save": "other"}, TypeError),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(5000, 5000)),
            {"basis": SPARSE},
            ValueError,
        ),
    ],
)
def test_a_failure_however_late_leaves_the_model_untouched(make, keywords, error):
    model = make()
    before = snapshot(model)
    with pytest.raises(error):
        inject(model, rank=3, **keywords)
    same(snapshot(model), before)


def test_a_second_injection_is_refused():
    model = inject(Model(), rank=3)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'default' yet, but its layer 'blocks.0.attn.qkv' is"):
        inject(model, rank=3)
    same(snapshot(model), before)


def test_a_predicate_that_raises_leaves_the_model_untouched():
    model = Model()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        inject(model, rank=3, target_modules=lambda name, module: 1 / 0)
    same(snapshot(model), before)


def test_what_cannot_be_trained_cannot_be_saved():
    model = Model()
    model.codes = nn.Module()
    model.codes.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"modules_to_save must be .* 'codes' has 'table', .*int8"):
        inject(model, rank=3, modules_to_save="codes")
    same(snapshot(model), before)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match="'0' is on the meta device"):
        inject(model, rank=2)
    assert type(model[0]) is nn.Linear


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        inject({}, rank=2)
    with pytest.raises(ValueError, match="can be adapted: none"):
        inject(nn.ReLU(), rank=2)


def test_the_call_of_the_readme():
    model = randlora.inject(Model(), rank=6)
    assert len(adapter_parameters(model)) == 2 * len(adapted_layers(model))
