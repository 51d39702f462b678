"""The least time that a training step can take on a GPU: counted on ``meta`` tensors.

Forward and backward of linear layers run on tensors without values, through the code that runs on a
GPU. Every operation that a GPU would do is counted: a kernel, the bytes that it reads and writes,
and the FLOPs of a product. The floor of a kernel is the larger of its bytes and its FLOPs at the
given rates; the floor of a layer is their sum. Real kernels are slower, the more so the smaller.
With --time, on a CUDA device, the layers are also timed, and shown beside their floors.

    python benchmarks/roofline.py [--block NAME | --layers IN-OUT ...] [--tokens N] [--rank R]
                                  [--dtype D] [--gpu NAME | --tflops F --tbps B] [--kernels]
                                  [--methods NAME ...] [--time]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from randlora.bases.isometry import factor_shapes
from randlora.core import gather, kernel, kronecker, matmul, passes, update
from randlora.core.kronecker import KroneckerOperator
from randlora.core.operators import DenseOperator, Operator, SignOperator
from randlora.functional import randlora_linear

# TFLOP/s of products in bfloat16, and TB/s, that are reached. H100: measured, see README.md. The
# others: of their data sheets, in the same proportion to the peak. Last, TFLOP/s in float32 without
# TF32: the peaks of the data sheets.
GPUS = {"h100": (790.0, 3.0, 67.0), "a100": (250.0, 1.8, 19.5), "4090": (150.0, 0.9, 82.6)}
BLOCKS = {
    "llama-3-8b": {
        "q": (4096, 4096),
        "k": (4096, 1024),
        "v": (4096, 1024),
        "o": (4096, 4096),
        "gate": (4096, 14336),
        "up": (4096, 14336),
        "down": (14336, 4096),
    },
    "vit-l": {"qkv": (1024, 3072), "proj": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024)},
}
METHODS = ("full", "lora", "isometric", "dense", "sparse")
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}  # their two matrices
# What a GPU does not run: views, and tensors without values.
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach"),
    *("unsqueeze", "squeeze", "alias", "as_strided", "split", "unbind", "reshape", "flatten"),
    *(
        "empty",
        "empty_like",
        "empty_strided",
        "promote_types",
        "new_empty",
        "new_empty_strided",
        "lift_fresh",
    ),
}


@dataclass(frozen=True)
class Kernel:
    """One operation: its name, bytes read and written, FLOPs of a product, bytes of its factors."""

    name: str
    nbytes: int
    flops: int
    itemsize: int = 2

    def seconds(self, tflops: float, tbps: float, tflops_float32: float) -> float:
        """Its floor at these rates."""
        rate = tflops if self.itemsize < 4 else tflops_float32
        return max(self.flops / (1e12 * rate), self.nbytes / (1e12 * tbps))


def stored(tensor: Tensor) -> int:
    """Bytes of the entries of a tensor that are in memory once: expanded ones do not count."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.itemsize


