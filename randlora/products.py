"""Matrix products, by the faster of the two libraries that a CPU build of torch brings.

On a CPU torch takes float32 products to MKL, which on processors not made by Intel ran no faster
than AVX2 allows, and those in low precision to oneDNN, which uses AVX-512 where it is. oneDNN's
float32 product is not reached by ``a @ b``, but by the operator that torch's own compiler emits for
linear layers. It is the same IEEE arithmetic, summed in another order, and was measured to be
twice as fast (``benchmarks/README.md``).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ONEDNN", "addmm_", "mm", "onednn"]

# Whether float32 products may go to oneDNN; to be set as it is here. What a product is computed by
# depends on this, on the processor and on the shapes and strides alone: results are reproducible.
ONEDNN = True

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


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, differentiable like it: with gradients recorded, it is ``a @ b``."""
    if _suits(a, b):
        return _onednn(a, b)
    return _onednn(b.T, a.T).T if _suits(b.T, a.T) else a @ b


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``; in low precision rounded once, from the accumulator."""
    if _suits(a, b) or _suits(b.T, a.T):
        total += mm(a, b)
    else:
        total.addmm_(a, b)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return product


def _suits(a: Tensor, b: Tensor) -> bool:
    (rows, inner), columns = a.shape, b.shape[1]
    return (
        min(rows, inner, columns) >= _SMALLEST
        and rows * inner * columns >= _LEAST
        and onednn(a.dtype, a.device)
        and a.dtype == b.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(a) is type(b) is Tensor
        # Other strides are taken, but a hundred times slower.
        and 1 in a.stride()
        and (b.is_contiguous() or b.T.is_contiguous())
    )
