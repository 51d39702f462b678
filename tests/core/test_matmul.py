"""``randlora.core.matmul``: equal values, which products use oneDNN or float32, which do not."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import randlora
from randlora import BasisBank, Choice, reference
from randlora.core import machine, matmul
from randlora.functional import randlora_linear
from tests.support import cases
from tests.support.cases import assert_close
from tests.support.layouts import matrix

LAYOUTS = ("rows", "columns", "strided", "tile")
needs_onednn = pytest.mark.skipif(not matmul._AVAILABLE, reason="no oneDNN to ask here")


def laid_out(rows, columns, layout, dtype=torch.float32):
    if layout == "tile":
        return torch.randn(rows, columns + 3).to(dtype)[:, 1:-2]
    return matrix(rows, columns, layout, dtype)


@pytest.fixture
def asked(monkeypatch):
    """Record the products given to oneDNN. Without oneDNN on this machine, torch computes them."""
    calls = []
    real = matmul._onednn if matmul._AVAILABLE else lambda a, b: a @ b

    def record(a, b):
        assert not torch.is_grad_enabled()
        calls.append((a.shape, b.shape))
        return real(a, b)

    monkeypatch.setattr(matmul, "_AVAILABLE", True)
    monkeypatch.setattr(matmul, "USE_ONEDNN", True)
    monkeypatch.setattr(matmul, "_onednn", record)
    return calls


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=str)
@pytest.mark.parametrize("size", [(300, 200, 250), (64, 1000, 201), (70, 64, 2000), (1025, 96, 97)])
@torch.no_grad()
def test_products_are_those_of_torch(size, layouts, asked):
    rows, inner, columns = size
    a, b = laid_out(rows, inner, layouts[0]), laid_out(inner, columns, layouts[1])
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # Each sum has `inner` terms. One rounding per term is an upper bound.
    bound = inner * torch.finfo(torch.float32).eps
    assert_close(matmul.mm(a, b).double(), exact, bound, magnitude)
    for total in (laid_out(rows, columns, layout) for layout in LAYOUTS):
        want = total.double() + exact
        matmul.addmm_(total, a, b)
        assert_close(total.double(), want, bound, magnitude + want.abs())
    # oneDNN gets no view without a unit stride, and no two parts of larger matrices.
    hard = "strided" in layouts or layouts == ("tile", "tile")
    assert len(asked) == (0 if hard else 1 + len(LAYOUTS))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 63}, {"inner": 63}, {"columns": 63}, {"rows": 0}, {"inner": 0}, {"columns": 0},
        {"rows": 64, "inner": 64, "columns": 64}, {"dtype": torch.float64},
        {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"grad": True}, {"off": True},
        {"flags": True},
    ],
    ids=str,
)  # fmt: skip
def test_other_products_are_left_to_torch_to_the_bit(change, asked, monkeypatch):
    of = {"rows": 400, "inner": 300, "columns": 200, "dtype": torch.float32, **change}
    a = torch.randn(of["rows"], of["inner"]).to(of["dtype"])
    b = torch.randn(of["inner"], of["columns"]).to(of["dtype"])
    if "off" in change:
        monkeypatch.setattr(matmul, "USE_ONEDNN", False)
    monkeypatch.setattr(matmul, "UPCAST_DTYPES", frozenset())
    if "flags" in change:
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.set_grad_enabled("grad" in change):
        assert torch.equal(matmul.mm(a, b), a @ b)
        total = torch.randn(of["rows"], of["columns"]).to(of["dtype"])
        want = torch.addmm(total, a, b)
        matmul.addmm_(total, a, b)
        assert torch.equal(total, want)
    assert not asked


# --- low precision, in float32 -------------------------------------------------------------------


LOW = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=str)
@pytest.mark.parametrize("block", [2**8, 2**21])
@torch.no_grad()
def test_low_precision_is_rounded_once(block, layouts, dtype, monkeypatch):
    monkeypatch.setattr(matmul, "UPCAST_DTYPES", frozenset({dtype}))
    monkeypatch.setattr(matmul, "_BLOCK", block)
    a, b = laid_out(300, 40, layouts[0], dtype), laid_out(40, 520, layouts[1], dtype)
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    half = torch.finfo(dtype).eps / 2  # one rounding to dtype, and float32 roundings in the sum
    sums = 40 * torch.finfo(torch.float32).eps * magnitude

    def once(got, want, sums):
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= half * want.abs() + sums).all()

    once(matmul.mm(a, b), exact, sums)
    for total in (laid_out(300, 520, layout, dtype) for layout in LAYOUTS):
        want = total.double() + exact
        matmul.addmm_(total, a, b)
        once(total, want, sums + 1e-6 * want.abs())


@pytest.mark.parametrize(
    ("dtype", "widened"),
    [
        *((dtype, False) for dtype in (torch.float64, torch.float32, *LOW)),
        *((dtype, True) for dtype in LOW),
    ],
)
@torch.no_grad()
def test_a_matrix_times_each_of_several(dtype, widened, monkeypatch):
    monkeypatch.setattr(matmul, "UPCAST_DTYPES", frozenset({dtype} if widened else ()))
    a, blocks = torch.randn(12, 9).to(dtype), torch.randn(5, 9, 30).to(dtype)
    total = torch.randn(5, 12, 30).to(dtype)
    exact = torch.stack([a.double() @ block.double() for block in blocks])
    eps = torch.finfo(dtype).eps
    assert_close(matmul.bmm(a, blocks).double(), exact, 9 * eps)
    want = total.double() + exact
    matmul.baddbmm_(total, a, blocks)
    assert total.dtype == dtype
    assert_close(total.double(), want, 9 * eps)


@pytest.mark.parametrize("change", ["grad", "empty"])
def test_widened_products_keep_what_products_have(change, monkeypatch):
    monkeypatch.setattr(matmul, "UPCAST_DTYPES", frozenset({torch.bfloat16}))
    a = torch.randn(30, 0 if change == "empty" else 20).bfloat16().requires_grad_()
    b = torch.randn(a.shape[1], 10).bfloat16()
    with torch.set_grad_enabled(change == "grad"):
        y = matmul.mm(a, b)
        total = torch.zeros(30, 10).bfloat16()
        matmul.addmm_(total, a, b)
    assert torch.equal(total, y) or change == "grad"
    assert torch.equal(y, a @ b)
    if change == "grad":
        assert torch.autograd.grad(y.float().sum(), a)[0].shape == a.shape


FLAGS = {
    "fpu sse2 avx512_bf16": {torch.float16},
    "fpu amx_bf16 avx512_fp16": set(),
    "fpu sse2 avx512f": {torch.float16, torch.bfloat16},
    "Features : fp asimd": set(),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_only_processors_that_lack_units_widen_by_default(flags, monkeypatch):
    monkeypatch.setattr(matmul.Path, "read_text", lambda path: f"flags : {flags}\n")
    assert matmul._without_units() == FLAGS[flags]


@torch.no_grad()
def test_parameters_are_tensors_and_other_subclasses_are_not(asked):
    class Marked(torch.Tensor):
        pass

    a, b = torch.randn(300, 200), torch.randn(200, 250)
    assert matmul.mm(a, nn.Parameter(b)).is_contiguous()
    assert matmul.mm(nn.Parameter(a), b).is_contiguous()
    assert len(asked) == 2
    for one, other in ((a.as_subclass(Marked), b), (a, b.as_subclass(Marked))):
        assert torch.equal(matmul.mm(one, other).as_subclass(torch.Tensor), a @ b)
        matmul.addmm_(torch.zeros(300, 250), one, other)
    assert len(asked) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")  # torch's own use
@torch.no_grad()
def test_forward_derivatives_are_not_lost(asked):
    a, b, tangent = torch.randn(300, 200), torch.randn(200, 250), torch.randn(300, 200)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, tangent)
        found = forward_ad.unpack_dual(matmul.mm(dual, b)).tangent
        assert torch.equal(found, tangent @ b)
    assert not asked
    matmul.mm(a, b)
    assert asked


def test_the_gradient_of_the_input_is_laid_out_by_rows():
    c = cases.case(BasisBank(seed=3), 320, 256, 8, 32, lead=(200,))
    a, b = c.operands(torch.float32)
    for way in ("weight", "activations"):
        x = c.x.float().requires_grad_()
        weight = nn.Parameter(c.weight.float(), requires_grad=False)
        y = randlora_linear(
            x, weight, None, c.lam.float(), c.gamma.float(), a, b, choice=Choice(way, way)
        )
        assert torch.autograd.grad(y.sum(), x)[0].is_contiguous()


@pytest.mark.parametrize(("vendor", "asked"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_only_processors_of_amd_ask_by_default(vendor, asked, monkeypatch):
    monkeypatch.setattr(matmul.Path, "read_text", lambda path: f"vendor_id : {vendor}")
    assert matmul._made_by_amd() is asked

    def fail(path):
        raise OSError

    monkeypatch.setattr(matmul.Path, "read_text", fail)
    monkeypatch.setattr(matmul.platform, "processor", lambda: f"Family 25, {vendor}")
    assert matmul._made_by_amd() is asked


def test_an_operator_of_another_signature_is_no_use(monkeypatch):
    monkeypatch.setattr(matmul, "_SIGNATURE", matmul._SIGNATURE.replace("X", "Y"))
    assert not matmul._available()


@needs_onednn
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", [(320, 256), (256, 320)])
@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse", "isometric"])
def test_large_layers_in_float32_agree_with_the_oracle(kind, shape, tiled, asked, monkeypatch):
    """At sizes for which oneDNN is used. The tests at small sizes do not use it."""
    monkeypatch.setattr(machine, "TRANSIENT_BYTES", 320 * 4 * 128 if tiled else 2**28)
    c = cases.case(BasisBank(kind, seed=3), *shape, 8, 32, lead=(3, 150))
    a, b = c.operands(torch.float32)
    probe = torch.randn(3, 150, shape[0])
    names = ("x", "weight", "bias", "lam", "gamma")
    for ways in itertools.product(("weight", "activations"), repeat=3):
        leaves = [getattr(c, name).float().requires_grad_() for name in names]
        y = randlora_linear(*leaves, a, b, scaling=0.7, choice=Choice(*ways, keep_weight=None))
        got = torch.autograd.grad((y * probe).sum(), leaves)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        bases = c.bases()
        want = reference.linear(*exact[:3], *bases, *exact[3:], scaling=0.7)
        wants = torch.autograd.grad((want * probe).sum(), exact)
        for one, other in zip((y, *got), (want, *wants), strict=True):
            # Sums of about 10,000 products of order one; errors are relative to the largest entry.
            assert_close(one.double(), other, 1e-5)
    assert asked


def test_second_derivatives_go_around_it(asked):
    c = cases.case(BasisBank(seed=3), 320, 256, 8, 32, lead=(200,))
    a, b = c.operands(torch.float32)
    x, weight, lam, gamma = (t.float() for t in (c.x, c.weight, c.lam, c.gamma))
    lam.requires_grad_()
    y = randlora_linear(x, weight, None, lam, gamma, a, b)
    (first,) = torch.autograd.grad(y.square().sum(), lam, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), lam)
    assert asked  # in the forward, which records no derivatives
    assert second.isfinite().all()
    assert second.abs().max() > 0


@pytest.mark.skipif(
    torch.__version__.startswith("2.9."),
    reason="Dynamo of torch 2.9 takes every compilation for an export, whose products are torch's",
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", ["weight", "activations"])
def test_compiled_code_gives_it_the_same_products(way, dynamic, asked):
    layer = randlora.RandLoRALinear(256, 320, rank=8, bank=BasisBank(seed=3))
    nn.init.normal_(layer.randlora_gamma)
    layer.choice = Choice(way, way, way)
    leaves = torch.randn(200, 256, requires_grad=True), *layer.weight_update.parameters(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for call in (layer, compiled):
        asked.clear()
        y = call(leaves[0])
        results.append((sorted(asked), y, *torch.autograd.grad(y.square().sum(), leaves)))
    (products, *eager), (compiled_products, *got) = results
    assert compiled_products == products
    assert products
    for one, other in zip(got, eager, strict=True):
        # Sums of about 10,000 products of order one; errors are relative to the largest entry.
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=str)
def test_the_operation_of_compiled_code_is_what_it_says(layouts, asked):
    matrices = laid_out(300, 200, layouts[0]), laid_out(200, 250, layouts[1])
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(matmul.compiled_mm, matrices, test_utils=tests)
    assert torch.equal(matmul.compiled_mm(*matrices), torch.no_grad()(matmul.mm)(*matrices))


def test_an_export_asks_no_library_that_is_not_on_every_processor(asked):
    layer = randlora.RandLoRALinear(256, 320, rank=8)
    exported = torch.export.export(layer, (torch.randn(200, 256),))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert not any("randlora.mm" in target for target in targets)