class Counter(TorchDispatchMode):
    """Records the kernels of the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        plain = name.removesuffix("_")
        if plain not in FREE:
            inputs = {key: value for key, value in kwargs.items() if key != "out"}
            given = [t for t in tree_leaves((args, inputs)) if isinstance(t, Tensor)]
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            read = given if name not in ("copy_", "zero_", "fill_") else given[1:]
            if name.startswith("new_") or name.endswith("_like"):
                read = []
            flops, itemsize = 0, 2
            if plain in PRODUCTS:
                one, other = (args[i] for i in PRODUCTS[plain])
                flops, itemsize = 2 * one.numel() * other.shape[-1], one.itemsize
            nbytes = sum(map(stored, read)) + sum(map(stored, made))
            self.kernels.append(Kernel(name, nbytes, flops, itemsize))
        return result

    def of(self, fused: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose work is one kernel: it reads its arguments and writes its results."""

        def run(*args: Any) -> Any:
            with self.paused():
                results = fused(*args)
            made = results if isinstance(results, tuple) else (results,)
            tensors = [t for t in (*args, *made) if isinstance(t, Tensor)]
            self.kernels.append(Kernel(fused.__name__, sum(map(stored, tensors)), 0))
            return results

        return run

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing in this context."""
        counted = len(self.kernels)
        yield
        del self.kernels[counted:]


# The results of the Triton kernels.


def coefficients(
    lam: Tensor, gamma: Tensor, a: Tensor, dtype: torch.dtype, by_columns: bool
) -> Tensor:
    m, k = lam.numel(), gamma.shape[1]
    return lam.new_empty((k, m) if by_columns else (m, k), dtype=dtype)


def coefficient_grads(
    p_matrix: Tensor, lam: Tensor, gamma: Tensor, a: Tensor
) -> tuple[Tensor, Tensor]:
    rows = 2 ** math.ceil(math.log2(lam.shape[1]))
    parts = -(-gamma.shape[1] // max(16, 4096 // rows))  # as many as the kernel has programs
    return lam.new_empty(parts, *lam.shape), torch.empty_like(gamma)


@contextmanager
def as_on_a_gpu() -> Iterator[Counter]:
    """Count what runs in this context. The code takes the way that it takes on a GPU.

    Under a dispatch mode the package changes nothing in place. Here it does, as without the mode.
    """
    with ExitStack() as stack:
        for module in (gather, kernel, kronecker, matmul, passes, update):
            if hasattr(module, "in_place"):
                stack.enter_context(patch.object(module, "in_place", lambda: True))
        counter = stack.enter_context(Counter())
        kernels = {f.__name__: counter.of(f) for f in (coefficients, coefficient_grads)}
        stack.enter_context(patch.object(passes, "_kernels", lambda *_: SimpleNamespace(**kernels)))
        yield counter


@dataclass(frozen=True)
class Case:
    """A linear layer and what it is trained with."""

    in_features: int
    out_features: int
    tokens: int = 8192
    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    device: str = "meta"

    def make(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """A tensor of numbers of variance 1 / columns, or of signs."""
        dtype = dtype or self.dtype
        if self.device == "meta":
            made = torch.empty(shape, device="meta", dtype=dtype)
        elif dtype == torch.int8:
            made = torch.randint(-1, 2, shape, device=self.device, dtype=dtype)
        else:
            made = torch.randn(shape, device=self.device).mul_(shape[-1] ** -0.5).to(dtype)
        return made.requires_grad_(grad)


def operator(kind: str, case: Case, q: int, m: int) -> Operator:
    """``B`` of a kind, as a GPU stores it."""
    if kind == "isometric":
        left, right = (case.make(*shape) for shape in factor_shapes(q, m))
        if left.numel() == 1:
            return DenseOperator(right, math.sqrt(q))
        return KroneckerOperator(left, right, (q, m))
    if kind == "dense":
        return DenseOperator(case.make(q, m))
    return SignOperator(case.make(q, m, dtype=torch.int8))


def layer(method: str, case: Case) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """The forward of a layer, and its trained tensors."""
    out, in_, r = case.out_features, case.in_features, case.rank
    weight = case.make(out, in_, grad=method == "full")
    if method == "full":
        return lambda x: F.linear(x, weight), [weight]
    if method == "lora":
        a, b = case.make(r, in_, grad=True), case.make(out, r, grad=True)
        return lambda x: F.linear(x, weight) + 2 * F.linear(F.linear(x, a), b), [a, b]
    p, q = min(out, in_), max(out, in_)
    n = -(-p // r)
    lam = case.make(n, r, dtype=torch.float32, grad=True)
    gamma = case.make(n, p, dtype=torch.float32, grad=True)
    a, base = case.make(r, p), operator(method, case, q, n * r)
    return lambda x: randlora_linear(x, weight, None, lam, gamma, a, base), [lam, gamma]


def step(method: str, case: Case) -> tuple[Callable[[], None], list[Tensor]]:
    """Forward and backward of a layer inside a model, and its trained tensors."""
    forward, parameters = layer(method, case)
    x = case.make(1, case.tokens, case.in_features, grad=True)
    dy = case.make(1, case.tokens, case.out_features)

    def run() -> None:
        torch.autograd.grad(forward(x), [x, *parameters], dy)

    return run, parameters


def count(method: str, case: Case) -> tuple[list[Kernel], list[Tensor]]:
    """The kernels of a step, and the trained tensors."""
    run, parameters = step(method, case)
    with as_on_a_gpu() as counter:
        run()
    return counter.kernels, parameters


def milliseconds(methods: Sequence[str], case: Case, rounds: int = 15) -> dict[str, float]:
    """The medians of the times of a step on a CUDA device, the methods in turn."""
    runs = {method: step(method, replace(case, device="cuda"))[0] for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(rounds + 3):
        for method, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(4):
                run()
            end.record()
            end.synchronize()
            if number >= 3:
                times[method].append(start.elapsed_time(end) / 4)
    return {method: statistics.median(found) for method, found in times.items()}


# AdamW of torch reads the parameter, its gradient and two moments, and writes all but the gradient.
def adamw(parameters: list[Tensor]) -> Kernel:
    """The traffic of one fused step of AdamW."""
    return Kernel("adamw", 7 * sum(map(stored, parameters)), 0)


def print_times(timed: dict[str, float]) -> None:
    first = next(iter(timed.values()))
    cells = [f"{ms:13.3f} ms {ms / first:5.2f}" for ms in timed.values()]
    print(f"{'  timed':<21}" + " ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--block", choices=BLOCKS, default="llama-3-8b")
    parser.add_argument("--layers", nargs="+", metavar="IN-OUT", help="instead of a block")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--tflops", type=float, help="instead of the GPU's")
    parser.add_argument("--tbps", type=float, help="TB/s instead of the GPU's")
    parser.add_argument("--tflops-float32", type=float, help="of products in float32")
    parser.add_argument("--time", action="store_true", help="on a CUDA device, beside the floors")
    parser.add_argument("--kernels", action="store_true", help="list every kernel")
    options = parser.parse_args()
    given = options.tflops, options.tbps, options.tflops_float32
    rates = [one or preset for one, preset in zip(given, GPUS[options.gpu], strict=True)]
    layers = BLOCKS[options.block]
    if options.layers:
        layers = {text: tuple(map(int, text.split("-"))) for text in options.layers}
    dtype = getattr(torch, options.dtype)
    measured = dict.fromkeys(options.methods, 0.0)
    totals = {method: [0.0, 0.0, 0.0] for method in options.methods}
    print(f"{'layer':<8}{'in-out':<13}" + "".join(f"{m:>22}" for m in options.methods))
    for name, (in_, out) in layers.items():
        case = Case(in_, out, options.tokens, options.rank, dtype)
        cells, full = [], 0.0
        timed = milliseconds(options.methods, case) if options.time else {}
        for method in options.methods:
            kernels, parameters = count(method, case)
            floor = sum(kernel.seconds(*rates) for kernel in kernels)
            step = adamw(parameters)
            full = floor if method == "full" else full
            sums = floor, floor + step.seconds(*rates), 2 * step.nbytes / 7
            totals[method] = [a + b for a, b in zip(totals[method], sums, strict=True)]
            ratio = f"{floor / full:.2f}" if full else ""
            cells.append(f"{len(kernels):>6} {1e3 * floor:7.3f} ms {ratio:>4}")
            if options.kernels:
                for kernel in kernels:
                    print(
                        f"  {method:<10}{kernel.name:<14}{kernel.nbytes / 2**20:9.1f} MiB"
                        f"{kernel.flops / 1e9:10.1f} GFLOP{1e6 * kernel.seconds(*rates):9.1f} us"
                    )
        print(f"{name:<8}{f'{in_}-{out}':<13}" + " ".join(cells))
        if timed:
            print_times(timed)
            for method, ms in timed.items():
                measured[method] += ms
    first = totals[options.methods[0]]
    for row, text in enumerate(("all layers", "with AdamW")):
        cells = [f"{1e3 * t[row]:13.3f} ms {t[row] / first[row]:5.2f}" for t in totals.values()]
        print(f"{text:<21}" + " ".join(cells))
    if options.time:
        print_times(measured)
    print(
        f"{'moments of AdamW':<21}" + "".join(f"{t[2] / 2**20:18.1f} MiB" for t in totals.values())
    )


if __name__ == "__main__":
    main()
