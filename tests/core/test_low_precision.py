"""The linear map in float32, bfloat16 and float16 against the oracle in float64."""

import pytest
import torch

from randlora import BasisBank, Choice, reference
from randlora.core.update import FactoredUpdate
from randlora.functional import effective_weight, randlora_linear
from tests.support import cases
from tests.support.cases import assert_close, case
from tests.support.oracle import EVERY, WAYS, run


def test_gradients_of_low_precision_are_summed_in_that_of_the_parameters():
    """P is bfloat16, the sums are float32. Sums in bfloat16 would have errors of about 1 %."""
    c = case(BasisBank(seed=2), 2000, 2000, 4, 3)
    a, b = c.operands(torch.bfloat16)
    lam, gamma = c.lam.float(), c.gamma.float()
    p = torch.randn(12, 2000).bfloat16()
    grads = FactoredUpdate(lam, gamma, a, b, 1.0, wide=False).parameter_grads(
        p, slice(0, 2000), (True, True, True)
    )
    by_base = p.double().view(3, 4, -1)
    of_lam, of_gamma = lam.double().unsqueeze(2), gamma.double().unsqueeze(1)
    wants = (
        (by_base * a.double() * of_gamma).sum(2),
        (by_base * a.double() * of_lam).sum(1),
        (by_base * of_lam * of_gamma).sum(0),
    )
    for got, want in zip(grads, wants, strict=True):
        assert got.dtype == torch.float32
        assert_close(got.double(), want, 1e-5)


def linear(choice, scaling=1.0, trained=True):
    """The linear map in the dtype of ``x``, with a trained float32 ``A`` or a frozen one."""

    def fn(b, x, weight, bias, lam, gamma, a):
        a = a if trained else a.to(x.dtype)
        keywords = {"scaling": scaling, "choice": choice}
        return randlora_linear(x, weight, bias, lam, gamma, a, b, x.dtype, **keywords)

    return fn


def exact(scaling=1.0):
    def fn(b, x, weight, bias, lam, gamma, a):
        return reference.linear(x, weight, bias, a, b, lam, gamma, scaling=scaling)

    return fn


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", ["weight", "activations"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse", "isometric"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_follows_float64(shape, dtype, kind, way, trained):
    """Values and gradients within a few roundings of the dtype, with float32 parameters."""
    out_features, in_features, r = {"tall": (96, 64, 6), "wide": (64, 96, 6)}[shape]
    n = -(-min(out_features, in_features) // r)
    c = case(BasisBank(kind, seed=2), out_features, in_features, r, n, scaling=0.01)
    choice = Choice(way, way, way)
    low = [t.to(dtype) for t in (c.x, c.weight, c.bias)]
    low += [t.float() for t in (c.lam, c.gamma, c.a)]
    needed = [True] * 5 + [trained]
    (_, operator), (_, b) = c.operands(dtype), c.bases()
    probe = torch.randn(7, out_features, dtype=torch.float64).to(dtype)
    got = run(linear(choice, c.scaling, trained), operator, low, probe, needed)
    want = run(exact(c.scaling), b, [t.double() for t in low], probe.double(), needed)
    for value, leaf, wanted in zip(got, [low[0], *low][: len(want)], want, strict=True):
        assert value.dtype == leaf.dtype
        # Inputs, bases, C, W0 + ΔW, P and the result are rounded: six times, in sums that cancel.
        assert_close(value.double(), wanted, 8 * torch.finfo(dtype).eps)


# --- float16 -------------------------------------------------------------------------------------


def large(kind, size, of_x, of_dy, tokens=16):
    """A float16 layer with values like a trained one, and large activations and gradients."""
    out_features, in_features = size
    n = -(-min(size) // 8)
    c = case(BasisBank(kind, seed=2), out_features, in_features, 8, n, lead=(tokens,), scaling=1)
    half = (in_features**-0.5 * c.weight).half(), c.bias.half()
    trained = (c.lam / (8 * n) ** 0.5).float(), (in_features**-0.5 * c.gamma).float(), c.a.float()
    dy = of_dy * torch.randn(tokens, out_features, dtype=torch.float64)
    return c, [(of_x * c.x).half(), *half, *trained], dy.half()


def compare(c, leaves, dy, choice, trained):
    needed = [True, False, False, True, True, trained]
    (_, operator), (_, b) = c.operands(torch.float16), c.bases()
    got = run(linear(choice, trained=trained), operator, leaves, dy, needed)
    want = run(exact(), b, [t.double() for t in leaves], dy.double(), needed)
    for one, other in zip(got, want, strict=True):
        assert other.abs().max() < torch.finfo(one.dtype).max  # the exact result fits
        # Inputs are exact. Bases, C, W0 + ΔW, products with one factor, P and the result are
        # rounded, in sums that cancel, as in the test of low precision above.
        assert_close(one.double(), other, 8 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("of_x", "of_dy"), [(300, 100), (3000, 3000), (1, 2**12), (1, 1e-3)])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("size", [(192, 64), (64, 192), (96, 96)], ids=str)
def test_float16_overflows_no_sooner_than_the_plain_layer(size, kind, of_x, of_dy, trained):
    """For every plan, on inputs for which the exact results fit into their dtypes."""
    c, leaves, dy = large(kind, size, of_x, of_dy)
    for choice in EVERY[::3]:
        compare(c, leaves, dy, choice, trained)


@pytest.mark.parametrize("kind", ["dense", "very_sparse", "isometric"])
@pytest.mark.parametrize("size", [(1024, 256), (256, 1024)], ids=str)
def test_large_layers_in_float16_do_not_overflow_either(size, kind):
    c, leaves, dy = large(kind, size, 300, 1000, tokens=8)
    for way in WAYS:
        compare(c, leaves, dy, Choice(way, way, way), trained=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(192, 64), (64, 192)], ids=str)
def test_what_is_not_finite_stays_so(size, way):
    """Gradient scalers look for infinite or NaN gradients."""
    c, leaves, dy = large("dense", size, 1, 1)
    _, b = c.operands(torch.float16)
    for leaf in leaves[3:]:
        leaf.requires_grad_()
    dy[0, 0] = torch.inf
    linear(Choice(way, way, way))(b, *leaves).backward(dy)
    assert not any(leaf.grad.isfinite().all() for leaf in leaves[3:])


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("size", [(192, 64), (64, 192)], ids=str)
def test_the_gradient_of_a_read_weight_does_not_overflow_in_float16(size, kind):
    c, (_, weight, _, *trained), _ = large(kind, size, 1, 1)
    (_, operator), (_, dense) = c.operands(torch.float16), c.bases()
    dw = (15000 * torch.randn(size, dtype=torch.float64)).clamp(-65000, 65000).half()

    def fast(b, lam, gamma, a):
        return effective_weight(weight, lam, gamma, a, b, torch.float16)

    def slow(b, lam, gamma, a):
        return reference.delta_weight(a, b, lam, gamma, wide=c.wide)

    got = run(fast, operator, trained, dw)[1:]
    want = run(slow, dense, [t.double() for t in trained], dw.double())[1:]
    for one, other in zip(got, want, strict=True):
        assert_close(one.double(), other, 8 * torch.finfo(torch.float16).eps)
