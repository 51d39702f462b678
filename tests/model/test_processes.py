"""A model in shared memory: another process computes with it, and trains it."""

import copy

import torch

from randlora import adapter_parameters, disabled
from tests.support.moving import ROWS, adapted, norms
from tests.support.situations import ROWS as MODULES
from tests.support.situations import close, input_of, make, probe_like, trained

NAMES = "tall", "isometric, wide, A trained", "attention", "lstm", "embedding", "experts", "opaque"


def train(model, x):
    """The outputs before a step of training, without the adapter, and after the step."""
    with torch.no_grad(), disabled(model):
        plain = model.eval()(x)
    before = model(x)
    y = model.train()(x)
    (y * probe_like(y)).sum().backward()
    torch.optim.SGD(adapter_parameters(model), lr=0.1).step()
    with torch.no_grad():
        return torch.stack([before, plain, y, model.eval()(x)])


def train_all(process, models, inputs, outputs):
    for model, x, y in zip(models, inputs, outputs, strict=True):
        y.copy_(train(model, x))


def test_another_process_computes_with_a_shared_model_and_trains_it():
    models = [trained(make(MODULES[name])[1]) for name in NAMES]
    models.append(adapted(norms(), modules_to_save="3"))  # moves statistics, too
    inputs = [*(input_of(MODULES[name]) for name in NAMES), ROWS.double()]
    ours = [copy.deepcopy(model).double() for model in models]
    for model in models:
        assert model.double().share_memory() is model
    wants = [train(model, x) for model, x in zip(ours, inputs, strict=True)]
    outputs = [torch.zeros_like(y).share_memory_() for y in wants]
    torch.multiprocessing.spawn(train_all, (models, inputs, outputs))
    assert close(outputs, wants)
    for model, our in zip(models, ours, strict=True):
        assert close(list(model.state_dict().values()), list(our.state_dict().values()))
