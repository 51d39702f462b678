"""Quantised layers: training on top of them; they are not merged.

Libraries choose kernels by processor. So the reference computes the frozen product by the plain
quantised layer itself, and gives it the gradient of the dequantised weight.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora import adapter_parameters, inject
from tests.support.quantised import QUANTISE, SIZE
from tests.support.small import parts

quantised = pytest.mark.parametrize("quantise", QUANTISE.values(), ids=QUANTISE)
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32"),  # torchao
]


class Straight(nn.Module):
    """A plain quantised layer with the gradient of its dequantised weight."""

    def __init__(self, layer, weight):
        super().__init__()
        self.layer = layer
        self.register_buffer("dense", weight.detach().float())
        self.update = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        nn.init.zeros_(self.update.weight)

    def forward(self, x):
        y = self.layer(x).detach()
        straight = F.linear(x, self.dense).to(y.dtype)
        return y + (straight - straight.detach()) + self.update(x).to(y.dtype)


def model_and_reference(quantise):
    """An adapted layer, and the same with the update beside the plain quantised layer.

    One layer only: the input of a second one would differ by a rounding, which becomes a step where
    a library quantises activations.
    """
    models = []
    for reference in (False, True):
        torch.manual_seed(0)
        layer, weight = quantise(nn.Linear(SIZE, 32))
        model = nn.Sequential(Straight(layer, weight) if reference else layer)
        models.append(inject(model, rank=4, target_modules="update" if reference else None))
    return models


SITUATIONS = {
    "as it is": (nullcontext, lambda model, x: model(x)),
    "autocast": (partial(torch.autocast, "cpu", dtype=torch.bfloat16), lambda model, x: model(x)),
    "checkpoints": (nullcontext, partial(checkpoint, use_reentrant=False)),
    "re-entrant checkpoints": (nullcontext, partial(checkpoint, use_reentrant=True)),
}


@pytest.mark.parametrize(("context", "call"), SITUATIONS.values(), ids=SITUATIONS)
@quantised
def test_training_steps_are_those_beside_the_dequantised_weight(quantise, context, call):
    """Compare each loss and gradient, with evaluations in between.

    The entries differ by roundings: of sums of some hundred float32 numbers, as in the contract
    test; under autocast of the few products in bfloat16 that lead to a gradient, half an epsilon
    each.
    """
    model, reference = model_and_reference(quantise)
    trained, others = adapter_parameters(model), adapter_parameters(reference)
    optimiser = torch.optim.AdamW(trained, lr=3e-2)
    x, labels = torch.randn(24, SIZE), torch.arange(24)
    rounding = 1000 * torch.finfo(torch.float32).eps
    if isinstance(context(), torch.autocast):
        rounding = 8 * torch.finfo(torch.bfloat16).eps
    losses = []
    for _ in range(4):
        results = []
        for one, parameters in ((model, trained), (reference, others)):
            given = x.clone().requires_grad_()
            with context():
                # Autocast of torch 2.9 keeps the cast of a leaf, and a library may make it without
                # gradients: so the input is no leaf.
                loss = F.cross_entropy(call(one.train(), given.clone()).float(), labels)
            for parameter in parameters:
                parameter.grad = None
            loss.backward()
            results.append([loss, given.grad, *(p.grad for p in parameters)])
            with torch.no_grad():
                one.eval()(x)
        for got, want in zip(*results, strict=True):
            assert got.isfinite().all()
            assert (got - want).abs().max() <= rounding * want.abs().max()
        losses.append(results[0][0].item())
        optimiser.step()
        with torch.no_grad():
            for other, parameter in zip(others, trained, strict=True):
                other.copy_(parameter)
    assert losses[-1] < losses[0]


@quantised
def test_a_quantised_layer_is_not_trained_in_full(quantise):
    model = nn.Sequential(nn.Linear(SIZE, SIZE), quantise(nn.Linear(SIZE, 32))[0])
    if "weight" not in model[1]._parameters:
        pytest.skip("its weight is no parameter")
    before = parts(model)
    with pytest.raises(TypeError, match=r"modules_to_save must be trainable, but '1' has 'weight'"):
        inject(model, rank=4, target_modules="0", modules_to_save="1")
    assert parts(model) == before


@quantised
def test_no_call_merges_a_quantised_layer(quantise):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), quantise(nn.Linear(SIZE, 32))[0]).eval()
    inject(model, rank=4)
    inject(model, rank=4, target_modules="0", adapter="other")
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(5, SIZE)
    with torch.no_grad():
        want = model(x)
    before, trained = parts(model), list(map(id, adapter_parameters(model)))
    message = f"'1' cannot be merged: the base weight of a {model[1]._randlora_base.__name__} is"
    for call in (
        randlora.merge,
        randlora.merged_state_dict,
        partial(randlora.unload, merge=True),
        partial(randlora.unload, merge={"other": 0.5, "default": 0.5}),
    ):
        with pytest.raises(TypeError, match=message):
            call(model)
        assert parts(model) == before
        assert list(map(id, adapter_parameters(model))) == trained
        with torch.no_grad():
            assert torch.equal(model(x), want)
    plain = randlora.unload(model, merge={"other": 0.5})  # it changes only the first layer
    assert type(plain[0]) is nn.Linear
