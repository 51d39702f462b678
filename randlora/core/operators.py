"""``Operator``: how the kernel applies ``B``, and the operators that store every entry of ``B``.

An operator is the *unit* base, ``B / scale``. So signs stay exact in every dtype, and the kernel
multiplies by ``scale`` where that costs nothing. In float16, ``scale`` is chosen so large that the
columns and rows of the unit base have lengths near one, so a product stays about the size of its
input. A new kind of basis that is cheaper to apply is a new class with this interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from randlora.core import machine
from randlora.core.matmul import addmm_, apply_to_parts, mm


class Operator(Protocol):
    """The unit base ``B / scale``, shape ``(q, m)``, given by five products. Called ``B`` below.

    ``mm``, ``tmm`` and ``addmm_`` take matrices with columns of the weight. ``tokens_mm`` and
    ``tokens_addmm_`` take tokens. If ``by_columns``, ``tokens_mm`` returns ``(k, m)`` stored by
    columns, and ``tokens_addmm_`` is fastest if ``h`` is, too. Results are in the dtype of the
    argument, sums in that of ``total``. If ``takes_wider``, ``x`` and ``h`` may be wider than the
    bases and ``total``, which is faster for few tokens. ``addmm_`` and ``tokens_addmm_`` overwrite
    ``total`` where :func:`randlora.core.matmul.in_place` allows it, unless ``keep``. In low
    precision, dense products are rounded once.

    Costs are those of :class:`randlora.core.planning.Work`. Without factors ``half`` is 0, and the
    methods of halves do the whole.
    """

    scale: float
    by_columns: bool
    takes_wider: bool
    half: int
    half_token_cost: int
    half_weight_cost: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(q, m)``."""
        ...

    @property
    def weight_cost(self) -> int:
        """The cost of a product with a matrix like the weight, in thousandths of a dense one."""
        ...

    @property
    def token_cost(self) -> int:
        """The cost of a product with tokens, in thousandths of a dense one."""
        ...

    def mm(self, c: Tensor) -> Tensor:
        """``B c``: ``(m, k)`` to ``(q, k)``."""
        ...

    def tmm(self, g: Tensor) -> Tensor:
        """``Bᵀ g``: ``(q, k)`` to ``(m, k)``."""
        ...

    def addmm_(self, total: Tensor, c: Tensor, *, keep: bool = False) -> Tensor:
        """``total + B c``: ``(q, k)`` and ``(m, k)`` to ``(q, k)``."""
        ...

    def tokens_mm(self, x: Tensor) -> Tensor:
        """``x B``: ``(k, q)`` to ``(k, m)``."""
        ...

    def tokens_addmm_(self, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:
        """``total + h Bᵀ``: ``(k, q)`` and ``(k, m)`` to ``(k, q)``."""
        ...

    def tokens_half(self, x: Tensor) -> Tensor:
        """One half of ``x B``: ``(k, q)`` to ``(k, half)``."""
        ...

    def half_addmm_(self, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:
        """The adjoint of ``tokens_half``, added: ``(k, q)`` and ``(k, half)`` to ``(k, q)``."""
        ...

    def half_tmm(self, g: Tensor) -> Tensor:
        """``Bᵀ xᵀ y`` from ``tokens_half(x)ᵀ y``: ``(half, k)`` to ``(m, k)``."""
        ...

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        """The rows of ``B`` at ``places``, shape ``(k,)``, as an operator of shape ``(k, m)``."""
        ...


def _number(key: str) -> Any:
    """An attribute that is a float or None, held as text under ``key``.

    Dynamo can make a symbol of a float, which fails if it meets the float in an autograd function.
    Text is a constant.
    """

    def read(self: Any) -> float | None:
        text = getattr(self, key)
        return None if text is None else float.fromhex(text)

    def write(self: Any, value: float | None) -> None:
        setattr(self, key, None if value is None else float(value).hex())

    return property(read, write)


class Stored:
    """An operator that holds tensors, and has no halves."""

    half = half_token_cost = half_weight_cost = 0
    scale = _number("_scale")
    unit = _number("_unit")  # products multiply the entries by this power of two; None means 1

    def tokens_half(self: Operator, x: Tensor) -> Tensor:
        return self.tokens_mm(x)

    def half_addmm_(self: Operator, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:
        return self.tokens_addmm_(total, h, keep=keep)

    def half_tmm(self, g: Tensor) -> Tensor:
        return g

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        storages = [tensor.untyped_storage() for tensor in tensors_of(self)]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Entries(Stored):
    """A unit base of which every entry is stored."""

    weight_cost = token_cost = 1000
    by_columns = takes_wider = False

    def __init__(self, entries: Tensor, scale: float = 1.0, unit: float | None = None) -> None:
        self.entries = entries
        self.shape = entries.shape[0], entries.shape[1]
        self.scale = scale
        self.unit = unit

    def rows(self, places: Tensor, dtype: torch.dtype) -> DenseOperator:
        return DenseOperator(self.entries[places].to(dtype), self.scale, self.unit)


class DenseOperator(_Entries):
    """A unit base stored in the dtype of the products."""

    def mm(self, c: Tensor) -> Tensor:
        return mm(self.entries, c, self.unit)

    def tmm(self, g: Tensor) -> Tensor:
        return mm(self.entries.T, g, self.unit)

    def addmm_(self, total: Tensor, c: Tensor, *, keep: bool = False) -> Tensor:
        return addmm_(total, self.entries, c, self.unit, keep=keep)

    def tokens_mm(self, x: Tensor) -> Tensor:
        return mm(x, self.entries, self.unit)

    def tokens_addmm_(self, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:
        return addmm_(total, h, self.entries.T, self.unit, keep=keep)


class SignOperator(_Entries):
    """A unit base stored as int8 signs. A product casts them, on a CPU one slice at a time.

    In a product with ``k`` columns the casts are about ``1 / k`` of the work.
    """

    def mm(self, c: Tensor) -> Tensor:
        return _joined([mm(signs, c, self.unit) for signs in self._cast(0, c.dtype)], 0)

    def tmm(self, g: Tensor) -> Tensor:
        return _joined([mm(signs.T, g, self.unit) for signs in self._cast(1, g.dtype)], 0)

    def addmm_(self, total: Tensor, c: Tensor, *, keep: bool = False) -> Tensor:

        def plus(part: Tensor, rows: slice) -> Tensor:
            return addmm_(part, self.entries[rows].to(c.dtype), c, self.unit, keep=keep)

        return apply_to_parts(total, self._slices(0, c.dtype), 0, plus, keep=keep)

    def tokens_mm(self, x: Tensor) -> Tensor:
        return _joined([mm(x, signs, self.unit) for signs in self._cast(1, x.dtype)], 1)

    def tokens_addmm_(self, total: Tensor, h: Tensor, *, keep: bool = False) -> Tensor:

        def plus(part: Tensor, rows: slice) -> Tensor:
            return addmm_(part, h, self.entries[rows].to(h.dtype).T, self.unit, keep=keep)

        return apply_to_parts(total, self._slices(0, h.dtype), 1, plus, keep=keep)

    def _slices(self, dim: int, dtype: torch.dtype) -> list[slice]:
        """Slices of rows or columns whose casts stay in the cache, or within the memory limit."""
        size, other = self.shape[dim], self.shape[1 - dim]
        part = machine.machine_of(self.entries.device).part_bytes or machine.TRANSIENT_BYTES
        step = max(128, part // max(1, other * dtype.itemsize))
        return [slice(lo, min(lo + step, size)) for lo in range(0, size, step)]

    def _cast(self, dim: int, dtype: torch.dtype) -> Iterator[Tensor]:
        parts = self._slices(dim, dtype)
        return (
            (self.entries[part] if dim == 0 else self.entries[:, part]).to(dtype) for part in parts
        )


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def tensors_of(operator: Operator | Stored) -> Iterator[Tensor]:
    """The tensors that an operator holds."""
    for value in vars(operator).values():
        parts = value if isinstance(value, tuple) else (value,)
        yield from (part for part in parts if isinstance(part, Tensor))
