"""Matrix products, by the fastest way that a CPU build of torch has for them.

On a CPU torch takes float32 products to MKL, which on processors not made by Intel ran no faster
than AVX2 allows, and those in low precision to oneDNN, which uses AVX-512 where it is. oneDNN's
float32 product is not reached by ``a @ b``, but by the operator that torch's own compiler emits for
linear layers. It is the same IEEE arithmetic, summed in another order, and was measured to be
twice as fast on a processor of AMD, and three times slower than MKL on one of Intel
(``benchmarks/README.md``).

A processor without units for bfloat16 or float16 was measured to multiply in them three times, or
three hundred, slower than in float32. There such products are taken in float32, and rounded once.

What adds writes into the matrix that is added to, where nobody watches (:func:`in_place`), and
returns the sum: the matrix that was given is used up.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = [
    "ONEDNN",
    "WIDENED",
    "addmm_",
    "baddbmm_",
    "bmm",
    "changed",
    "in_place",
    "mm",
    "mm_wider",
    "onednn",
]


def _processor() -> str:
    """What the system says of the processor: its maker, and on Linux its features."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()


def _made_by_amd() -> bool:
    """Whether the processor is one of AMD's."""
    return "AuthenticAMD" in _processor()


def _without_units() -> frozenset[torch.dtype]:
    """The low precisions that an x86 processor has no units for."""
    has = set(_processor().split())
    if "fpu" not in has:  # another kind of processor, or nothing is known of it
        return frozenset()
    units = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16"},
        torch.float16: {"avx512_fp16", "amx_fp16"},
    }
    return frozenset(dtype for dtype, names in units.items() if not names & has)


# Whether float32 products may go to oneDNN; to be set as it is here. Which way a product takes
# depends on this, the processor, sizes, strides, and whether derivatives are recorded; its bits, as
# those of any product, on the number of threads as well.
ONEDNN = _made_by_amd()

# The dtypes whose products are taken in float32 on CPUs; to be set as it is here.
WIDENED = _without_units()

_BLOCK = 2**21  # numbers of a matrix that are in float32 at a time; of the right one eight times
_SMALLEST = 64  # where it was measured not to lose: every dimension at least,
_LEAST = 2**23  # and multiply-adds


_SIGNATURE = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor Y"
)


def _available() -> bool:
    """Whether this torch has the operator as it is used here, and this machine a use for it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return str(torch.ops.mkldnn._linear_pointwise.default._schema) == _SIGNATURE
    except AttributeError:
        return False


_AVAILABLE = _available()


def onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether large products of this dtype, there, go to oneDNN where ``a @ b`` would not."""
    return ONEDNN and dtype == torch.float32 and device.type == "cpu" and _AVAILABLE


