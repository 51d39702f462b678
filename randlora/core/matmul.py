"""Matrix products. Each uses the fastest method that torch has for it on a CPU.

On a CPU, torch computes float32 products with MKL and products in lower precision with oneDNN. On
processors not made by Intel, MKL was measured to run no faster than AVX2 allows, while oneDNN uses
AVX-512 if the processor has it. ``a @ b`` does not reach oneDNN's float32 product, but the operator
that torch's own compiler emits for linear layers does. It is the same IEEE arithmetic, summed in
another order. It was measured to be twice as fast as MKL on an AMD processor and three times slower
on an Intel processor (``benchmarks/README.md``).

On processors without units for bfloat16 and float16, products in these dtypes were measured to be
up to 3 times (bfloat16) and 300 times (float16) slower than in float32. On such processors they are
computed in float32 and rounded once.

Compiled code computes float32 products as described, and all others as torch does.

The functions that add (their names end in ``_``) return the sum. They overwrite the matrix that is
added to if :func:`in_place` allows it, so callers use only the returned matrix.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _processor() -> str:
    """The system's description of the processor: its maker and, on Linux, its features."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()


def _made_by_amd() -> bool:
    return "AuthenticAMD" in _processor()


def _without_units() -> frozenset[torch.dtype]:
    """The low-precision dtypes that an x86 processor has no units for. Empty if not known."""
    has = set(_processor().split())
    if "fpu" not in has:  # not x86, or not known
        return frozenset()
    units = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return frozenset(t for t, name in units.items() if not {f"avx512_{name}", f"amx_{name}"} & has)


# Whether float32 products may use oneDNN. To change it, assign to it in this module. Which kernel
# computes a product depends on this, the processor, sizes, strides, and whether derivatives are
# recorded. The bits of the result depend on the number of threads too, as those of any product do.
USE_ONEDNN = _made_by_amd()

# The dtypes whose products are computed in float32 on CPUs. To change it, assign to it here.
UPCAST_DTYPES = _without_units()

# Entries of the left matrix that are cast to float32 at a time. Of the right: 8 times as many.
_BLOCK = 2**21

# The least size of each dimension, and the least multiply-adds, for oneDNN. Both were measured.
_SMALLEST, _LEAST = 64, 2**23

_SIGNATURE = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
    "str? algorithm) -> Tensor Y"
)


def _available() -> bool:
    """Whether torch has the operator with this signature, and the processor has AVX-512."""
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not mkldnn or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return str(torch.ops.mkldnn._linear_pointwise.default._schema) == _SIGNATURE
    except AttributeError:
        return False


_AVAILABLE = _available()


def uses_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether large products in this dtype on this device use oneDNN instead of ``a @ b``."""
    return USE_ONEDNN and dtype == torch.float32 and device.type == "cpu" and _AVAILABLE


def in_place() -> bool:
    """Whether code may overwrite intermediate results.

    It may not while a compiler or a trace records the operations; under a dispatch mode, which can
    keep the result of each operation, as selective checkpointing does; and under a transform of
    ``torch.func``, in which a result can have fewer dimensions than what is added to it.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def is_static(size: int) -> bool:
    """Whether ``size`` is a fixed number, not a symbolic size of a traced or compiled graph."""
    if not torch.compiler.is_compiling():
        return torch._C._get_tracing_state() is None
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, faster than ``to`` if it has it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def transforming() -> bool:
    """Whether a transform that autograd functions do not support is active.

    These are all of ``torch.func`` but ``grad`` and ``vjp``, and forward-mode differentiation. In
    compiled code they are all of ``torch.func``: Dynamo does not tell a function there which
    gradients are needed.
    """
    if torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Grad for level in stack)


def apply_to_parts(
    total: Tensor,
    parts: Sequence[slice],
    dim: int,
    change: Callable[[Tensor, slice], Tensor],
    *,
    keep: bool = False,
) -> Tensor:
    """Apply ``change`` to each part of ``total`` along ``dim``, and return the whole.

    The parts together cover ``total``. ``change`` gets a part and its slice. With ``keep`` it
    leaves the part as it is.
    """
    if len(parts) == 1:
        return change(total, parts[0])
    results = [change(total[part] if dim == 0 else total[:, part], part) for part in parts]
    return total if in_place() and not keep else torch.cat(results, dim)


# shape: a (i, j), b (j, k) -> (i, k)
def mm(a: Tensor, b: Tensor, alpha: float | None = None) -> Tensor:
    """``alpha a b``, differentiable: while derivatives are recorded, torch's own product is used.

    The result is stored by rows, or by columns if oneDNN gets ``b`` as part of a larger matrix.
    """
    if _upcasts(a, b):
        product = a.new_empty(len(a), b.shape[1])
        for rows, columns, one, other in _parts(a, b, alpha):
            product[rows, columns] = one @ other
        return product
    if alpha is not None:
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=alpha)
    if _compiles(a, b):
        compiled: Tensor = compiled_mm(a, b)
        return compiled
    if _allowed(a, b):
        if _suits(a, b):
            return _onednn(a, b)
        if _suits(b.T, a.T):
            return _onednn(b.T, a.T).T
    return a @ b


