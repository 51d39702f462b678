"""The table of modules: what is refused by name, and what may be registered."""

import warnings

import pytest
import torch
from torch import nn

from randlora import inject, register, summary
from randlora.model.index import adapted_modules
from randlora.modules import table
from tests.support.rows import Opaque
from tests.support.small import Held, parts, scripted


def normed(kind):
    return lambda: kind(nn.Linear(8, 8))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv1d(8, 8, 3))


def with_forward(module):
    module.forward = module.forward
    return module


class Named(nn.Linear):
    rank = 7


def resized(module):
    module.weight = nn.Parameter(torch.randn(5, 4))
    return module


def sparse(module):
    module.weight = nn.Parameter(module.weight.detach().to_sparse())
    return module


def empty():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Conv1d(8, 0, 3)


PARAMETRIZED = nn.utils.parametrizations
REFUSED = {
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), "Bilinear is bilinear in two inputs"),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), "EmbeddingBag adds up rows"),
    "norm": (lambda: nn.LayerNorm(8), "LayerNorm is not of a class .* randlora.register"),
    "scripted": (scripted, "RecursiveScriptModule is compiled by TorchScript"),
    "weight norm": (normed(PARAMETRIZED.weight_norm), "ParametrizedLinear computes its weight"),
    "spectral norm": (normed(PARAMETRIZED.spectral_norm), "ParametrizedLinear computes its weight"),
    "old weight norm": (old_weight_norm, "Conv1d computes its weights"),
    "complex linear": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "of torch.complex64"),
    "own attribute": (lambda: Named(4, 4), "Named has an attribute 'rank' of its own"),
    "other sizes": (lambda: resized(nn.Linear(4, 4)), r"of shape \(5, 4\), but .* say \(4, 4\)"),
    "more words": (lambda: resized(nn.Embedding(4, 4)), r"of shape \(5, 4\), but .* say \(4, 4\)"),
    "sparse": (lambda: sparse(nn.Linear(4, 4)), "Linear has a weight that is not dense"),
    "complex": (lambda: nn.Conv1d(4, 4, 3, dtype=torch.complex64), "weight of torch.complex64"),
    "float8": (lambda: nn.Conv1d(4, 4, 3).to(torch.float8_e4m3fn), "weight of torch.float8_e4m3fn"),
    "max norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), "Embedding has max_norm"),
    "by frequency": (lambda: nn.Embedding(9, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "empty": (empty, "Conv1d has an empty weight"),
    "opaque, forward of its own": (lambda: with_forward(Opaque(8, 8)), "forward that is bound"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name_and_untouched(name):
    build, message = REFUSED[name]
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "it": build()})
    before = parts(model)
    with pytest.raises(TypeError, match=f"'it', but .*{message}"):
        inject(model, rank=2, target_modules=["one", "it"])
    assert parts(model) == before
    assert all(p.requires_grad for p in model["one"].parameters())
    inject(model, rank=2)  # by default it is left out
    assert [layer.name for layer in summary(model).layers] == ["one"]


@pytest.mark.parametrize("build", [lambda: nn.LazyLinear(8), lambda: nn.LazyConv2d(8, 3)])
def test_a_model_without_sizes_is_refused_until_it_has_run(build):
    model = nn.ModuleDict({"one": nn.Linear(8, 8), "it": build()})
    with pytest.raises(ValueError, match=r"'it', a Lazy.*, has no sizes before it is run"):
        inject(model, rank=2)
    assert type(model["one"]) is nn.Linear
    assert model["one"].weight.requires_grad
    model["it"](torch.randn(2, 4, 8, 8))
    assert list(adapted_modules(inject(model, rank=2))) == ["one", "it"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("vector", "'vector', but vector of Held is neither a matrix nor a stack"),
        ("codes", "'codes', but Held has a codes of torch.int8"),
        ("linear.bias", "'linear.bias', but bias of Linear is neither"),
        ("clipped.weight", "'clipped.weight', but Embedding has max_norm"),
        ("both.weight", "'both.weight', but Bilinear is bilinear"),
        ("scripted.weight", "'scripted.weight', but .* is compiled by TorchScript"),
        ("named.extra", "'named.extra', but Named has an attribute 'rank' of its own"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_refused_by_name(pattern, message):
    model = Held()
    model.clipped, model.both = nn.Embedding(9, 4, max_norm=0.1), nn.Bilinear(3, 4, 5)
    model.scripted, model.named = scripted(), Named(4, 4)
    model.named.extra = nn.Parameter(torch.randn(4, 4))
    before = parts(model)
    with pytest.raises(TypeError, match=message):
        inject(model, rank=2, target_parameters=["matrix", pattern])
    assert parts(model) == before


def test_a_parameter_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'matrx' matches no parameter .* close to it: 'matrix'"):
        inject(Held(), rank=2, target_parameters="matrx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Held(), "matrix"), "cls must be a subclass of nn.Module, got Held"),
        ((int, "matrix"), "cls must be a subclass of nn.Module, got <class 'int'>"),
        ((Held, 3), "parameters must be strings, got 3 of type int"),
    ],
)
def test_registering_what_is_no_class_or_name_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        register(*arguments)
    assert Held not in table._TABLE
