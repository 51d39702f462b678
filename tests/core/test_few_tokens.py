"""Few tokens: products with ``C``, and gradients, are computed without it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from randlora import BasisBank, Choice, RandLoRALinear
from randlora.core import kernel, update
from randlora.core.planning import FEW_FOR_GRADS
from randlora.functional import randlora_linear
from tests.support.cases import KINDS, case
from tests.support.oracle import EVERY, linear_agrees

ACTIVATIONS = Choice("activations", "activations", "activations")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("tiled", [False, True])
def test_every_plan_gives_what_the_oracle_gives(tiled, kind, shape, monkeypatch):
    found = set()

    def is_few(*arguments):
        found.add((arguments[3:], is_it := update.is_few(*arguments)))
        return is_it

    monkeypatch.setattr(kernel, "is_few", is_few)
    if tiled:
        monkeypatch.setattr("randlora.core.update.tile_width", lambda *_: 10)
    for tokens, choice in itertools.product((0, 1, 3, 4, 12, 13), EVERY):
        linear_agrees(case(BasisBank(kind, seed=2), *shape, 1, 24, lead=(tokens,)), choice)
    assert found == {(times, is_it) for times in ((), (FEW_FOR_GRADS,)) for is_it in (True, False)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(10, 8), (8, 10)])
def test_one_token_can_be_differentiated_twice(shape, kind):
    c = case(BasisBank(kind, seed=2), *shape, 1, 8, lead=(1,))
    _, b = c.operands()
    leaves = [t.detach().requires_grad_() for t in (c.x, c.weight, c.bias, c.lam, c.gamma, c.a)]
    assert update.is_few(c.x, c.a, 8, FEW_FOR_GRADS)
    for choice in EVERY:

        def fn(*leaves, b=b, choice=choice):
            return randlora_linear(*leaves, b, scaling=0.7, choice=choice)

        assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_without_an_update_it_is_the_plain_layer_to_the_bit(kind, dtype):
    """With inputs that float16 can hold, and a sum over them that it cannot."""
    torch.manual_seed(0)
    for in_, out in ((1024, 256), (256, 1024)):
        layer = RandLoRALinear(in_, out, rank=32, bank=BasisBank(kind), dtype=dtype)
        layer.choice = ACTIVATIONS
        x = (3000 * torch.randn(4, in_)).to(dtype)
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                assert torch.equal(layer(x), F.linear(x, layer.base_weight, layer.bias))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_for_any_number_of_tokens_is_for_few_as_well(shape, strict):
    layer = RandLoRALinear(*shape, rank=8, bank=BasisBank("dense"))
    nn.init.normal_(layer.randlora_gamma)
    layer.choice = ACTIVATIONS
    model, x = nn.Sequential(layer), torch.randn(20, shape[0])
    with torch.no_grad():
        model(x)
        shapes = ({0: Dim("tokens", min=2)},)
        graph = export(model, (x,), dynamic_shapes=shapes, strict=strict).module()
        for tokens in (2, 30):
            x = torch.randn(tokens, shape[0])
            torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_on_meta_compiles():
    layer = RandLoRALinear(64, 32, rank=8, bank=BasisBank("dense")).to("meta")
    x = torch.randn(3, 64, device="meta")
    assert layer(x).shape == (3, 32)
    assert torch.compile(layer, backend="eager", fullgraph=True)(x).shape == (3, 32)


def test_bad_input_draws_no_bases():
    bank = BasisBank("dense")
    layer = RandLoRALinear(64, 32, rank=8, bank=bank)
    before = bank.nbytes
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="63"):
        layer(torch.randn(3, 63))
    assert bank.nbytes == before


def test_the_limit_of_memory_holds_for_few_tokens(monkeypatch):
    x, a = torch.empty(3, 64, device="meta"), torch.empty(8, 64, device="meta")
    assert update.is_few(x, a, 8)
    monkeypatch.setattr("randlora.core.machine.TRANSIENT_BYTES", 8 * 3 * 8 * 64 - 1)
    assert not update.is_few(x, a, 8)


def test_what_is_kept_of_few_tokens_is_in_their_dtype():
    layer = RandLoRALinear(640, 160, rank=8, bank=BasisBank("isometric"), dtype=torch.bfloat16)
    layer.choice = Choice("activations", "weight", "activations", "xb")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(3, 640).bfloat16())
    assert [t.dtype for t in saved if t.shape == (3, 160)] == [torch.bfloat16]