# shape: a (i, j), b (j, k) -> (i, k)
def mm_wider(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` for sums over tokens. float16 gives float32: sums can exceed the float16 range."""
    if a.dtype != torch.float16:
        return mm(a, b)
    if _upcasts(a, b):
        product = a.new_empty(len(a), b.shape[1], dtype=torch.float32)
        for rows, columns, one, other in _parts(a, b):
            product[rows, columns] = one @ other
        return product
    if a.is_cuda and is_plain(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# shape: total (i, k), a (i, j), b (j, k) -> (i, k)
def addmm_(
    total: Tensor, a: Tensor, b: Tensor, alpha: float | None = None, *, keep: bool = False
) -> Tensor:
    """``total + alpha a b``. In low precision it is rounded once, from the accumulator.

    ``keep`` leaves ``total`` as it is. oneDNN has no product that adds in place, so with it the
    product takes memory of its own.
    """
    if alpha is None and _compiles(a, b):
        return total + mm(a, b)
    if keep or not in_place():
        return torch.addmm(total, a, b, alpha=1 if alpha is None else alpha)
    if _upcasts(a, b):
        for rows, columns, one, other in _parts(a, b, alpha):
            part = total[rows, columns]
            part.copy_(part.float().addmm_(one, other))
    elif alpha is None and _allowed(a, b) and (_suits(a, b) or _suits(b.T, a.T)):
        total += mm(a, b)
    else:
        total.addmm_(a, b, alpha=1 if alpha is None else alpha)
    return total


# shape: total and product (i, k) -> (i, k)
def added_(total: Tensor, product: Tensor, *, keep: bool = False) -> Tensor:
    """``total + product``, which may be wider. ``keep`` leaves ``total`` as it is."""
    if in_place() and not keep:
        return total.add_(product)
    return cast(total + product, total.dtype)


# shape: a (i, j), blocks (k, j, c) -> (k, i, c)
def bmm(a: Tensor, blocks: Tensor) -> Tensor:
    """``a`` times each of ``blocks``."""
    if not _upcasts(a, blocks):
        return torch.bmm(a.expand(len(blocks), *a.shape), blocks)
    product = blocks.new_empty(len(blocks), len(a), blocks.shape[2])
    for part in _batches(a, blocks):
        product[part] = bmm(a.float(), blocks[part].float())
    return product


# shape: total (k, i, c), a (i, j), blocks (k, j, c) -> (k, i, c)
def baddbmm_(total: Tensor, a: Tensor, blocks: Tensor, *, keep: bool = False) -> Tensor:
    """``total`` plus ``a`` times each of ``blocks``, rounded once. ``keep`` leaves ``total``."""
    if keep or not _upcasts(a, blocks):
        each, changes = a.expand(len(blocks), *a.shape), in_place() and not keep
        return total.baddbmm_(each, blocks) if changes else total.baddbmm(each, blocks)
    for part in _batches(a, blocks):
        total[part] = baddbmm_(total[part].float(), a.float(), blocks[part].float())
    return total


def is_plain(*matrices: Tensor) -> bool:
    """Whether all are plain tensors, and neither derivatives nor operations are recorded."""
    return (
        in_place()
        and not torch.is_grad_enabled()
        and all(type(matrix) in (Tensor, nn.Parameter) for matrix in matrices)
        and forward_ad._current_level < 0
    )


def _upcasts(a: Tensor, b: Tensor) -> bool:
    """Whether the product is computed in float32, because the CPU has no units for its dtype."""
    low = a.dtype in UPCAST_DTYPES and a.dtype == b.dtype and a.device.type == "cpu"
    return low and is_plain(a, b)


def _parts(
    a: Tensor, b: Tensor, alpha: float | None = None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield parts of the product that are small enough to take little memory in float32.

    Each is ``(rows, columns, a[rows], alpha b[:, columns])``, with the matrices in float32.
    """
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
    """Slices of ``blocks``. Each slice and its products take little memory in float32."""
    step = max(1, 4 * _BLOCK // max(1, (len(a) + blocks.shape[1]) * blocks.shape[2]))
    return (slice(low, low + step) for low in range(0, len(blocks), step))


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return product


def _allowed(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN may compute this: it supports neither derivatives nor tensor subclasses."""
    (rows, inner), columns = a.shape, b.shape[1]
    return (
        uses_onednn(a.dtype, a.device)
        and is_plain(a, b)
        and min(rows, inner, columns) >= _SMALLEST
        and rows * inner * columns >= _LEAST
        and a.dtype == b.dtype
        and bool(torch.backends.mkldnn.enabled)
    )


def _compiles(a: Tensor, b: Tensor) -> bool:
    """Whether compiled code computes this by :func:`compiled_mm`, whose derivative is unknown.

    A size that is a symbol counts as large. An export has to run on any processor; Dynamo of torch
    2.9 takes all compiled code for one.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and uses_onednn(a.dtype, a.device)
        and a.dtype == b.dtype
        and not torch.is_grad_enabled()
        and not transforming()
        and all(size >= _SMALLEST for size in (*a.shape, b.shape[1]) if is_static(size))
    )


@torch.library.custom_op("randlora::mm", mutates_args=())
def compiled_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, stored by rows, as one operation of compiled code."""
    with torch.no_grad():
        return mm(a, b).contiguous()


@compiled_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is fast with these strides. With others it is a hundred times slower."""
    return 1 in a.stride() and (b.is_contiguous() or b.T.is_contiguous())