def in_place() -> bool:
    """Whether results may be written over: not where someone keeps the result of each operation.

    A mode does, such as the one of selective checkpointing, and whoever records a graph.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def changed(
    total: Tensor, parts: Sequence[slice], dim: int, change: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """``total`` with each of its parts along ``dim`` changed; the parts are all of it."""
    if len(parts) == 1:
        return change(total, parts[0])
    results = [change(total[part] if dim == 0 else total[:, part], part) for part in parts]
    return total if in_place() else torch.cat(results, dim)


# shape: a (i, j), b (j, k) -> (i, k)
def mm(a: Tensor, b: Tensor, alpha: float | None = None) -> Tensor:
    """``alpha a b``, differentiable like it: where derivatives are recorded it is torch's own.

    By rows; by columns where ``b`` is part of a larger matrix.
    """
    if _widened(a, b):
        product = a.new_empty(len(a), b.shape[1])
        for rows, columns, one, other in _parts(a, b, alpha):
            product[rows, columns] = one @ other
        return product
    if alpha is not None:
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=alpha)
    if _allowed(a, b):
        if _suits(a, b):
            return _onednn(a, b)
        if _suits(b.T, a.T):
            return _onednn(b.T, a.T).T
    return a @ b


# shape: a (i, j), b (j, k) -> (i, k)
def mm_wider(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` where it sums over tokens: of float16, whose range the sums outgrow, in float32."""
    if a.dtype != torch.float16:
        return mm(a, b)
    if _widened(a, b):
        product = a.new_empty(len(a), b.shape[1], dtype=torch.float32)
        for rows, columns, one, other in _parts(a, b):
            product[rows, columns] = one @ other
        return product
    if a.is_cuda and _plain(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# shape: total (i, k), a (i, j), b (j, k) -> (i, k)
def addmm_(total: Tensor, a: Tensor, b: Tensor, alpha: float | None = None) -> Tensor:
    """``total + alpha a b``; in low precision rounded once, from the accumulator.

    oneDNN has no product that adds to a matrix in place: the product is there beside it for a time.
    """
    if not in_place():
        return torch.addmm(total, a, b, alpha=1 if alpha is None else alpha)
    if _widened(a, b):
        for rows, columns, one, other in _parts(a, b, alpha):
            part = total[rows, columns]
            part.copy_(part.float().addmm_(one, other))
    elif alpha is None and _allowed(a, b) and (_suits(a, b) or _suits(b.T, a.T)):
        total += mm(a, b)
    else:
        total.addmm_(a, b, alpha=1 if alpha is None else alpha)
    return total


# shape: a (i, j), blocks (k, j, c) -> (k, i, c)
def bmm(a: Tensor, blocks: Tensor) -> Tensor:
    """``a`` times each of the blocks."""
    if not _widened(a, blocks):
        return torch.bmm(a.expand(len(blocks), *a.shape), blocks)
    product = blocks.new_empty(len(blocks), len(a), blocks.shape[2])
    for part in _batches(a, blocks):
        product[part] = bmm(a.float(), blocks[part].float())
    return product


# shape: total (k, i, c), a (i, j), blocks (k, j, c) -> (k, i, c)
def baddbmm_(total: Tensor, a: Tensor, blocks: Tensor) -> Tensor:
    """``total`` and the products of :func:`bmm`, rounded once."""
    if not _widened(a, blocks):
        each = a.expand(len(blocks), *a.shape)
        return total.baddbmm_(each, blocks) if in_place() else total.baddbmm(each, blocks)
    for part in _batches(a, blocks):
        wide = total[part].float()
        total[part] = baddbmm_(wide, a.float(), blocks[part].float())
    return total


def _plain(*matrices: Tensor) -> bool:
    """Whether these are but tensors, and nothing is recorded of what is done with them."""
    return (
        in_place()
        and not torch.is_grad_enabled()
        and all(type(matrix) in (Tensor, nn.Parameter) for matrix in matrices)
        and forward_ad._current_level < 0
    )


def _widened(a: Tensor, b: Tensor) -> bool:
    """Whether the product is one to be taken in float32."""
    low = a.dtype == b.dtype and a.dtype in WIDENED and a.device.type == "cpu"
    return low and _plain(a, b)


def _parts(
    a: Tensor, b: Tensor, alpha: float | None = None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows of ``a`` and columns of ``alpha b`` in float32, so many that they are little memory."""
    inner = max(1, a.shape[1])
    height, width = max(256, _BLOCK // inner), max(256, 8 * _BLOCK // inner)
    for left in range(0, b.shape[1], width):
        columns = slice(left, left + width)
        other = b[:, columns].float()
        other = other if alpha is None else other.mul_(alpha)
        for top in range(0, len(a), height):
            rows = slice(top, top + height)
            yield rows, columns, a[rows].float(), other


def _batches(a: Tensor, blocks: Tensor) -> Iterator[slice]:
    """As many of the blocks as are, with their products, little memory in float32."""
    each = (len(a) + blocks.shape[1]) * blocks.shape[2]
    step = max(1, 4 * _BLOCK // max(1, each))
    return (slice(low, low + step) for low in range(0, len(blocks), step))


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return product


def _allowed(a: Tensor, b: Tensor) -> bool:
    """Whether the product may go to oneDNN, which knows no derivatives and no subclasses."""
    (rows, inner), columns = a.shape, b.shape[1]
    return (
        onednn(a.dtype, a.device)
        and _plain(a, b)
        and min(rows, inner, columns) >= _SMALLEST
        and rows * inner * columns >= _LEAST
        and a.dtype == b.dtype
        and bool(torch.backends.mkldnn.enabled)
    )


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether the strides are those it is fast for: others are taken, a hundred times slower."""
    return 1 in a.stride() and (b.is_contiguous() or b.T.is_contiguous())
