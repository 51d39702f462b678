"""``Store``: the bases of one bank on one device, for products in one dtype."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from randlora.bases.streams import BASE_A, BASE_B
from randlora.core.gather import GatherOperator, gather_costs
from randlora.core.kronecker import KroneckerOperator
from randlora.core.matmul import in_place
from randlora.core.operators import DenseOperator, Operator, SignOperator

if TYPE_CHECKING:
    from randlora.bases.bank import BasisBank


def refuse_to_draw() -> None:
    """Raise an error where bases cannot be drawn: in an export, or in the capture of a CUDA graph.

    There new tensors have no values. The store would keep them, and every later call would use
    them.
    """
    if type(torch.empty(0)) is not Tensor:
        reason = "a graph is traced with fake tensors (without values)"
    elif torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        reason = "a CUDA graph is captured"
    else:
        return
    raise RuntimeError(
        f"bases cannot be drawn while {reason}: call the layer once before, under autocast if this "
        "is under autocast"
    )


@contextmanager
def _aside() -> Iterator[None]:
    """A context for drawing bases, outside of ``torch.jit.trace`` and inference mode.

    Bases outlive the call that draws them, and drawing them is not part of its operations.
    """
    tracing = torch._C._get_tracing_state()  # of torch.jit.trace
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


class Store:
    """The bases of one bank on one device, for products in one dtype.

    Most bases are stored once for all layers, and a layer uses a leading block. The continuous
    kinds are stored in the dtype of the products and the sign kinds in int8. There are three
    exceptions. If the bank has no prefixes, ``B`` is stored once for each number of columns. On a
    CPU, a ``B`` so sparse that gathering is faster is stored by its non-zeros, once for each shape.
    An isometric ``B`` is stored by its factors, once for each shape. If it has only one factor, it
    is stored as a small dense matrix.
    """

    def __init__(self, bank: BasisBank, device: torch.device, dtype: torch.dtype) -> None:
        self.bank = bank
        self.device = device
        self.dtype = dtype
        self.tensors: dict[tuple[int, int], Tensor] = {}
        # The sizes of these tensors: torch.jit.trace warns if code reads them from a tensor.
        self.sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self.shaped: dict[tuple[int, int], _Shaped] = {}
        # What `operands` returned. These are views of the tensors, which they keep in memory.
        self._found: dict[tuple[int, int, int, int], tuple[Tensor, Operator]] = {}
        self._scaled: WeakValueDictionary[tuple[int, int, float], Tensor] = WeakValueDictionary()
        self._lock = threading.RLock()  # for drawing

    @property
    def nbytes(self) -> int:
        """Bytes of all bases in this store."""
        held = [*self.tensors.values(), *self._scaled.values()]
        tensors = sum(t.untyped_storage().nbytes() for t in held)
        return tensors + sum(operator.nbytes for operator in self.shaped.values())

    def operands(self, r: int, p: int, q: int, m: int) -> tuple[Tensor, Operator]:
        """Return ``A[:r, :p]`` and the operator for ``B[:q, :m]``, in the dtype of the store.

        Bases that are missing or too small are drawn first.
        """
        found = self.found(r, p, q, m)
        if found is not None:
            return found
        with self._lock:
            if not in_place():  # what is found now may not outlive this call
                return self._find(r, p, q, m)
            with _aside():
                found = self._found[r, p, q, m] = self._find(r, p, q, m)
            return found

    def found(self, *sizes: int) -> tuple[Tensor, Operator] | None:
        """What :meth:`operands` returned last, or None if the bases have been drawn anew since."""
        return self._found.get(sizes)  # type: ignore[arg-type]

    def scaled(self, a: Tensor, factor: float) -> Tensor:
        """``factor · A[:r, :p]`` in float32 or wider, shared by all who hold the same."""
        key = a.shape[0], a.shape[1], factor
        scaled = self._scaled.get(key)
        if scaled is None:
            with _aside():
                scaled = factor * a.to(torch.promote_types(a.dtype, torch.float32))
            self._scaled[key] = scaled
        return scaled

    def _find(self, r: int, p: int, q: int, m: int) -> tuple[Tensor, Operator]:
        bank = self.bank
        a = self._hold(BASE_A, r, p)
        # Gathering was measured on CPUs only. It is used if it is clearly faster: if its two costs
        # together are below half of those of dense products, 2 x 1000.
        costs = gather_costs(bank.density, m, self.dtype)
        gathers = self.device.type == "cpu" and sum(costs) < 1000
        if bank.factored or gathers:
            if (q, m) not in self.shaped:
                refuse_to_draw()
                with _aside():
                    self.shaped[q, m] = self._shaped(q, m)
            return a, self.shaped[q, m]
        b = self._hold(BASE_B, q, m)
        unit = self._unit(q, m)
        operator = SignOperator if bank.signs else DenseOperator
        return a, operator(b, bank.scale / (unit or 1), unit)

    def _unit(self, q: int, m: int) -> float | None:
        """The power of two that products multiply the stored entries of ``B`` by, or None for 1.

        In float16 it brings the lengths of the columns and rows of ``B`` near one, so that products
        with tokens overflow no sooner than those of the plain layer. Other dtypes have enough
        range.
        """
        if self.dtype != torch.float16:
            return None
        return 2.0 ** round(math.log2(self.bank.scale) - math.log2(q * m) / 4)

    def _shaped(self, q: int, m: int) -> _Shaped:
        if self.bank.factored:
            left, right = (t.to(self.device, self.dtype) for t in self.bank.factors(q, m))
            if left.numel() == 1:  # the left factor is ±1, so there is one factor
                return DenseOperator((left * right)[:q], math.sqrt(len(right)))
            return KroneckerOperator(left, right, (q, m))
        signs = self.bank.draw(BASE_B, (q, m), self.device, self.dtype)
        unit = self._unit(q, m)
        return GatherOperator(signs, self.bank.scale / (unit or 1), self.dtype, unit)

    def _hold(self, base: int, rows: int, columns: int) -> Tensor:
        by_width = base == BASE_B and not self.bank.prefixes
        key = base, columns if by_width else 0
        has = self.sizes.get(key, (0, 0))
        if has[0] < rows or has[1] < columns:
            refuse_to_draw()
            self._found.clear()
            self.tensors.pop(key, None)  # free the smaller one first, for a lower peak
            size = self.bank.sizes[base] = larger_size(self.bank.sizes[base], (rows, columns))
            if by_width:
                size = size[0], columns
            with _aside():
                self.tensors[key] = self.bank.draw(base, size, self.device, self.dtype)
            self.sizes[key] = size
        return self.tensors[key][:rows, :columns]


_Shaped: TypeAlias = DenseOperator | GatherOperator | KroneckerOperator


def larger_size(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The smallest size that covers both."""
    return max(one[0], other[0]), max(one[1], other[1])
