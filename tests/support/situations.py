"""A table of modules, each plain and adapted with the same numbers, and what they compute."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from tests.support.rows import Experts, Kernel, Opaque, Twice


class Attention(nn.Module):
    """Attention by ``nn.MultiheadAttention``, which reads its weights."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@dataclass(frozen=True)
class Row:
    """A module, the shape of its input, and how it is adapted."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 5, 8)
    keywords: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0  # if set, the input is integers below it
    reads: bool = False  # its code reads the weight; torch's path then depends on requires_grad


def linear(out, **keywords):
    return Row(lambda: nn.Linear(8, out), keywords=keywords)


EMBED = {"target_modules": [r".*|"]}
ROWS = {
    "tall": linear(20),
    "wide": linear(5),
    "square": linear(8),
    "sparse": linear(20, basis="sparse"),
    "very sparse": linear(20, basis="very_sparse"),
    "isometric": linear(20, basis="isometric"),
    "isometric, wide": linear(5, basis="isometric"),
    "reading its weight": Row(lambda: Twice(8, 12), reads=True),
    "attention": Row(Attention, reads=True),
    "convolution 1d": Row(lambda: nn.Conv1d(5, 7, 3, padding=1)),
    "convolution 2d": Row(lambda: nn.Conv2d(3, 6, 3), (4, 3, 6, 6)),
    "lstm": Row(Recurrent, reads=True),
    "embedding": Row(lambda: nn.Embedding(30, 8), (4, 5), EMBED, tokens=30),
    "registered": Row(lambda: Kernel(8, 12), reads=True),
    "experts": Row(Experts, keywords={"target_parameters": [r".*\bup", r".*\bdown"]}, reads=True),
    "opaque": Row(lambda: Opaque(8, 12)),
}
ROWS |= {
    f"{name}, A trained": replace(ROWS[name], keywords={**ROWS[name].keywords, "train_a": True})
    for name in ("tall", "isometric, wide", "embedding", "experts", "opaque")
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
with_gradients = pytest.mark.parametrize(
    "row",
    [r for r in ROWS.values() if not r.tokens],
    ids=[n for n, r in ROWS.items() if not r.tokens],
)


class Model(nn.Module):
    """A module between two optional functions, ``before`` and ``after``."""

    def __init__(self, inner, before=None, after=None):
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x):
        x = x if self.before is None else self.before(x)
        y = self.inner(x)
        return y if self.after is None else self.after(y)


def make(row, dtype=torch.float64, **around):
    """A frozen plain model and an adapted copy of it."""
    torch.manual_seed(2)
    plain = Model(row.make(), **around).to(dtype).requires_grad_(False)
    model = copy.deepcopy(plain)
    randlora.inject(model, **{"rank": 2, **row.keywords})
    return plain, model


def trained(model):
    """Fill the adapter of a model with random numbers, and return the model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in randlora.adapter_parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 4)
    return model


def input_of(row, dtype=torch.float64, shape=None):
    generator = torch.Generator().manual_seed(4)
    shape = shape or row.shape
    if row.tokens:
        return torch.randint(row.tokens, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def results(model, x, call=None):
    """The output of the model, and the gradients of input and adapter."""
    x = x.detach().requires_grad_(x.is_floating_point())
    leaves = [*([x] if x.requires_grad else []), *randlora.adapter_parameters(model)]
    y = (model if call is None else call)(x)
    return [y.detach(), *torch.autograd.grad((y * probe_like(y)).sum(), leaves)]


def probe_like(y):
    """Random numbers, the factors of the outputs in a loss."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def close(got, want, tolerance=1e-12):
    """Equal up to a few hundred roundings of float64: the same sums in another order."""
    return all(
        a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)
        for a, b in zip(got, want, strict=True)
    )
