"""``BasisBank``: the random bases of a model, as a recipe from which they are drawn.

:mod:`randlora.bases.streams` defines the entries, :mod:`randlora.bases.store` holds the tensors.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from randlora.bases.isometry import factor_shapes, is_isometry, orthonormal
from randlora.bases.store import Store, larger_size
from randlora.bases.streams import (
    BASE_A,
    BASE_B,
    FACTORS,
    KINDS,
    draw_rows,
    pivots,
    refuse_too_sparse,
    set_pivots,
)
from randlora.core.checks import as_int, as_positive_int, as_real

STRENGTH: Final = 100  # of the default scaling; how it was chosen is in `docs/rates.md`
_ROWS: Final = 256  # rows drawn at a time, to limit transient memory


class BasisBank:
    """The frozen random bases ``A`` and ``B`` that all adapted layers of a model share.

    A bank is a recipe. The tensors drawn from it are held by one
    :class:`~randlora.bases.store.Store` for each device and dtype in which a layer computes. A
    store draws for the largest sizes reserved, and is freed with the last layer that uses it. So a
    bank is not a module and holds no parameters or buffers: it appears in no ``state_dict``,
    copying it gives the bank itself, and a pickle holds only the recipe.

    Args:
        kind: one of

            ============  =====================================================  ================
            kind          entries of ``B`` (all have mean 0 and variance 1)      stored as
            ============  =====================================================  ================
            dense         uniform; the best in the paper (table 3)               compute dtype
            normal        normal                                                 compute dtype
            binary        ±1                                                     int8
            sparse        ±√(s/2) with probability 1/s each, else 0; s = 6       int8
            very_sparse   like sparse, with s = 32; if ``inject`` makes the      non-zeros,
                          bank, s = √q of the largest layer (paper, section 6.4) or int8
            isometric     those of a Kronecker product with orthonormal columns  two factors for
                          (:mod:`randlora.bases.isometry`); the fastest          each shape; or one
            ============  =====================================================  ================

        seed: an integer in ``[0, 2**64)``.
        sparsity: ``s`` for the two sparse kinds, a finite number of at least 2.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the kind is unknown, if the seed or sparsity is out of range, or if a
            sparsity is given for a kind that has none.
    """

    prefixes = True  # whether a base with fewer columns is the leading columns of a wider one
    lowers_rank = True  # whether a layer with p < rank gets rank p

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
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # the updates that use this bank

    def __repr__(self) -> str:
        sparsity = "" if self.sparsity is None else f", sparsity={self.sparsity:g}"
        return f"BasisBank({self.kind!r}, seed={self.seed}{sparsity})"

    def __deepcopy__(self, memo: dict[int, Any]) -> BasisBank:
        return self  # copies of a model share the bank and its memory

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in vars(self).items() if n not in ("_stores", "users")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _stores=_Stores(), users=weakref.WeakSet())

    def fill_compiled_operands(
        self, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Let every update of these sizes that uses this bank fill its ``compiled_operands``.

        Dynamo runs this while it traces, and records nothing. It compiles the code again for
        another bank, but not for another update: blocks that are compiled one by one share code.
        """
        for update in list(self.users):
            if update.sizes == sizes:
                update.fill_compiled_operands(device, dtype)

    # `torch.compiler.assume_constant_result` does the same, but imports the compiler. Dynamo of
    # torch 2.9 accepts such a method of any object, but no function that takes one.
    fill_compiled_operands._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # shape: -> (r, p)
    def a(self, r: int, p: int) -> Tensor:
        """Draw the shared base ``A``, a new float32 tensor of shape ``(r, p)`` on the CPU."""
        return self.draw(BASE_A, _size(r=r, p=p), torch.device("cpu"), torch.float32)

    # shape: -> (q, m)
    def b(self, q: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw the bases ``B_j`` side by side, a new tensor of shape ``(q, m)`` on the CPU.

        Entries are computed in float32, those of an isometric bank in float64, and then cast to
        ``dtype``.
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
        """Draw the two factors of an isometric ``B``, shape ``(q, m)``: float64 tensors on the CPU.

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
        """Whether the columns of ``B``, shape ``(q, m)``, are orthogonal and of equal length.

        Then the singular values of ``ΔW`` are those of its coefficients ``C``, up to a factor.
        """
        return self.factored and is_isometry(*_size(q=q, m=m))

    @property
    def factored(self) -> bool:
        """Whether ``B`` is a Kronecker product of two factors."""
        return KINDS[self.kind].b is FACTORS

    @property
    def signs(self) -> bool:
        """Whether the entries of ``B`` are a magnitude times -1, 0 or 1, stored as int8."""
        return KINDS[self.kind].b.signs

    @property
    def scale(self) -> float:
        """The magnitude of the entries of a sign base, and 1 for other kinds."""
        return KINDS[self.kind].b.scale(self.sparsity or 2.0)

    @property
    def density(self) -> float:
        """The share of the entries of ``B`` that are not zero."""
        return 1.0 if self.sparsity is None else 2 / self.sparsity

    @property
    def nbytes(self) -> int:
        """Bytes of the bases that layers hold now, on all devices."""
        return sum(store.nbytes for store in self._stores.values())

    def reserve(self, r: int, p: int, q: int, m: int) -> None:
        """Announce that a layer will use ``A[:r, :p]`` and ``B[:q, :m]``. Draws nothing.

        Raises:
            ValueError: if a ternary ``B`` of this size would be too sparse for full rank.
        """
        sizes = [_size(r=r, p=p), _size(q=q, m=m)]
        if self.sparsity is not None:
            refuse_too_sparse(q, m, self.sparsity)
        self.sizes = [larger_size(*pair) for pair in zip(self.sizes, sizes, strict=True)]

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of the bank, which determine all entries."""
        return {"kind": self.kind, "seed": self.seed, "sparsity": self.sparsity}

    def same_recipe(self, other: BasisBank) -> bool:
        """Whether both banks have the same entries."""
        return self.recipe == other.recipe

    def start(self, n: int, r: int, p: int) -> tuple[float, float]:
        """The values that ``Λ``, ``(n, r)``, and ``Γ``, ``(n, p)``, are filled with at injection.

        ``Γ`` is 0, so that ``ΔW = 0``.
        """
        return 1.0, 0.0

    def default_scaling(self, out: int, in_: int, n: int) -> float:
        """The factor of ``ΔW`` for a weight ``out × in`` and ``n`` bases.

        With it, the first step of AdamW at the rate 1e-3 moves ``ΔW`` by about 0.08 in the
        spectral norm, for every size, and ranks that are small beside it (``docs/rates.md``).
        """
        return STRENGTH / math.sqrt(out * in_ * n)

    def digest(self, sizes: Iterable[tuple[int, int, int, int]]) -> str:
        """A SHA-256, in hexadecimal, of the entries that layers of sizes ``(r, p, q, m)`` use.

        It does not depend on the order of the layers, their devices or their dtypes.
        """
        sizes = list(sizes)
        of_a = {(r, p) for r, p, _, _ in sizes}
        of_b = {(q, m) for _, _, q, m in sizes}
        blocks = [self.a(*size) for size in _outermost(of_a)]
        if self.factored:
            blocks += [factor for size in sorted(of_b) for factor in self.factors(*size)]
        else:
            cpu = torch.device("cpu")
            blocks += [self.draw(BASE_B, s, cpu, torch.float32) for s in _outermost(of_b)]
        return sha256(blocks)

    def store(self, device: torch.device, dtype: torch.dtype) -> Store:
        """The store for ``device`` and ``dtype``; it is created if there is none.

        It exists as long as a layer refers to it.
        """
        store = self._stores.get((device, dtype))
        if store is None:
            store = self._stores[device, dtype] = Store(self, device, dtype)
        return store

    def draw(
        self, base: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Draw a new ``A`` (``base`` 0) or ``B`` (1) in ``dtype``; signs are int8 instead."""
        kind, sparsity = KINDS[self.kind], self.sparsity or 2.0
        law = kind.b if base == BASE_B else kind.a
        rows, columns = size
        out = torch.empty(size, device=device, dtype=torch.int8 if law.signs else dtype)
        if out.is_meta:  # it has no values
            return out
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


_Stores: TypeAlias = weakref.WeakValueDictionary[tuple[torch.device, torch.dtype], Store]


def sha256(blocks: Iterable[Tensor]) -> str:
    """A SHA-256, in hexadecimal, of the shapes and the entries of tensors on the CPU."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(f"{tuple(block.shape)}".encode())
        digest.update(block.numpy().astype(block.numpy().dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _size(**sides: int) -> tuple[int, int]:
    rows, columns = (as_positive_int(name, value) for name, value in sides.items())
    return rows, columns


def _outermost(sizes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The sizes that are not the leading block of another one."""
    known = sorted(set(sizes))
    return [s for s in known if not any(s != o and s[0] <= o[0] and s[1] <= o[1] for o in known)]
