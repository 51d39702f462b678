"""Transforms of ``torch.func``, and forward-mode differentiation, of the functions and layers."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import randlora
from randlora import BasisBank, Choice, RandLoRALinear
from randlora.core import kernel
from tests.support.cases import KINDS, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*jit.script.*is deprecated")

# Some of these have two factors or are gathered, others are dense.
SHAPES = [(24, 16), (16, 24), (180, 167), (167, 180)]
CHOICES = [
    Choice(),
    Choice("weight", "weight", "weight"),
    Choice("weight", "weight", "activations", "xb", halves=True),
    Choice("activations", "weight", "activations", "xb"),
    Choice("activations", "activations", "activations"),
]


def layer_and_parameters(shape, kind, choice=None, **keywords):
    torch.manual_seed(0)
    layer = RandLoRALinear(*shape, rank=5, bank=BasisBank(kind), **keywords).double()
    layer.choice = choice or Choice()
    nn.init.normal_(layer.randlora_gamma)
    trained = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    return layer, trained


def tokens(layer, *lead):
    return torch.randn(*lead, layer.in_features, dtype=torch.float64)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_sample_are_those_of_a_loop(kind, shape, choice):
    layer, trained = layer_and_parameters(shape, kind, choice, train_a=True)
    x = tokens(layer, 4, 3)

    def loss(trained, x):
        return functional_call(layer, trained, x).pow(2).sum()

    got, got_x = vmap(grad(loss, (0, 1)), (None, 0))(trained, x)
    for i, sample in enumerate(x):
        leaves = {n: t.clone().requires_grad_() for n, t in trained.items()}
        sample = sample.clone().requires_grad_()
        loss(leaves, sample).backward()
        for name, leaf in leaves.items():
            assert_close(got[name][i], leaf.grad, 1e-12)
        assert_close(got_x[i], sample.grad, 1e-12)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_is_the_transpose_of_reverse_mode(kind, shape, choice):
    layer, trained = layer_and_parameters(shape, kind, choice, train_a=True)
    x = tokens(layer, 7)
    names, primals = list(trained), (x, *trained.values())
    tangents = tuple(map(torch.randn_like, primals))

    def fn(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    value, got = jvp(fn, primals, tangents)
    assert_close(value, fn(*primals), 1e-13)
    probe = torch.randn_like(value)
    leaves = [t.clone().requires_grad_() for t in primals]
    grads = torch.autograd.grad(fn(*leaves), leaves, probe)
    want = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    assert_close((got * probe).sum(), want, 1e-11)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        assert_close(forward_ad.unpack_dual(fn(*duals)).tangent, got, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recorded", [False, True])
def test_an_ensemble_is_its_members(recorded, kind):
    for shape in SHAPES:
        layer, trained = layer_and_parameters(shape, kind)
        members = {n: torch.stack([t, 2 * t, -t]) for n, t in trained.items()}
        for lead in ((), (1,), (5,)):
            x = tokens(layer, *lead)
            with torch.set_grad_enabled(recorded):
                got = vmap(lambda t, x=x, layer=layer: functional_call(layer, t, x))(members)
                for i, one in enumerate(got):
                    member = {n: t[i] for n, t in members.items()}
                    assert_close(one, functional_call(layer, member, x), 1e-12)


def test_second_derivatives_agree_in_all_ways():
    layer, trained = layer_and_parameters((6, 5), "dense")
    x = tokens(layer, 3)

    def loss(gamma):
        return functional_call(layer, {**trained, "randlora_gamma": gamma}, x).pow(3).sum()

    gamma = trained["randlora_gamma"]
    want = torch.autograd.functional.hessian(loss, gamma)
    for transform in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))):
        assert_close(transform(loss)(gamma), want, 1e-11)


def test_reverse_mode_alone_still_goes_through_the_autograd_functions(monkeypatch):
    """In float16, gradients of plain operations overflow sooner, and they save more."""
    calls = []
    original = kernel.Linear.setup_context

    def setup_context(*arguments):
        calls.append(1)
        original(*arguments)

    monkeypatch.setattr(kernel.Linear, "setup_context", staticmethod(setup_context))
    layer, _ = layer_and_parameters((8, 6), "dense")
    x = tokens(layer, 3)
    grad(lambda x: layer(x).sum())(x)
    assert calls
    calls.clear()
    grad(lambda x: grad(lambda x: layer(x).pow(2).sum())(x).sum())(x)
    assert calls
    calls.clear()
    vmap(layer)(x)
    vmap(grad(lambda x: layer(x).sum()))(x)
    assert not calls


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_model_of_other_layers_transforms_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 12), nn.TransformerEncoderLayer(12, 2, 24, dropout=0, batch_first=True)
    ).double()
    randlora.inject(model, 4)
    for parameter in randlora.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    trained = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    x = torch.randint(0, 11, (3, 5))

    def loss(trained, x):
        return functional_call(model, trained, x[None]).pow(2).sum()

    got = vmap(grad(loss), (None, 0))(trained, x)
    for i, sample in enumerate(x):
        for name, want in grad(loss)(trained, sample).items():
            assert_close(got[name][i], want, 1e-10)
