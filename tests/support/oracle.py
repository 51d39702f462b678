"""Runs a linear map and its gradients, and compares them with ``randlora.reference``."""

import itertools

import torch

from randlora import Choice, reference
from randlora.core.planning import AUTOMATIC
from randlora.functional import randlora_linear
from tests.support.cases import assert_close

# A few hundred roundings of float64, relative to the sum of the absolute values of the terms.
EXACT = 1e-13
SHAPES = {"tall": (7, 5, 2), "wide": (4, 6, 3), "square": (5, 5, 2), "one": (1, 1, 1)}


def run(fn, b, leaves, probe, needed=None):
    """The value of ``fn``, and the gradients of the sum of value times probe."""
    needed = needed or [True] * len(leaves)
    leaves = [t.detach().clone().requires_grad_(n) for t, n in zip(leaves, needed, strict=True)]
    y = fn(b, *leaves)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), inputs)]


def agree(c, fast, slow, leaves, needed=None):
    """Assert that ``fast`` with an operator equals the oracle ``slow`` with a dense ``B``."""
    (_, operator), (_, b) = c.operands(), c.bases()
    probe = torch.randn(slow(b, *leaves).shape, dtype=torch.float64)
    got = run(fast, operator, leaves, probe, needed)
    want = run(slow, b, leaves, probe, needed)
    sizes = run(slow, b.abs(), [t.abs() for t in leaves], probe.abs(), needed)
    for one, other, size in zip(got, want, sizes, strict=True):
        assert_close(one, other, EXACT, size)


def linear_agrees(c, choice=AUTOMATIC, *, needs_weight=True):
    """Assert that the linear map of a case and all its gradients are the oracle's."""

    def fast(b, x, weight, bias, lam, gamma, a):
        return randlora_linear(x, weight, bias, lam, gamma, a, b, scaling=c.scaling, choice=choice)

    def slow(b, x, weight, bias, lam, gamma, a):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=c.scaling)

    needed = [True, needs_weight, True, True, True, True]
    agree(c, fast, slow, [c.x, c.weight, c.bias, c.lam, c.gamma, c.a], needed)


WAYS = ("weight", "activations")
EVERY = [
    Choice(*ways, keeps, keep_weight)
    for ways in itertools.product(WAYS, repeat=3)
    for keeps in ("x", "xb")
    for keep_weight in (False, True)
]
