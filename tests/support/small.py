"""Small models, and functions to adapt them and to list their classes and names."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from randlora import inject
from tests.support.rows import shuffled


class Held(nn.Module):
    """A module of an unknown class that holds parameters of many shapes."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8))
        self.stack = nn.Parameter(torch.randn(2, 6, 8))
        self.vector = nn.Parameter(torch.randn(8))
        self.codes = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.linear(x), self.matrix).sum() + F.linear(x, self.stack[1]).sum()


def parts(model):
    """The classes of a model's modules, and the names in its ``state_dict``."""
    return {n: type(m) for n, m in model.named_modules()}, list(model.state_dict())


def scripted():
    """A linear layer compiled by TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.script(nn.Linear(8, 8))


def adapted(module, rank=2, **keywords):
    """A model with this module, adapted, with random numbers in its updates."""
    model = inject(nn.Sequential(module), rank, **keywords)
    shuffled(model)
    return model


class Floats(nn.Module):
    """A module that holds a matrix beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear, self.matrix = nn.Linear(8, 6), nn.Parameter(torch.randn(6, 8))


def trained(layer):
    """Make the update of a layer non-zero, and return the layer."""
    nn.init.normal_(layer.randlora_gamma, std=0.1)
    return layer
