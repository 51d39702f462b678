"""What a CUDA device computes is what the oracle and a CPU compute; skipped where there is none."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from randlora import BasisBank, Choice, RandLoRALinear, reference
from randlora.core import passes
from randlora.core.operators import DenseOperator
from randlora.functional import randlora_linear
from tests.support import cases

pytestmark = [
    pytest.mark.cuda,
    # What torch itself says where nothing is wrong.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
WAYS = ("weight", "activations")
PLANS = [
    Choice(*ways, keeps) for ways in itertools.product(WAYS, repeat=3) for keeps in ("x", "xb")
]
PLANS += [Choice("weight", "weight", "weight", keep_weight=True)]
SHAPES = [(96, 64, 8), (64, 96, 8), (64, 64, 6), (160, 48, 5), (40, 200, 7), (128, 128, 16)]
# A few roundings of each dtype, relative to the largest entry.
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def tensors(kind, out, in_, r, dtype, tokens=33):
    """Leaves on the GPU, the bases in its dtype, and the bases for the oracle."""
    torch.manual_seed(0)
    p, q = min(out, in_), max(out, in_)
    n = -(-p // r)
    bank = BasisBank(kind, seed=3)
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [torch.randn(2, tokens, in_), torch.randn(out, in_) / in_**0.5, torch.randn(out)]
    leaves = [leaf.to("cuda", dtype) for leaf in leaves]
    leaves += [torch.randn(n, r, device="cuda", dtype=wider)]
    leaves += [torch.randn(n, p, device="cuda", dtype=wider)]
    a, b = bank.store(torch.device("cuda"), dtype).operands(r, p, q, n * r)
    return [leaf.requires_grad_() for leaf in leaves], a, b, 1 / (p * q * n) ** 0.5


def gradients(y, leaves):
    torch.manual_seed(1)
    dy = torch.randn_like(y, dtype=torch.float32).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def oracle(leaves, a, b, scaling):
    eye = torch.eye(b.shape[1], device="cuda", dtype=a.dtype)
    dense = b.mm(eye).double() * b.scale
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, weight, bias, lam, gamma = wide
    y = reference.linear(x, weight, bias, a.double(), dense, lam, gamma, scaling=scaling)
    return gradients(y, wide)


def agree(got, want, dtype):
    for one, other in zip(got, want, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < EPS[dtype], (tuple(one.shape), error.item())


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_layer_and_its_gradients_are_the_oracle_s(kind, shape, dtype):
    leaves, a, b, scaling = tensors(kind, *shape, dtype)
    want = oracle(leaves, a, b, scaling)
    for plan in PLANS if shape == SHAPES[0] or shape == SHAPES[1] else PLANS[:1]:
        y = randlora_linear(*leaves, a, b, dtype, scaling=scaling, choice=plan)
        agree(gradients(y, leaves), want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "r", "k"), [(1, 1, 1), (3, 5, 7), (7, 32, 130), (2, 200, 65), (64, 8, 513)]
)
def test_one_pass_gives_what_plain_operations_give(n, r, k, dtype):
    assert passes._triton() is not None
    torch.manual_seed(0)
    lam, gamma = torch.randn(n, r, device="cuda"), torch.randn(n, k + 3, device="cuda")[:, 2:-1]
    a, p = (
        torch.randn(r, k, device="cuda").to(dtype),
        torch.randn(n * r, k, device="cuda").to(dtype),
    )
    with torch.no_grad():
        got = [passes.coefficients(lam, gamma, a, dtype, columns) for columns in (False, True)]
        got_grads = passes.coefficient_grads(p, lam, gamma, a)
        assert [c.stride(0) for c in got] == [k, 1] or k == 1 or n * r == 1
    want = passes.coefficients(lam, gamma, a, dtype)  # while derivatives are recorded: plain
    for one in got:
        assert torch.equal(one, want) or (one - want).abs().max() <= want.abs().max() * 2.0**-8
    for one, other in zip(got_grads, passes.coefficient_grads(p, lam, gamma, a), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def model_of(kind="isometric", **keywords):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 10))
    randlora.inject(
        model, 8, basis=kind, target_modules=["0", "2"], modules_to_save="3", **keywords
    )
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def loss_of(model, x):
    return F.cross_entropy(model(x).float(), torch.zeros(len(x), dtype=torch.long, device=x.device))


@pytest.mark.parametrize("train_a", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_trains_as_on_a_cpu(dtype, train_a):
    losses = {}
    for device in ("cpu", "cuda"):
        model = model_of(train_a=train_a).to(device)
        optimiser = torch.optim.AdamW(randlora.adapter_parameters(model), lr=1e-2)
        torch.manual_seed(1)
        x = torch.randn(32, 64).to(device)
        losses[device] = []
        for _ in range(5):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = loss_of(model, x)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[device].append(loss.item())
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    close = pytest.approx(losses["cpu"], rel=tolerance, abs=tolerance * losses["cpu"][0])
    assert losses["cuda"] == close
    assert losses["cuda"][-1] < losses["cuda"][0]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_no_step_waits_for_the_device(kind):
    model = model_of(kind).cuda()
    x = torch.randn(32, 64, device="cuda")
    targets = torch.zeros(32, dtype=torch.long, device="cuda")
    F.cross_entropy(model(x), targets).backward()  # draws the bases
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with torch.autocast("cuda", dtype, enabled=False):
                F.cross_entropy(model(x), targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["isometric", "dense", "very_sparse"])
def test_a_training_step_can_be_captured_in_a_graph(kind):
    model = model_of(kind).cuda()
    parameters = randlora.adapter_parameters(model)
    optimiser = torch.optim.AdamW(parameters, lr=torch.tensor(1e-2, device="cuda"), capturable=True)
    x = torch.randn(32, 64, device="cuda")
    targets = torch.zeros(32, dtype=torch.long, device="cuda")

    def step():
        optimiser.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimiser.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    saved = [p.detach().clone() for p in parameters], copy.deepcopy(optimiser.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    captured = loss.item(), [p.detach().clone() for p in parameters]
    del loss  # it holds nodes of the stream that was captured
    with torch.no_grad():
        for parameter, value in zip(parameters, saved[0], strict=True):
            parameter.copy_(value)
    optimiser.load_state_dict(saved[1])
    eager = step().item()
    assert captured[0] == pytest.approx(eager, rel=1e-5)
    for one, other in zip(captured[1], parameters, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["isometric", "dense"])
def test_compiled_it_computes_the_same(kind):
    model, x = model_of(kind).cuda(), torch.randn(32, 64, device="cuda")
    want = loss_of(model, x)
    wanted = torch.autograd.grad(want, randlora.adapter_parameters(model))
    got = torch.compile(model, fullgraph=True)
    found = loss_of(got, x)
    grads = torch.autograd.grad(found, randlora.adapter_parameters(model))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_merged_layer_computes_what_the_unmerged_one_does(kind, dtype):
    layer = RandLoRALinear(64, 96, rank=8, bank=BasisBank(kind), dtype=dtype, device="cuda")
    nn.init.normal_(layer.randlora_gamma)
    x = torch.randn(5, 64, device="cuda", dtype=dtype)
    with torch.no_grad():
        before = layer(x)
        randlora.merge(layer)
        error = (layer(x) - before).abs().max() / before.abs().max()
        assert error < EPS[dtype]
        randlora.unmerge(layer)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_one_token_without_gradients_is_that_with_gradients(kind, dtype):
    for shape in ((64, 96), (96, 64)):
        layer = RandLoRALinear(*shape, rank=4, bank=BasisBank(kind), dtype=dtype, device="cuda")
        nn.init.normal_(layer.randlora_gamma)
        x = torch.randn(1, 1, shape[0], device="cuda", dtype=dtype)
        want = layer(x).detach()
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(layer(x), want)
        assert layer._randlora.one_token.usable
        cpu = copy.deepcopy(layer).cpu()
        error = (cpu(x.cpu()) - want.cpu()).abs().max() / want.abs().max()
        assert error < EPS[dtype]
        layer.cpu()
        with torch.no_grad():
            assert torch.equal(layer(x.cpu()), cpu(x.cpu()))


def test_float16_does_not_overflow_with_a_scaled_loss():
    """As GradScaler does: a loss times 2**16."""
    for kind, (out, in_) in itertools.product(
        cases.KINDS, [(1024, 1024), (2048, 512), (512, 2048)]
    ):
        leaves, a, b, scaling = tensors(kind, out, in_, 32, torch.float16, tokens=512)
        y = randlora_linear(*leaves, a, b, torch.float16, scaling=scaling)
        dy = torch.randn_like(y, dtype=torch.float32) * 2**16 / y.numel() ** 0.5
        for plan in PLANS:
            y = randlora_linear(*leaves, a, b, torch.float16, scaling=scaling, choice=plan)
            for grad in torch.autograd.grad(y, leaves[3:], dy.to(torch.float16)):
                assert grad.isfinite().all(), (kind, out, in_, plan)


def test_tf32_does_not_round_coefficients():
    """An outer product as a matrix product would have a relative error of 2**-11."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        lam, gamma = torch.randn(8, 4, device="cuda"), torch.randn(8, 32, device="cuda")
        a = torch.randn(4, 32, device="cuda")
        b = DenseOperator(torch.eye(32, device="cuda"))
        delta = randlora.functional.delta_weight(lam, gamma, a, b)
        exact = (lam.double().unsqueeze(2) * gamma.double().unsqueeze(1) * a.double()).flatten(0, 1)
        # The product with the identity rounds each entry once, to TF32.
        torch.testing.assert_close(delta.double(), exact, rtol=2.0**-10, atol=0)
        with torch.no_grad():
            c = passes.coefficients(lam, gamma, a, torch.float32)
        torch.testing.assert_close(c.double(), exact, rtol=1e-6, atol=0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
