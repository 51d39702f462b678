"""Each operator gives the products of its dense value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora.bases.isometry import factor_shapes
from randlora.core import matmul
from randlora.core.gather import GatherOperator
from randlora.core.kronecker import KroneckerOperator
from randlora.core.operators import DenseOperator, SignOperator
from tests.support.cases import assert_close
from tests.support.layouts import LAYOUTS, matrix

KINDS = ("dense", "sign", "gather", "kronecker")


def make(kind, q, m, dtype=torch.float64):
    """An operator and its dense value, without the scale: entries times a unit of a quarter."""
    if kind == "dense":
        entries = torch.randn(q, m).to(dtype)
        return DenseOperator(entries, 1.0, 0.25), entries / 4
    if kind == "kronecker":
        left, right = (torch.randn(size).to(dtype) for size in factor_shapes(q, m))
        return KroneckerOperator(left, right, (q, m)), torch.kron(left, right)[:q, :m]
    signs = torch.randint(-1, 2, (q, m)).to(torch.int8)
    if kind == "gather":
        signs *= torch.rand(q, m) < 0.2
        return GatherOperator(signs, 2.0, dtype, 0.25), signs.to(dtype) / 4
    return SignOperator(signs, 2.0, 0.25), signs.to(dtype) / 4


@given(
    st.sampled_from(KINDS),
    st.sampled_from(LAYOUTS),
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(0, 300),
)
def test_products_are_those_of_the_dense_value(kind, layout, q, m, k):
    b, dense = make(kind, q, m)
    c, g, base = matrix(m, k, layout), matrix(q, k, layout), matrix(q, k, layout)
    x = matrix(k, q, layout)
    assert b.shape == (q, m)
    assert_close(b.tokens_mm(x), x @ dense, 1e-13)
    sums = [(b.tokens_addmm_, x, c.T, (dense @ c).T)]
    if k:  # there may be no tokens, but a weight has columns; torch 2.9 cannot pad one without
        assert_close(b.mm(c), dense @ c, 1e-13)
        assert_close(b.tmm(g), dense.T @ g, 1e-13)
        sums.append((b.addmm_, base, c, dense @ c))
    for add, total, side, product in sums:
        want = total + product
        add(total, side)
        assert_close(total, want, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_laid_out_by_rows(kind):
    b, _ = make(kind, 7, 5)
    c, g, x = matrix(5, 300, "columns"), matrix(7, 300, "columns"), matrix(300, 7, "rows")
    for result in (b.mm(c), b.tmm(g), b.tokens_mm(x).T if b.by_columns else b.tokens_mm(x)):
        assert result.stride(1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_products_can_be_differentiated(kind):
    b, _ = make(kind, 7, 5)
    c, g = matrix(5, 4, "rows").requires_grad_(), matrix(7, 4, "rows").requires_grad_()
    assert torch.autograd.gradcheck(b.mm, c)
    assert torch.autograd.gradcheck(b.tmm, g)
    x = matrix(4, 7, "rows").requires_grad_()
    assert torch.autograd.gradcheck(b.tokens_mm, x)

    def added(add, total, c):
        total = total.clone()
        add(total, c)
        return total

    assert torch.autograd.gradcheck(lambda g, c: added(b.addmm_, g, c), (g, c))
    assert torch.autograd.gradcheck(lambda x, c: added(b.tokens_addmm_, x, c.T), (x, c))


@pytest.mark.parametrize("kind", ["dense", "sign"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_are_rounded_once(kind, dtype):
    """The result is the exact sum rounded to the nearest, up to the error of a float32 sum."""
    b, dense = make(kind, 300, 200, dtype)
    base, c = matrix(300, 40, "rows", dtype), matrix(200, 40, "rows", dtype) / 64
    exact = base.double() + dense.double() @ c.double()
    ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3)
    one, other = base.clone(), base.T.clone(memory_format=torch.contiguous_format)
    b.addmm_(one, c)
    b.tokens_addmm_(other, c.T)
    for got in (one, other.T):
        assert ((got.double() - exact).abs() <= 0.501 * ulp).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gathering_in_low_precision_rounds_the_gathered_sum_once_more(dtype):
    b, dense = make("gather", 300, 200, dtype)
    base, c = matrix(300, 40, "rows", dtype), matrix(200, 40, "rows", dtype) / 64
    product = dense.double() @ c.double()
    exact = base.double() + product
    eps = torch.finfo(dtype).eps
    bound = 0.51 * eps * (exact.abs() + product.abs() + eps) + 1e-6 * (dtype != torch.float32)
    b.addmm_(base, c)
    error = (base.double() - exact).abs()
    assert (error <= bound + 20 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q", [300, 293])
def test_factors_in_low_precision_round_what_lies_between_them_once_more(q, dtype):
    b, _ = make("kronecker", q, 200, dtype)
    base, c = matrix(q, 40, "rows", dtype), matrix(200, 40, "rows", dtype) / 64
    dense = torch.kron(b.left.double(), b.right.double())[:q, :200]
    exact, magnitude = base.double() + dense @ c.double(), dense.abs() @ c.double().abs()
    # Half an eps for each rounding: of the product with one factor, of the cut product, and of the
    # sum. The constant is for the smallest numbers of float16.
    bound = torch.finfo(dtype).eps * (1.01 * magnitude + exact.abs()) + 1e-4
    one, other = base.clone(), base.T.clone(memory_format=torch.contiguous_format)
    b.addmm_(one, c)
    b.tokens_addmm_(other, c.T)
    for got in (one, other.T):
        assert ((got.double() - exact).abs() <= bound).all()


def test_costs_follow_the_sizes_of_the_factors():
    b = KroneckerOperator(torch.zeros(48, 48), torch.zeros(64, 16), (3072, 768))
    faster = 2 if matmul.uses_onednn(torch.float32, torch.device("cpu")) else 1
    # 3.6 % of the multiply-adds cost 9 % of the time (benchmarks/README.md).
    got = b.weight_cost // faster, b.token_cost // faster
    assert got == (88, 94)
    thin = KroneckerOperator(torch.zeros(96, 96), torch.zeros(32, 8), (3072, 768))
    assert thin.token_cost > 3 * b.token_cost
    small = KroneckerOperator(torch.zeros(8, 8), torch.zeros(8, 8), (64, 64))
    assert small.weight_cost > 2000 * faster  # for small sizes, the calls cost most


def test_costs_follow_the_density():
    signs = torch.zeros(400, 500, dtype=torch.int8)
    signs[:, ::10] = 1
    b = GatherOperator(signs, 1.0, torch.float32)
    faster = 2 if matmul.uses_onednn(torch.float32, torch.device("cpu")) else 1
    assert (b.weight_cost, b.token_cost) == (220 * faster, 360 * faster)
    assert GatherOperator(signs, 1.0, torch.bfloat16).weight_cost == 550
    assert DenseOperator(torch.zeros(2, 2)).token_cost == 1000


@given(st.sampled_from(KINDS), st.integers(1, 200), st.integers(1, 200), st.data())
def test_rows_are_those_of_the_dense_value(kind, q, m, data):
    b, dense = make(kind, q, m)
    places = torch.tensor(data.draw(st.lists(st.integers(0, q - 1), max_size=9)), dtype=torch.int64)
    rows = b.rows(places, torch.float32)
    assert rows.scale == b.scale
    assert torch.equal(rows.entries * (rows.unit or 1), dense[places].float())
