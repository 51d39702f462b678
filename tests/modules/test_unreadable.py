"""Modules with an unreadable weight: the update is added to their output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from randlora import inject
from randlora.modules import effective
from tests.support.rows import (
    Opaque,
    shuffled,
)
from tests.support.small import adapted


def test_an_opaque_layer_without_a_gradient_says_so():
    class Detached(Opaque):
        def forward(self, x):
            return super().forward(x).detach()

    layer = inject(Detached(8, 8), rank=2)
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.randlora_gamma.grad.count_nonzero()
    with pytest.raises(
        RuntimeError, match=r"Detached gives no gradient to its input, so.* trained$"
    ):
        layer(torch.randn(3, 8, requires_grad=True))
    layer.support_avx512bf16_for_cpu = (
        True  # as 4-bit layers of bitsandbytes, which pack the weight
    )
    with pytest.raises(RuntimeError, match="set its support_avx512bf16_for_cpu to False before"):
        layer(torch.randn(3, 8, requires_grad=True))


def test_eight_bits_of_bitsandbytes():
    """Not in the contract test: the plain layer differs between training and evaluation."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    x = torch.randn(5, 64, requires_grad=True)
    base = layer(x)
    (grad,) = torch.autograd.grad(base.sum(), x)
    model = inject(layer, rank=3)
    assert torch.equal(model(x), base)
    shuffled(model)
    update = model._randlora.active_updates["weight"]
    delta = effective.delta_of(model, update)
    torch.testing.assert_close(model(x), base + F.linear(x, delta), rtol=1e-5, atol=1e-4)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, grad + delta.sum(0).expand_as(x), rtol=1e-5, atol=1e-4)
    assert all(p.grad.count_nonzero() for p in randlora.adapter_parameters(model))


class Codes(nn.Linear):
    """A linear layer with integers for a weight, like quantised layers."""

    returns = torch.float32

    def __init__(self):
        super().__init__(8, 6)
        codes = torch.randint(-9, 9, (6, 8), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype)).to(self.returns)


def test_an_opaque_layer_draws_bases_for_what_it_is_given_and_returns_its_dtype():
    class Half(Codes):
        returns = torch.bfloat16

    for build, returns in ((Codes, torch.float32), (Half, torch.bfloat16)):
        model = adapted(build())
        (update,) = model[0]._randlora.all_updates()
        assert model(torch.randn(3, 8)).dtype == returns
        assert {dtype for _, dtype in update._stores} == {torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(3, 8))
        assert {dtype for _, dtype in update._stores} == {torch.float32, torch.bfloat16}
        model.double()
        assert not update._stores


def test_dropout_of_an_opaque_layer_is_on_its_update_in_training():
    model, x = adapted(Codes(), dropout=0.5), torch.randn(64, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    with randlora.disabled(model):
        assert torch.equal(model.train()(x), model(x))


def test_an_opaque_layer_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(Opaque(8, 8))
    with pytest.raises(ValueError, match="'0' is on the meta device"):
        inject(model, 2)
