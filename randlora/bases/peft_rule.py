"""``PeftBank``: the bases that PEFT draws, so that its adapters can be read, trained and written.

PEFT (0.21, ``peft/tuners/randlora``) shares two bases among all target layers. Take the largest
``out`` and the largest ``in`` of all target layers. ``q'`` is the larger of these two and ``p'``
the smaller, and ``N = ceil(p' / r)``. The bases are

    A' (r, 1, p')    B' (q', N, r)

They are drawn from a ``torch.Generator`` on the CPU, seeded with ``projection_prng_key``, ``A'``
first. The dense kind is uniform by Kaiming's rule, drawn in bfloat16 (in float16 if a device lacks
bfloat16). In these dtypes torch 2.9 and 2.13 draw different numbers for one seed. The sparse kinds
are ±1 with probability ``1 / 2s`` each and else 0, from uniform float32 numbers, with ``s = 3`` for
the sparse kind and ``s = √p'`` for the very sparse kind. Each base is divided by the standard
deviation of its sample.

A layer takes ``A'[:, :, :p]`` and ``B'[:q, :n, :]``. In this slice of ``B'``, column ``k`` of
base ``j`` has index ``j r + k``, but the matching row of the coefficients has index ``k n + j``. So
the update is that of the paper's equation 4 with the columns in another order: column ``k`` of
``B_j`` is column ``k n + j`` of the slice. This class stores ``B'`` in PEFT's order, and
:meth:`PeftBank.draw` takes the columns that a layer needs by this rule.

Unlike the other kinds of this package, these bases do not guarantee full rank: where ``A'`` is
sparse, a column of it may be zero, and then that column of ``ΔW`` is zero.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.bank import BasisBank, sha256
from randlora.bases.streams import BASE_A
from randlora.core.checks import as_int, as_positive_int

PEFT_KINDS = ("peft", "peft_sparse", "peft_very_sparse")
_PART = 2**20  # entries converted to float64 at a time
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class PeftBank(BasisBank):
    """The bases of PEFT's RandLora, for layers of one rank.

    ``entries`` are ``A'`` as ``(r, p')`` and ``B'`` as ``(q', N·r)``, if they differ from what the
    rule gives. They are for the kind ``peft`` only.
    """

    prefixes = lowers_rank = factored = False

    def __init__(
        self,
        kind: str = "peft",
        *,
        rank: int,
        smaller: int,  # p' in the docstring of this module
        larger: int,  # q'
        seed: int = 0,  # PEFT's projection_prng_key
        dtype: str = "bfloat16",  # the dtype in which the kind peft is drawn; or float16
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
        # P(±1) is 1 / sparsity each in this package, and 1 / 2s each in PEFT: sparsity is 2 s.
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
        """The columns of ``B'``, ``N·r``."""
        return -(-self.smaller // self.rank) * self.rank

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments that determine all entries."""
        names = ("kind", "rank", "smaller", "larger", "seed", "dtype")
        return {name: getattr(self, name) for name in names}

    def same_recipe(self, other: BasisBank) -> bool:
        """Whether both banks have the same entries."""
        if not super().same_recipe(other) or not isinstance(other, PeftBank):
            return False
        if self.entries is None or other.entries is None:
            return self.entries is other.entries
        return all(map(torch.equal, self.entries, other.entries))

    @property
    def signs(self) -> bool:
        """Whether the entries of ``B`` are a magnitude times -1, 0 or 1, stored as int8."""
        return self.kind != "peft"

    @cached_property
    def scale(self) -> float:
        """The magnitude of the entries of a sign base, and 1 for other kinds."""
        return self._drawn()[1].abs().max().item() if self.signs else 1.0

    def start(self, n: int, r: int, p: int) -> tuple[float, float]:
        """The values that fill ``Λ`` and ``Γ`` at injection. PEFT starts with ``Λ = 0``."""
        return 0.0, 1 / max(n, p)

    def default_scaling(self, out: int, in_: int, n: int) -> float:
        """The factor of ``ΔW`` in PEFT's default configuration: an alpha of 640, a rank of 32."""
        return 20.0

    def reserve(self, r: int, p: int, q: int, m: int) -> None:
        """Announce that a layer will use ``A[:r, :p]`` and ``B[:q, :m]``. Draws nothing."""
        if r != self.rank or p > self.smaller or q > self.larger or m > self.columns or m % r:
            raise ValueError(
                f"the bank must fit a layer of rank {r}, p={p}, q={q}, m={m}; {self!r} does not"
            )
        super().reserve(r, p, q, m)

    def digest(self, sizes: Any) -> str:
        """A SHA-256, in hexadecimal, of all entries; ``sizes`` has no effect."""
        return sha256(entries.float() for entries in self._drawn())

    # shape: a (r, p'), b (q', N·r)
    def gives(self, a: Tensor, b: Tensor) -> bool:
        """Whether these are the entries ``A'`` and ``B'`` of this bank."""
        return all(map(torch.equal, self._drawn(), (a, b)))

    # shape: -> (r, 1, smaller), (larger, n, r)
    def projections(self, smaller: int, larger: int) -> tuple[Tensor, Tensor]:
        """``A'`` and ``B'`` in PEFT's layout, cut to what layers of these sizes use."""
        a, b = self._drawn()
        n = -(-smaller // self.rank)
        return a[:, None, :smaller], b.view(len(b), -1, self.rank)[:larger, :n]

    def draw(
        self, base: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Draw a base of shape ``size``, in the column order of layers with ``size[1]`` columns."""
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
        """``A'`` and ``B'``, in float32 and with the columns in PEFT's order."""
        if self.entries is not None:
            return self.entries
        r, n = self.rank, self.columns // self.rank
        generator = torch.Generator().manual_seed(self.seed)
        # The device and dtype are stated, because the defaults may have been changed.
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
                "standard deviation of its entries, which is zero or undefined here"
            )
        return a.flatten(1), b.flatten(1)

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        empty = torch.empty(shape, dtype=_DTYPES[self.dtype], device="cpu")
        nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)
        return empty


def _signs(uniform: Tensor, s: float) -> Tensor:
    """-1 where a number is below ``1 / 2s``, 1 where it is above ``1 - 1 / 2s``, else 0."""
    return (uniform > 1 - 1 / (2 * s)).float() - (uniform < 1 / (2 * s)).float()


def _std(entries: Tensor) -> Tensor:
    """The standard deviation of the sample, in the dtype of ``entries``.

    The sums are in float64, so that the result does not depend on the number of threads.
    """
    total = squares = torch.zeros((), dtype=torch.float64, device="cpu")
    for start in range(0, entries.numel(), _PART):  # in parts, to limit memory
        part = entries.flatten()[start : start + _PART].double()
        total, squares = total + part.sum(), squares + part.square().sum()
    count = entries.numel()
    return ((squares - total * total / count) / (count - 1)).sqrt().to(entries.dtype)
