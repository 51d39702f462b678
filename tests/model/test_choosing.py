"""Which weights are adapted, and which modules are trained in full."""

import re

import pytest
import torch
from torch import nn

import randlora
from randlora import inject, summary
from randlora.model.index import adapted_modules
from tests.support.small import Floats, Held, adapted, parts, scripted
from tests.support.transformer import LAYERS, Block, Model, adapted_layers


def test_embeddings_are_adapted_only_where_they_are_meant():
    def model():
        return nn.ModuleDict(
            {"body": nn.ModuleDict({"e": nn.Embedding(9, 4), "l": nn.Linear(4, 4)})}
        )

    for target, expected in [
        (None, ["body.l"]),
        ("body", ["body.l"]),
        (lambda name, module: True, ["body.l"]),
        ("e", ["body.e"]),
        (["body.e", "l"], ["body.e", "body.l"]),
        (r"body\..*", ["body.e", "body.l"]),
    ]:
        adapted = inject(model(), rank=2, target_modules=target)
        assert list(adapted_modules(adapted)) == expected


def test_parameters_are_adapted_where_they_are_named_beside_the_layers():
    model = inject(Held(), rank=2, target_parameters=["stack", "matrix", "linear.weight"])
    assert [layer.name for layer in summary(model).layers] == ["stack", "matrix", "linear"]
    only = inject(Held(), rank={"stack": 3}, target_modules=[], target_parameters="stack")
    assert [(layer.name, layer.rank, layer.stack) for layer in summary(only).layers] == [
        ("stack", 3, 2)
    ]
    assert {n for n, p in only.named_parameters() if p.requires_grad} == {
        "stack_randlora_lambda",
        "stack_randlora_gamma",
    }


def test_targets_are_checked_before_what_is_left_out_of_them():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match="target_modules='1' matches '1'"):
        inject(model, 2, target_modules="1", exclude_modules="nothing")


def test_the_summary_says_why_a_head_is_left_out():
    model = nn.ModuleDict({"e": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "o": nn.Linear(4, 9)})
    model["o"].weight = model["e"].weight
    found = summary(inject(model, rank=2))
    assert found.left_out == {"o": "output head: its weight is an embedding's too"}
    assert "left out: o (output head: its weight is an embedding's too)" in str(found)
    some = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(3, 4, 1), nn.Linear(4, 4))
    found = summary(inject(some, rank=2, target_modules="0"))
    assert found.left_out == {"1": "not a target", "2": "not a target"}
    assert "left out: 2 more, see left_out" in str(found)


def test_a_wrapper_that_passes_attributes_on_is_not_saved_for_what_it_holds():
    class Wrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.extra = nn.Linear(8, 8), nn.Linear(8, 8)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model = nn.Sequential(nn.Linear(8, 8), Wrap())
    inject(model, 2, target_modules="0", modules_to_save="inner")
    grad = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grad == {
        "0.randlora_lambda",
        "0.randlora_gamma",
        "1.inner.randlora_copy_weight",
        "1.inner.randlora_copy_bias",
    }


def test_a_scripted_module_cannot_be_trained_in_full():
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "other": nn.ModuleList([scripted()])})
    before = parts(model)
    with pytest.raises(TypeError, match=r"'other\.0' has code compiled by TorchScript"):
        inject(model, 2, target_modules="one", modules_to_save="other")
    assert parts(model) == before


def test_a_model_with_a_parametrized_embedding_and_no_single_head_is_adapted():
    embedding = nn.utils.parametrizations.spectral_norm(nn.Embedding(9, 4))
    model = nn.ModuleDict({"e": embedding, "a": nn.MultiheadAttention(4, 2), "l": nn.Linear(4, 4)})
    model.get_output_embeddings = lambda: [model["l"]]
    layers = summary(inject(model, 2)).layers
    assert [layer.name for layer in layers] == ["a.in_proj_weight", "a.out_proj", "l"]
    assert summary(model).left_out == {
        "e": "ParametrizedEmbedding computes its weight, which is not a parameter"
    }


