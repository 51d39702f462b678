"""Merging modules of all kinds, and copies, calls and training of merged modules."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from randlora import inject
from randlora.model.index import adapted_modules
from tests.support.rows import (
    Experts,
    shuffled,
)
from tests.support.small import adapted


@pytest.mark.parametrize(
    ("basis", "train_a"), [("dense", False), ("isometric", False), ("dense", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_all_kinds_is_exact_in_every_dtype(dtype, basis, train_a):
    """After 100 merges and unmerges, all is as before. Merged outputs differ by rounding."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.a = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.c, self.x = nn.Conv1d(8, 8, 1), Experts()

        def forward(self, tokens):
            h = self.e(tokens)
            h = h + self.a(h, h, h)[0]
            return self.x(self.c(h.transpose(1, 2)).transpose(1, 2))

    model = Net().to(dtype).eval()
    targets = {"target_modules": ["e", "a", "c"], "target_parameters": ["up", "down"]}
    inject(model, 3, alpha=3, basis=basis, train_a=train_a, **targets)
    shuffled(model)
    tokens = torch.arange(6).view(2, 3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        want = model(tokens)
        for _ in range(100):
            merged = randlora.merge(model)(tokens)
            randlora.unmerge(model)
        assert torch.equal(model(tokens), want)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        # The merged weight is rounded like the effective weight: both have the same values here.
        assert (merged - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()


def test_an_update_that_is_not_finite_leaves_the_layers_before_it_unmerged():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "c": nn.Conv1d(8, 8, 3)}).eval()
    inject(model, rank=2)
    with torch.no_grad():
        model["c"].randlora_gamma[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of 'c' must be finite"):
        randlora.merge(model)
    assert not any(
        m._randlora.merged or m._randlora.merged_weights for m in adapted_modules(model).values()
    )
    with torch.no_grad():
        model["c"].randlora_gamma[0, 0] = 0
        model["a"].in_proj_weight_randlora_lambda[0, 0] = float("inf")
        model["a"].in_proj_weight_randlora_gamma.fill_(1)
    with pytest.raises(ValueError, match=r"weight of 'a\.in_proj_weight' must be finite"):
        randlora.unload(model, merge=True)
    assert list(adapted_modules(model)) == ["a", "a.out_proj", "c"]


def test_a_merged_layer_sees_every_weight_it_is_given():
    model, x = randlora.merge(adapted(nn.Linear(8, 8)).eval()), torch.randn(3, 8)
    delta = model[0].delta_weight()
    with torch.no_grad():
        for _ in range(5):  # a new tensor may get the id of a freed one
            weight = torch.randn(8, 8)
            got = torch.func.functional_call(model, {"0.weight": weight}, (x,))
            torch.testing.assert_close(got, F.linear(x, weight + delta, model[0].bias))
            del weight


@pytest.mark.parametrize("name", ["randlora_lambda", "randlora_gamma", "randlora_a"])
def test_a_merged_layer_sees_all_numbers_it_is_given(name):
    model, x = randlora.merge(adapted(nn.Linear(8, 8), train_a=True).eval()), torch.randn(3, 8)
    given = {f"0.{name}": torch.randn(model[0].get_parameter(name).shape)}
    got = torch.func.functional_call(model, given, (x,))
    assert not torch.allclose(got, model(x), atol=1e-3)
    want = torch.func.functional_call(randlora.unmerge(model), given, (x,))
    torch.testing.assert_close(got, want)


def test_a_merged_layer_made_in_inference_mode_computes():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 5))
    randlora.merge(inject(model, 2)).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 6)).shape == (2, 5)


def test_a_merged_layer_that_is_not_trained_computes_in_training_mode():
    model, x = adapted(nn.Linear(6, 5)), torch.randn(2, 6)
    want = model(x).detach()
    for parameter in randlora.adapter_parameters(model):
        parameter.requires_grad_(False)
    torch.testing.assert_close(randlora.merge(model).train()(x), want)


@pytest.mark.parametrize("build", [lambda: nn.LSTM(8, 6), lambda: nn.Linear(8, 6)])
def test_copies_of_a_merged_model_have_weights_of_their_own(build):
    model = randlora.merge(adapted(build()))
    ours = model[0]._randlora.merged_weights
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = copied[0]._randlora.merged_weights
        assert copied[0]._randlora.merged
        for name, (*_, weight) in ours.items():
            assert torch.equal(theirs[name][-1], weight)
            assert theirs[name][-1] is not weight
