"""``BasisBank``: the shared random bases of a model, as a recipe, and the stores that hold them.

What an entry is, :mod:`randlora.streams` defines.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from randlora._checks import as_int, as_positive_int, as_real
from randlora.isometry import factor_shapes, is_isometry, orthonormal
from randlora.operators import (
    DenseOperator,
    GatherOperator,
    KroneckerOperator,
    Operator,
    SignOperator,
    gather_costs,
)
from randlora.streams import (
    BASE_A,
    BASE_B,
    FACTORS,
    KINDS,
    draw_rows,
    pivots,
    refuse_too_sparse,
    set_pivots,
)

__all__ = ["BasisBank", "Store"]

_ROWS: Final = 256  # rows drawn at a time: bounds the transient memory


class BasisBank:
    """The frozen random bases ``A`` and ``B`` that all adapted layers of a model share.

    A bank is a recipe. What is drawn from it is held by one :class:`Store` for each device and
    dtype that a layer computes in, drawn for the largest sizes reserved, and freed with the last
    layer that uses it. A bank is therefore no module and holds no parameters or buffers: it appears
    in no ``state_dict``, a copy of it is itself, a pickle holds only the recipe.

    Args:
        kind: one of

            ============  =====================================================  ================
            kind          entries of ``B`` (all have mean 0 and variance 1)      stored as
            ============  =====================================================  ================
            dense         uniform; the best in the paper (table 3)               compute dtype
            normal        normal                                                 compute dtype
            binary        ±1                                                     int8
            sparse        ±√(s/2) with probability 1/s each, else 0; s = 6       int8
            very_sparse   the same with s = 32, or √q of the largest layer       non-zeros,
                          where ``inject`` makes the bank (paper, section 6.4)   or int8
            isometric     those of a Kronecker product with orthonormal columns  two factors for
                          (:mod:`randlora.isometry`): the fastest                each shape; or one
            ============  =====================================================  ================

        seed: an integer in ``[0, 2**64)``.
        sparsity: ``s`` for the two sparse kinds, a finite number of at least 2.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the kind is unknown, the seed or sparsity out of range, or a sparsity given
            for a kind that has none.
    """

    prefixes = True  # whether leading columns of a base are the smaller base
    lowers_rank = True  # whether a layer with a smaller p than the rank gets p

    def __init__(
        self, kind: str = "dense", *, seed: int = 0, sparsity: float | None = None
    ) -> None:
        if not isinstance(kind, str):
            raise TypeError(f"kind must be a string, got {kind!r} of type {type(kind).__name__}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        seed = as_int("seed", seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        default = KINDS[kind].sparsity
        if sparsity is not None:
            sparsity = as_real("sparsity", sparsity)
            if default is None:
                raise ValueError(f"sparsity={sparsity:g} was given, but kind {kind!r} has none")
            if not 2 <= sparsity <= 2**31:
                raise ValueError(f"sparsity must be in [2, 2**31], got {sparsity:g}")
        self.kind = kind
        self.seed = seed
        self.sparsity = default if sparsity is None else sparsity
        self.sizes = [(0, 0), (0, 0)]  # reserved (rows, columns) of A and of B
        self._stores = _Stores()

    def __repr__(self) -> str:
        sparsity = "" if self.sparsity is None else f", sparsity={self.sparsity:g}"
        return f"BasisBank({self.kind!r}, seed={self.seed}{sparsity})"

    def __deepcopy__(self, memo: dict[int, Any]) -> BasisBank:
        return self  # a value: copies of a model share its bank, and its memory

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_stores"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _stores=_Stores())

    # shape: -> (r, p)
    def a(self, r: int, p: int) -> Tensor:
        """The shared base ``A`` as a new float32 tensor of shape ``(r, p)`` on the CPU."""
        return self.draw(BASE_A, _size(r=r, p=p), torch.device("cpu"), torch.float32)

    # shape: -> (q, m)
    def b(self, q: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The bases ``B_j`` side by side as a new tensor of shape ``(q, m)`` on the CPU.

        The entries are float32 numbers, those of an isometric bank float64 ones.
        """
        size = _size(q=q, m=m)
        if self.factored:
            (left, right), (q, m) = self.factors(*size), size
            product = np.kron(left.numpy(), right.numpy())[:q, :m]
            return torch.from_numpy(product * math.sqrt(len(left) * len(right))).to(dtype)
        entries = self.draw(BASE_B, size, torch.device("cpu"), torch.float32)
        return (entries.float().mul_(self.scale) if self.signs else entries).to(dtype)

    # shape: -> (q1, m1), (q2, m2)
    def factors(self, q: int, m: int) -> tuple[Tensor, Tensor]:
        """The two factors of an isometric ``B``, new float64 tensors on the CPU.

        Raises:
            ValueError: if the bank is of another kind.
        """
        if not self.factored:
            raise ValueError(
                f"kind must be 'isometric' to have factors, this bank is {self.kind!r}"
            )
        one, other = (
            orthonormal(
                draw_rows(
                    BASE_B, FACTORS, self.seed, 0.0, range(rows), columns, (rows << 32 | columns, f)
                )
            )
            for f, (rows, columns) in enumerate(factor_shapes(*_size(q=q, m=m)), start=1)
        )
        return torch.from_numpy(one), torch.from_numpy(other)

    def is_isometry(self, q: int, m: int) -> bool:
        """Whether the columns of ``B``, ``(q, m)``, are orthogonal and of one length.

        Then the singular values of ``ΔW`` are those of its coefficients ``C``, up to a factor.
        """
        return self.factored and is_isometry(*_size(q=q, m=m))

    @property
    def factored(self) -> bool:
        """Whether ``B`` is a Kronecker product of two factors."""
        return KINDS[self.kind].b is FACTORS

    @property
    def signs(self) -> bool:
        """Whether ``B`` is one magnitude times signs and zeros, stored as int8."""
        return KINDS[self.kind].b.signs

    @property
    def scale(self) -> float:
        """The magnitude of the entries of a sign base, else 1."""
        return KINDS[self.kind].b.scale(self.sparsity or 2.0)

    @property
    def density(self) -> float:
        """The share of the entries of ``B`` that is not zero."""
        return 1.0 if self.sparsity is None else 2 / self.sparsity

    @property
    def nbytes(self) -> int:
        """Bytes of bases held for layers at the moment, on all devices."""
        return sum(store.nbytes for store in self._stores.values())

    def reserve(self, r: int, p: int, q: int, m: int) -> None:
        """Announce that a layer will use ``A[:r, :p]`` and ``B[:q, :m]``; draws nothing.

        Raises:
            ValueError: if a ternary ``B`` of this size would be too sparse for full rank.
        """
        sizes = [_size(r=r, p=p), _size(q=q, m=m)]
        if self.sparsity is not None:
            refuse_too_sparse(q, m, self.sparsity)
        self.sizes = [_larger(*pair) for pair in zip(self.sizes, sizes, strict=True)]

    @property
    def recipe(self) -> dict[str, Any]:
        """What the entries follow from: the arguments."""
        return {"kind": self.kind, "seed": self.seed, "sparsity": self.sparsity}

    def same_recipe(self, other: BasisBank) -> bool:
        """Whether the entries of both are the same."""
        return self.recipe == other.recipe

    def start(self, n: int, r: int, p: int) -> tuple[float, float]:
        """What ``Λ``, ``(n, r)``, and ``Γ``, ``(n, p)``, are filled with at first: ``ΔW = 0``."""
        return 1 / math.sqrt(n * r), 0.0

    def digest(self, sizes: Iterable[tuple[int, int, int, int]]) -> str:
        """A SHA-256 over the entries that layers of the sizes ``r, p, q, m`` use, in hexadecimal.

        It is that of the same bases whatever the order of the layers, their device and dtype.
        """
        digest, sizes = hashlib.sha256(), list(sizes)
        of_a = {(r, p) for r, p, _, _ in sizes}
        of_b = {(q, m) for _, _, q, m in sizes}
        blocks = [self.a(*size) for size in _outermost(of_a)]
        if self.factored:
            blocks += [factor for size in sorted(of_b) for factor in self.factors(*size)]
        else:
            cpu = torch.device("cpu")
            blocks += [self.draw(BASE_B, s, cpu, torch.float32) for s in _outermost(of_b)]
        for block in blocks:
            digest.update(f"{tuple(block.shape)}".encode())
            digest.update(block.numpy().astype(block.numpy().dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def store(self, device: torch.device, dtype: torch.dtype) -> Store:
        """What holds the bases on ``device`` for ``dtype``, as long as it is referred to."""
        store = self._stores.get((device, dtype))
        if store is None:
            store = self._stores[device, dtype] = Store(self, device, dtype)
        return store

    def draw(
        self, base: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """A new base, 0 for ``A`` and 1 for ``B``, in ``dtype`` or, for signs, in int8."""
        kind, sparsity = KINDS[self.kind], self.sparsity or 2.0
        law = kind.b if base == BASE_B else kind.a
        rows, columns = size
        out = torch.empty(size, device=device, dtype=torch.int8 if law.signs else dtype)
        for lo in range(0, rows, _ROWS):
            part = range(lo, min(lo + _ROWS, rows))
            entries = draw_rows(base, law, self.seed, sparsity, part, columns)
            out[lo : part.stop].copy_(torch.from_numpy(entries))
        if law.signs:
            corner = out[: pivots(sparsity), : pivots(sparsity)]
            corner = corner[: corner.shape[1], : corner.shape[0]].cpu()
            set_pivots(corner.numpy())
            out[: len(corner), : len(corner)].copy_(corner)
        return out


def refuse_to_draw_what_is_not_real() -> None:
    """Raise where tensors have no values, as when a model is exported: they would be kept."""
    if type(torch.empty(0)) is not Tensor:
        raise RuntimeError(
            "bases cannot be drawn inside a graph that is traced with tensors without values: call "
            "the layer once before, under autocast if it is to be exported so"
        )


@contextmanager
def _aside() -> Iterator[None]:
    """Bases outlive the call that happens to need them, and are none of its operations."""
    tracing = torch._C._get_tracing_state()  # of torch.jit.trace
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


class Store:
    """The bases of one bank on one device, for computing in one dtype.

    Continuous kinds are held in that dtype and sign kinds as int8, once for all layers, which see
    leading blocks, of bases without leading columns once for each width. A ``B`` sparse enough to
    be applied by gathering, on a CPU, is held by its non-zeros, and one of factors by these, once
    for each shape; one of a single factor is a small dense matrix.
    """

    def __init__(self, bank: BasisBank, device: torch.device, dtype: torch.dtype) -> None:
        self.bank = bank
        self.device = device
        self.dtype = dtype
        self.tensors: dict[tuple[int, int], Tensor] = {}
        # Their sizes: torch.jit.trace warns of numbers that are asked of a tensor.
        self.sizes: dict[tuple[int, int], tuple[int, int]] = {}
        self.shaped: dict[tuple[int, int], _Shaped] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = sum(t.untyped_storage().nbytes() for t in self.tensors.values())
        return tensors + sum(operator.nbytes for operator in self.shaped.values())

    def operands(self, r: int, p: int, q: int, m: int) -> tuple[Tensor, Operator]:
        """``A[:r, :p]`` and ``B[:q, :m]``.

        They are drawn now if they are not there or too small.
        """
        bank = self.bank
        a = self._hold(BASE_A, r, p)
        # Gathering was measured on CPUs; elsewhere products are dense. It is to win clearly.
        costs = gather_costs(bank.density, m, self.dtype)
        gathers = self.device.type == "cpu" and sum(costs) < 1000
        if bank.factored or gathers:
            if (q, m) not in self.shaped:
                refuse_to_draw_what_is_not_real()
                with _aside():
                    self.shaped[q, m] = self._shaped(q, m)
            return a, self.shaped[q, m]
        b = self._hold(BASE_B, q, m)
        unit = self._unit(q, m)
        operator = SignOperator if bank.signs else DenseOperator
        return a, operator(b, bank.scale / (unit or 1), unit)

    def _unit(self, q: int, m: int) -> float | None:
        """What the entries of ``B`` as they are held are taken times, a power of two.

        In float16 it gives the columns and rows of ``B`` lengths near one, so that products with
        tokens overflow no sooner than those of the plain layer. Elsewhere there is range enough.
        """
        if self.dtype != torch.float16:
            return None
        return 2.0 ** round(math.log2(self.bank.scale) - math.log2(q * m) / 4)

    def _shaped(self, q: int, m: int) -> _Shaped:
        if self.bank.factored:
            factors = self.bank.factors(q, m)
            left, right = (factor.to(self.device, self.dtype) for factor in factors)
            if left.numel() == 1:  # ±1: there is one factor
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
            refuse_to_draw_what_is_not_real()
            self.tensors.pop(key, None)  # free the smaller one first: both would double the peak
            size = self.bank.sizes[base] = _larger(self.bank.sizes[base], (rows, columns))
            if by_width:
                size = size[0], columns
            with _aside():
                self.tensors[key] = self.bank.draw(base, size, self.device, self.dtype)
            self.sizes[key] = size
        return self.tensors[key][:rows, :columns]


_Shaped: TypeAlias = DenseOperator | GatherOperator | KroneckerOperator
_Stores: TypeAlias = weakref.WeakValueDictionary[tuple[torch.device, torch.dtype], Store]


def _size(**sides: int) -> tuple[int, int]:
    rows, columns = (as_positive_int(name, value) for name, value in sides.items())
    return rows, columns


def _outermost(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The sizes that are the leading block of no other."""
    known = sorted(set(sizes))
    return [
        size
        for size in known
        if not any(size != o and size[0] <= o[0] and size[1] <= o[1] for o in known)
    ]


def _larger(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])