def test_a_bank_of_another_sparsity_is_another_bank():
    model = adapted(nn.Linear(8, 8), basis=randlora.BasisBank("sparse", sparsity=4.0))
    inject(model, 2, basis="sparse", adapter="two")
    assert [bank.sparsity for bank in summary(model).banks] == [4.0, 6.0]


@pytest.mark.parametrize("argument", ["exclude_modules", "modules_to_save"])
def test_parameters_are_left_out_with_their_module(argument):
    model = nn.ModuleDict({"a": Floats(), "b": Floats()})
    inject(model, 2, target_parameters="matrix", **{argument: "a"})
    assert not any("randlora_gamma" in name for name in model["a"].state_dict())
    assert "matrix_randlora_lambda" in model["b"].state_dict()


def test_updates_are_not_adapted_themselves():
    model = inject(Floats(), 2, target_parameters="matrix")
    inject(model, 2, target_parameters=r".*matrix.*", adapter="two")
    assert all(name.count("randlora") < 2 for name in model.state_dict())


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        ("qkv", None, ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        (["qkv", "gate_alias"], None, ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "gate"]),
        ("attn", None, [n for n in LAYERS if "attn" in n]),
        ("blocks.1", None, [n for n in LAYERS if "blocks.1" in n]),
        ("1.attn.proj", None, ["blocks.1.attn.proj"]),
        ("lm_head", None, ["lm_head"]),
        (r".*\.(qkv|proj)", None, [n for n in LAYERS if "attn" in n]),
        (re.compile(r"blocks\.0\.mlp"), None, ["blocks.0.mlp.0", "blocks.0.mlp.2"]),
        (lambda name, module: module.bias is None, None, ["gate", "lm_head"]),
        (lambda name, module: name.endswith("alias"), None, ["gate"]),
        (None, "mlp", [*(n for n in LAYERS if "attn" in n), "gate"]),
        (None, ["blocks", "lm_head"], ["gate"]),
        ("attn", lambda name, module: "1" in name, ["blocks.0.attn.qkv", "blocks.0.attn.proj"]),
        (None, [], [*LAYERS, "gate"]),
    ],
)
def test_targets(target, exclude, expected):
    model = inject(Model(), rank=3, target_modules=target, exclude_modules=exclude)
    assert adapted_layers(model) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), ["0", "2"]),
        (nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)}), ["body"]),
        (nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}), ["fc1", "fc2"]),
        (
            nn.ModuleDict(
                {
                    "body": nn.Linear(4, 4),
                    "classifier": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
                }
            ),
            ["body", "classifier.0"],
        ),
        (nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 2)}), ["head", "body"]),
        (nn.TransformerEncoderLayer(4, 2, 8), ["self_attn.out_proj", "linear1", "linear2"]),
    ],
)
def test_what_counts_as_the_output_head(model, expected):
    assert adapted_layers(inject(model, rank=2)) == expected


def test_the_model_is_asked_for_its_head():
    model = Model()
    model.get_output_embeddings = lambda: model.gate
    assert adapted_layers(inject(model, rank=3)) == LAYERS


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError])
def test_a_model_may_not_know_its_head(error):
    def refuse():
        raise error

    model = Model()
    model.get_output_embeddings = refuse
    assert adapted_layers(inject(model, rank=3)) == [*LAYERS, "gate"]


def test_a_layer_tied_to_an_embedding_is_a_head_whatever_its_name_and_place():
    model = nn.ModuleDict(
        {"e": nn.Embedding(9, 4), "out": nn.Linear(4, 9), "more": nn.Linear(4, 4)}
    )
    model["out"].weight = model["e"].weight
    assert adapted_layers(inject(model, rank=2)) == ["more"]


def test_a_container_with_a_parameter_of_its_own_can_be_named():
    model = nn.ModuleDict({"encoder": Block(16), "other": Block(16)})
    model["encoder"].position = nn.Parameter(torch.zeros(3))
    assert adapted_layers(inject(model, rank=2, target_modules="encoder")) == [
        f"encoder.{name.removeprefix('blocks.0.')}" for name in LAYERS[:4]
    ]


def test_a_name_with_letters_of_regular_expressions_is_a_name():
    model = nn.ModuleDict({"layer(1)": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    assert adapted_layers(inject(model, rank=2, target_modules="layer(1)")) == ["layer(1)"]
