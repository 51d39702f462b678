"""Matrix products, by the faster of the two libraries that a CPU build of torch brings.

On a CPU torch takes float32 products to MKL, which on processors not made by Intel ran no faster
than AVX2 allows, and those in low precision to oneDNN, which uses AVX-512 where it is. oneDNN's
float32 product is not reached by ``a @ b``, but by the operator that torch's own compiler emits for
linear layers. It is the same IEEE arithmetic, summed in another order, and was measured to be
twice as fast on a processor of AMD, and three times slower than MKL on one of Intel
(``benchmarks/README.md``).
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["ONEDNN", "addmm_", "mm", "onednn"]


def _made_by_amd() -> bool:
    """Whether the processor is one of AMD's, as the system says."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "AuthenticAMD" in platform.processor()


# Whether float32 products may go to oneDNN; to be set as it is here. Which way a product takes
# depends on this, the processor, sizes, strides, and whether derivatives are recorded; its bits, as
# those of any product, on the number of threads as well.
ONEDNN = _made_by_amd()

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


# shape: a (i, j), b (j, k) -> (i, k)
def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, differentiable like it: where derivatives are recorded it is ``a @ b``.

    By rows; by columns where ``b`` is part of a larger matrix.
    """
    if _allowed(a, b):
        if _suits(a, b):
            return _onednn(a, b)
        if _suits(b.T, a.T):
            return _onednn(b.T, a.T).T
    return a @ b


# shape: total (i, k), a (i, j), b (j, k)
def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``; in low precision rounded once, from the accumulator.

    oneDNN has no product that adds to a matrix in place: the product is there beside it for a time.
    """
    if _allowed(a, b) and (_suits(a, b) or _suits(b.T, a.T)):
        total += mm(a, b)
    else:
        total.addmm_(a, b)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return product


def _allowed(a: Tensor, b: Tensor) -> bool:
    """Whether the product may go to oneDNN, which knows no derivatives and no subclasses."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    (rows, inner), columns = a.shape, b.shape[1]
    return (
        min(rows, inner, columns) >= _SMALLEST
        and rows * inner * columns >= _LEAST
        and onednn(a.dtype, a.device)
        and a.dtype == b.dtype
        and type(a) in (Tensor, nn.Parameter)
        and type(b) in (Tensor, nn.Parameter)
        and forward_ad._current_level < 0
        and bool(torch.backends.mkldnn.enabled)
    )


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether the strides are those it is fast for: others are taken, a hundred times slower."""
    return 1 in a.stride() and (b.is_contiguous() or b.T.is_contiguous())
