"""What an accelerator does otherwise than a CPU; on the CPU, and on ``meta`` tensors."""

import itertools
import math

import pytest
import torch

from randlora import BasisBank, Choice
from randlora.bases.isometry import factor_shapes
from randlora.core import machine, passes
from randlora.core.kronecker import KroneckerOperator
from randlora.core.operators import DenseOperator, SignOperator
from randlora.functional import randlora_linear
from tests.support.cases import KINDS, assert_close, case
from tests.support.oracle import EVERY, linear_agrees

SIZES = [(1, 1, 1), (3, 5, 7), (6, 4, 20)]
# Isometric bases of these sizes have two factors, one with rows cut; q, p and r.
FACTORED = [(160, 160, 8), (320, 96, 6), (331, 160, 7)]


@pytest.fixture
def as_an_accelerator(monkeypatch):
    monkeypatch.setattr(machine, "CPU", machine.ACCELERATOR)


def drawn(n, r, k, dtype=torch.float64):
    shapes = (n, r), (n, k), (r, k), (n * r, k)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def test_only_a_cpu_is_a_cpu():
    assert machine.machine_of(torch.device("cpu")) is machine.CPU
    for kind in ("cuda", "meta", "mps"):
        assert machine.machine_of(torch.device(kind)) is machine.ACCELERATOR


@pytest.mark.parametrize("sizes", SIZES)
def test_coefficients_are_products_of_three(sizes):
    lam, gamma, a, _ = drawn(*sizes)
    want = torch.stack([torch.outer(lam[j], gamma[j]) * a for j in range(len(lam))]).flatten(0, 1)
    for by_columns in (False, True):
        got = passes.coefficients(lam, gamma, a, torch.float64, by_columns)
        assert_close(got, want, 1e-15)
        assert (got.T if by_columns else got).is_contiguous()
    assert passes.coefficients(lam, gamma, a, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_of_coefficients_are_autograd_s(sizes):
    lam, gamma, a, p = drawn(*sizes)
    leaves = lam.requires_grad_(), gamma.requires_grad_()
    want = torch.autograd.grad(passes.coefficients(*leaves, a, torch.float64), leaves, p)
    for got, wanted in zip(passes.coefficient_grads(p, *leaves, a), want, strict=True):
        assert_close(got, wanted, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", FACTORED)
def test_every_plan_gives_what_the_oracle_gives(as_an_accelerator, kind, sizes):
    q, p, r = sizes
    for out, in_ in {(q, p), (p, q)}:
        c = case(BasisBank(kind, seed=2), out, in_, r, -(-p // r))
        for choice in EVERY:
            linear_agrees(c, choice)


def test_the_weight_is_left_as_it_is(as_an_accelerator):
    """It is the addend of the product: no copy of it is made and changed."""
    for kind, (q, p, r) in itertools.product(KINDS, FACTORED):
        for out, in_ in {(q, p), (p, q)}:
            c = case(BasisBank(kind, seed=2), out, in_, r, -(-p // r))
            weight = c.weight.clone()
            a, b = c.operands()
            randlora_linear(c.x, weight, None, c.lam, c.gamma, a, b, choice=Choice("weight"))
            assert torch.equal(weight, c.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["isometric", "dense", "signs"])
def test_nothing_depends_on_values(kind, dtype):
    """Tensors on ``meta`` have none: whatever would wait for a device to know one raises."""

    def make(*shape, dtype=dtype, grad=False):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)

    for q, p, r in FACTORED:
        n = -(-p // r)
        if kind == "isometric":
            left, right = factor_shapes(q, n * r)
            b = KroneckerOperator(make(*left), make(*right), (q, n * r))
        elif kind == "dense":
            b = DenseOperator(make(q, n * r), unit=0.5 if dtype == torch.float16 else None)
        else:
            b = SignOperator(make(q, n * r, dtype=torch.int8), math.sqrt(6))
        wider = {"dtype": torch.float32, "grad": True}
        for (out, in_), choice in itertools.product({(q, p), (p, q)}, EVERY):
            x, weight = make(9, in_, grad=True), make(out, in_)
            lam, gamma, a = make(n, r, **wider), make(n, p, **wider), make(r, p, **wider)
            y = randlora_linear(x, weight, None, lam, gamma, a, b, dtype, choice=choice)
            grads = torch.autograd.grad(y, [x, lam, gamma, a], torch.empty_like(y))
            assert [g.shape for g in grads] == [x.shape, lam.shape, gamma.shape, a.shape]
            assert [g.dtype for g in grads] == [dtype, *3 * [torch.float32]]
