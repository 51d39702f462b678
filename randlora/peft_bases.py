"""Bases as PEFT draws them, so that its adapters can be read, trained and written.

PEFT (0.21, ``peft/tuners/randlora``) shares two bases among all layers it targets. With ``q'`` and
``p'`` the larger and the smaller of the largest ``out`` and the largest ``in`` of all of them, and
``N = ceil(p' / r)``, these are

    A' (r, 1, p')    B' (q', N, r)

drawn from a ``torch.Generator`` on the CPU with the seed ``projection_prng_key``, ``A'`` first, in
bfloat16 (float16 where a device lacks that), uniform as Kaiming's rule has it; or, for the sparse
kinds, ±1 with probability ``1 / 2s`` each and else 0 from uniform float32 numbers, ``s = 3`` or, if
very sparse, ``√p'``. Both are divided by their sample's standard deviation.

A layer takes ``A'[:, :, :p]`` and ``B'[:q, :n, :]``, whose columns are counted ``j r + k``, while
the rows of its coefficients are counted ``k n + j``. So its update is that of the paper's equation
4 with other columns: column ``k`` of ``B_j`` is column ``k n + j`` of the slice. Here ``B'`` keeps
its order, and the columns that a layer needs are looked up by this rule when they are drawn.

Unlike this package's own kinds these are not of full rank by construction: where ``A'`` is sparse,
a column of it may be zero, and is then one of ``ΔW``.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from randlora._checks import as_int, as_positive_int
from randlora.bases import BasisBank
from randlora.streams import BASE_A

__all__ = ["PEFT_KINDS", "PeftBank"]

PEFT_KINDS = ("peft", "peft_sparse", "peft_very_sparse")
_PART = 2**20
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class PeftBank(BasisBank):
    """The bases of PEFT's RandLora, for layers of one rank.

    Args:
        kind: ``peft``, ``peft_sparse`` or ``peft_very_sparse``.
        rank: ``r``.
        smaller: ``p'``, of the module's docstring.
        larger: ``q'``.
        seed: PEFT's ``projection_prng_key``.
        dtype: that ``peft`` is drawn in, ``bfloat16`` or ``float16``.
        entries: ``A'`` as ``(r, p')`` and ``B'`` as ``(q', N·r)``, where they are not what the rule
            gives; for ``peft`` only.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a value is out of range.
    """

    prefixes = False
    lowers_rank = False

    def __init__(
        self,
        kind: str = "peft",
        *,
        rank: int,
        smaller: int,
        larger: int,
        seed: int = 0,
        dtype: str = "bfloat16",
        entries: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if kind not in PEFT_KINDS:
            raise ValueError(f"kind must be one of {', '.join(PEFT_KINDS)}, got {kind!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        super().__init__(seed=as_int("seed", seed))
        self.kind = kind
        self.rank = as_positive_int("rank", rank)
        self.smaller = as_positive_int("smaller", smaller)
        self.larger = as_positive_int("larger", larger)
        if self.smaller > self.larger:
            raise ValueError(f"smaller must be at most larger={larger}, got {smaller}")
        self.dtype = dtype
        # Of the entries that are not zero a half is 1: `sparsity` is 2 s.
        if kind != "peft":
            self.sparsity = 2 * (3.0 if kind == "peft_sparse" else math.sqrt(smaller))
        self.entries = entries
        if entries is not None:
            needed = (rank, smaller), (larger, self.columns)
            got = tuple(tuple(entry.shape) for entry in entries)
            if kind != "peft" or got != needed:
                raise ValueError(
                    f"entries must be of kind 'peft' and have shapes {needed}, got {kind!r}, {got}"
                )

    def __repr__(self) -> str:
        given = ", given" if self.entries is not None else ""
        return (
            f"PeftBank({self.kind!r}, rank={self.rank}, smaller={self.smaller}, "
            f"larger={self.larger}, seed={self.seed}{given})"
        )

    @property
    def columns(self) -> int:
        """``N·r``."""
        return -(-self.smaller // self.rank) * self.rank

    @property
    def recipe(self) -> dict[str, Any]:
        """What the entries follow from."""
        names = ("kind", "rank", "smaller", "larger", "seed", "dtype")
        return {name: getattr(self, name) for name in names}

    def same_recipe(self, other: BasisBank) -> bool:
        """Whether the entries of both are the same."""
        if not super().same_recipe(other) or not isinstance(other, PeftBank):
            return False
        if self.entries is None or other.entries is None:
            return self.entries is other.entries
        return all(map(torch.equal, self.entries, other.entries))

    @property
    def factored(self) -> bool:
        """Whether ``B`` is a Kronecker product of two factors: never."""
        return False

    @property
    def signs(self) -> bool:
        """Whether ``B`` is one magnitude times signs and zeros, stored as int8."""
        return self.kind != "peft"

    @property
    def scale(self) -> float:
        """The magnitude of the entries of a sign base, else 1."""
        return self._scale

    @cached_property
    def _scale(self) -> float:
        return self._drawn()[1].abs().max().item() if self.signs else 1.0

    def start(self, n: int, r: int, p: int) -> tuple[float, float]:
        """What ``Λ`` and ``Γ`` are filled with at first: PEFT has the first be zero."""
        return 0.0, 1 / max(n, p)

    def reserve(self, r: int, p: int, q: int, m: int) -> None:
        """Announce that a layer will use ``A[:r, :p]`` and ``B[:q, :m]``; draws nothing.

        Raises:
            ValueError: if the bases are too small for it, or of another rank.
        """
        if r != self.rank or p > self.smaller or q > self.larger or m > self.columns or m % r:
            raise ValueError(
                f"the bank must fit a layer of rank {r}, p={p}, q={q}, m={m}; {self!r} does not"
            )
        super().reserve(r, p, q, m)

    def digest(self, sizes: Any) -> str:
        """A SHA-256 over all entries, whatever layers use of them, in hexadecimal."""
        digest = hashlib.sha256()
        for entries in self._drawn():
            digest.update(f"{tuple(entries.shape)}".encode())
            digest.update(entries.numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    # shape: a (r, p'), b (q', N·r)
    def gives(self, a: Tensor, b: Tensor) -> bool:
        """Whether these are the entries."""
        return all(map(torch.equal, self._drawn(), (a, b)))

    # shape: -> (r, 1, smaller), (larger, n, r)
    def projections(self, smaller: int, larger: int) -> tuple[Tensor, Tensor]:
        """``A'`` and ``B'`` as PEFT has them, cut to what layers of these sizes use."""
        a, b = self._drawn()
        n = -(-smaller // self.rank)
        return a[:, None, :smaller], b.view(len(b), -1, self.rank)[:larger, :n]

    def draw(
        self, base: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """A base for layers of one width, 0 for ``A`` and 1 for ``B``, in ``dtype`` or int8."""
        rows, columns = size
        entries = self._drawn()[base][:rows, :columns]
        if base == BASE_A:
            return entries.to(device, dtype, copy=True)
        entries = entries[:, torch.arange(columns, device="cpu").view(self.rank, -1).T.flatten()]
        if self.signs:
            return entries.sign().to(device, torch.int8)
        return entries.to(device, dtype)

    # shape: -> (r, p'), (q', N·r)
    def _drawn(self) -> tuple[Tensor, Tensor]:
        """``A'`` and ``B'``, in float32 and in PEFT's order."""
        if self.entries is not None:
            return self.entries
        r, n = self.rank, self.columns // self.rank
        generator = torch.Generator().manual_seed(self.seed)
        # On the CPU, whatever the default device and dtype are.
        if self.signs:
            a, b = (
                _signs(torch.rand(shape, generator=generator, **_PLAIN), (self.sparsity or 0) / 2)
                for shape in ((r, 1, self.smaller), (self.larger, n, r))
            )
        else:
            a = self._uniform((r, 1, self.smaller), generator)
            b = torch.cat([self._uniform((self.larger, 1, r), generator) for _ in range(n)], 1)
        a, b = ((t / _std(t)).float() for t in (a, b))
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(
                f"basis must be of another kind for layers this small: {self!r} divides by the "
                "standard deviation of entries that are one number, or all the same"
            )
        return a.flatten(1), b.flatten(1)

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        empty = torch.empty(shape, dtype=_DTYPES[self.dtype], device="cpu")
        nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)
        return empty


_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def _signs(uniform: Tensor, s: float) -> Tensor:
    """-1 and 1 where a number is below ``1 / 2s`` or above ``1 - 1 / 2s``, else 0."""
    return (uniform > 1 - 1 / (2 * s)).float() - (uniform < 1 / (2 * s)).float()


def _std(entries: Tensor) -> Tensor:
    """The sample's standard deviation in the dtype of the entries.

    Summed in float64, so that its rounding does not depend on the number of threads.
    """
    total = squares = torch.zeros((), dtype=torch.float64, device="cpu")
    for start in range(0, entries.numel(), _PART):  # a copy of all would be the largest thing here
        part = entries.flatten()[start : start + _PART].double()
        total, squares = total + part.sum(), squares + part.square().sum()
    count = entries.numel()
    return ((squares - total * total / count) / (count - 1)).sqrt().to(entries.dtype)
