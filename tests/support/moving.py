"""Models with buffers that training moves, plain and adapted."""

import io

import torch
import torch.nn.functional as F
from torch import nn

from randlora import adapter_parameters, inject

X = torch.linspace(-2, 2, 8 * 3 * 6 * 6).reshape(8, 3, 6, 6).sin()
CLASSES = torch.arange(8) % 4
ROWS = torch.linspace(-1, 1, 18).reshape(3, 6)  # input of the smaller models


class Block(nn.Module):
    """A residual block that works in place, as torchvision's do."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += x
        return self.relu(h)


class Quantiser(nn.Module):
    """Moves a buffer by assigning to it, as exponential averages often do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(6), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
            self.calls += 1
        return x - self.mean.view(-1, 1, 1)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.quantiser = Quantiser()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        h = self.quantiser(self.blocks(self.stem(x)))
        return self.fc(h.mean((2, 3)))


def pretrained():
    """A plain model whose statistics have moved."""
    torch.manual_seed(0)
    model = ResNet()
    for _ in range(3):
        model(X)
    return model.eval()


def finetune(model, steps=3, shift=1.0):
    """Some steps on inputs that are shifted, so that statistics move."""
    model.train()
    optimiser = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(X + shift), CLASSES).backward()
        optimiser.step()
    return model.eval()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


def dumped(model):
    """The whole model, written by ``torch.save`` into memory."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def adapted(modules=None, **keywords):
    """Adapt two linear layers, or ``modules``, and fill their updates with random numbers."""
    torch.manual_seed(0)
    model = modules or nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inject(model, **{"rank": 2, **keywords})
    shuffle(model)
    return model


def shuffle(model):
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)


def norms():
    """Two linear layers around a LayerNorm (no statistics) and a BatchNorm (statistics)."""
    torch.manual_seed(0)
    parts = nn.Linear(6, 6), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Linear(6, 6)
    return nn.Sequential(*parts).eval()
