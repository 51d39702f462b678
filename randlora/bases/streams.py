"""The format of the bases: how random bits become entries.

Except for PEFT's bases (:mod:`randlora.bases.peft_rule`), all randomness is here.

This is format version 1. Golden hashes in the tests pin it. Row ``i`` of a base is the stream of
one Philox4x64-10 generator with

    key     = (seed, version << 32 | base << 16 | distribution)    base: 0 for A, 1 for B
    counter = (0, i, 0, 0)

Each 64-bit word of the stream is read from its low bits upwards, one field for each column:

    distribution   field     value of the field     entry
    0  uniform     32 bits   u >> 8 = k             (2k + 1 - 2^24) / 2^24 · √3
    1  normal      16 bits   u      = k             quantile Φ⁻¹((k + 1/2) / 2^16), normalised
    2  binary       1 bit    u                      2u - 1
    3  ternary     32 bits   u; t = ⌊2^32 / s⌋      +1 if u < t, -1 if t ≤ u < 2t, else 0;
                                                    times √(2^31 / t)

The normal quantiles are at the midpoints, and are normalised to a mean square of one. Every
distribution has zero mean and unit variance by construction, not by the statistics of a sample. So
an entry is a function of (version, seed, kind, sparsity, row, column) alone. The leading block of a
larger base is the smaller base, whatever layers are adapted, in which order, on which device and in
which dtype.

**Pivots.** A small or very sparse draw of ±1 and 0 is often singular (half of all 2 × 2 sign
matrices are), and then ``ΔW`` does not have full rank. So the first diagonal entries of a sign base
are corrected, from the top down. If an entry makes the leading minor of its order zero (modulo the
prime 524287), it is changed: 0 becomes 1, and ±1 becomes its opposite. The minor is an affine
function of this entry, whose slope is the previous minor, so after the change it is not zero. Hence
every block ``B[:q, :m]`` with ``min(q, m)`` up to :func:`pivots` has full rank with certainty, and
larger blocks have it with a probability very close to one. The rule depends only on the leading
block, so a smaller base is still part of a larger one.

``A`` is dense and continuous for every kind, because a zero column of ``A`` is a zero column of
``ΔW``.

**Factors.** An isometric ``B`` is not one stream of entries, but a product of two factors. Their
shapes follow from the shape of ``B`` (:mod:`randlora.bases.isometry`), so there are no prefixes.
Layers of one shape share their ``B``. Layers of different shapes share a factor if its number and
its shape are the same. Row ``i`` of factor ``f`` (1 or 2), of shape ``R × C``, is the normal stream
with distribution 4 in the key and base 1, at counter ``(0, i, R << 32 | C, f)``. The factor is then
orthonormalised in float64, by operations whose rounding IEEE 754 defines. So it is a function of
(version, seed, ``f``, ``R``, ``C``) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FORMAT_VERSION: Final = 1
BASE_A: Final = 0
BASE_B: Final = 1
PRIME: Final = 524287  # 2^19 - 1: a sum of 2^14 products of residues is exact in float64

Words = npt.NDArray[np.uint64]
Values = npt.NDArray[Any]


def _uniform(words: Words, _: float) -> Values:
    # 2k + 1 - 2^24 is an odd integer of 24 bits: exact in float32, symmetric, never zero.
    k = (_fields(words, "<u4") >> 8).astype(np.int32)
    return (2 * k + (1 - 2**24)).astype(np.float32) * np.float32(math.sqrt(3.0) / 2**24)


def _normal(words: Words, _: float) -> Values:
    return np.take(_normal_quantiles(), _fields(words, "<u2"))


def _binary(words: Words, _: float) -> Values:
    bits = np.unpackbits(_fields(words, "u1"), axis=-1, bitorder="little")
    return 2 * bits.astype(np.int8) - 1


def _ternary(words: Words, sparsity: float) -> Values:
    u = _fields(words, "<u4")
    t = np.uint32(_threshold(sparsity))
    return (u < t).astype(np.int8) - (u - t < t).astype(np.int8)  # u - t wraps around


def _fields(words: Words, dtype: str) -> npt.NDArray[Any]:
    fields: npt.NDArray[Any] = words.astype("<u8", copy=False).view(dtype)
    return fields


def _threshold(sparsity: float) -> int:
    return math.floor(2**32 / sparsity)


@lru_cache(maxsize=1)
def _normal_quantiles() -> npt.NDArray[np.float32]:
    """The 2^16 midpoint quantiles of N(0, 1), scaled to a mean square of one.

    A table is used instead of Box-Muller because its 2^15 values are rounded to float32 once. So a
    difference in the last digit between the logarithms of two platforms does not reach the entries.
    """
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (k + 0.5) / 2**16) for k in range(2**15)]
    rms = math.sqrt(math.fsum(z * z for z in upper) / 2**15)
    half = np.array([z / rms for z in upper], dtype=np.float32)
    return np.concatenate([-half[::-1], half])


@dataclass(frozen=True)
class _Distribution:
    """How the entries of a base are drawn."""

    code: int  # the number of the distribution in the key of the stream
    bits: int  # of a field
    decode: Callable[[Words, float], Values]  # makes entries from words and the sparsity
    signs: bool  # whether the entries are -1, 0 and 1, in int8

    def scale(self, sparsity: float) -> float:
        """The magnitude of a sign entry, rounded to float32, and 1 for continuous distributions."""
        if self.decode is not _ternary:
            return 1.0
        return float(np.float32(math.sqrt(2**31 / _threshold(sparsity))))


_UNIFORM = _Distribution(0, 32, _uniform, signs=False)
_NORMAL = _Distribution(1, 16, _normal, signs=False)
_BINARY = _Distribution(2, 1, _binary, signs=True)
_TERNARY = _Distribution(3, 32, _ternary, signs=True)
FACTORS = _Distribution(4, 16, _normal, signs=False)  # before they are orthonormalised


@dataclass(frozen=True)
class _Kind:
    """A kind of basis that users name: the distributions of ``B`` and ``A``."""

    b: _Distribution
    a: _Distribution = _UNIFORM
    sparsity: float | None = None  # the default; None for kinds without sparsity


KINDS: Final[dict[str, _Kind]] = {
    "dense": _Kind(_UNIFORM),
    "normal": _Kind(_NORMAL, a=_NORMAL),
    "binary": _Kind(_BINARY),
    "sparse": _Kind(_TERNARY, sparsity=6.0),
    # `inject` sets √q of the largest supported layer; a bank made by hand assumes q = 1024.
    "very_sparse": _Kind(_TERNARY, sparsity=32.0),
    "isometric": _Kind(FACTORS),
}


def draw_rows(
    base: int,
    law: _Distribution,
    seed: int,
    sparsity: float,  # used by the ternary distribution only
    rows: range,
    columns: int,
    place: tuple[int, int] = (0, 0),  # the last two words of the counter
) -> Values:
    """Draw the given rows of a base or factor, before pivots and orthonormalisation.

    The result is int8 for signs, else float32.
    """
    words = -(-columns * law.bits // 64)
    raw = np.empty((len(rows), words), dtype=np.uint64)
    key = np.array([seed, FORMAT_VERSION << 32 | base << 16 | law.code], dtype=np.uint64)
    for slot, row in enumerate(rows):
        counter = np.array([0, row, *place], dtype=np.uint64)
        raw[slot] = np.random.Philox(key=key, counter=counter).random_raw(words)
    return law.decode(raw, sparsity)[:, :columns]


def pivots(sparsity: float) -> int:
    """The order up to which the leading minors of a sign base are made non-zero.

    A draw is singular mostly because a column is empty or, if it is nearly dense, because two
    columns are equal. For order ``k``, the first has a probability of about ``k (1 - 2/s)^k``,
    below ``2e-13 s`` from ``k = 16 s`` on. The second has about ``k² 2^-k``, below ``3e-16`` from
    ``k = 64`` on. The work grows with the cube of the order, so the order ends at 2048, which is
    ``16 s`` for ``s = 128 = √16384``. Larger blocks are checked by :func:`refuse_too_sparse`.
    """
    return min(max(64, math.ceil(16 * sparsity)), 2048)


def refuse_too_sparse(q: int, m: int, sparsity: float) -> None:
    """Raise an error if a block larger than the pivots is likely to have an empty column.

    If ``m > q``, rows are counted instead of columns.
    """
    short, long = sorted((q, m))
    empty = short * (1 - 2 / sparsity) ** long
    if short > pivots(sparsity) and empty > 1e-6:
        raise ValueError(
            f"sparsity must be smaller for bases of full rank of {q} x {m}: with {sparsity:g}, "
            f"{empty:.1g} columns are expected to be empty"
        )


def set_pivots(signs: npt.NDArray[np.int8]) -> None:
    """Change diagonal entries of a square block in place until no leading minor is zero.

    This is Gaussian elimination without row exchanges, modulo a prime, in blocks, so that most of
    the work is matrix products. If a pivot is zero, adding ``δ`` to the diagonal entry adds ``δ``
    to the pivot.
    """
    size, width = len(signs), 64
    s = signs.astype(np.float64)
    for lo in range(0, size, width):
        hi = min(lo + width, size)
        for k in range(lo, hi):
            if s[k, k] % PRIME == 0:
                new = -signs[k, k] if signs[k, k] else 1
                s[k, k] += new - signs[k, k]
                signs[k, k] = new
            inverse = pow(int(s[k, k]) % PRIME, -1, PRIME)
            s[k + 1 :, k] = s[k + 1 :, k] * inverse % PRIME
            column = s[k + 1 :, k : k + 1]
            s[k + 1 :, k + 1 : hi] = (s[k + 1 :, k + 1 : hi] - column * s[k, k + 1 : hi]) % PRIME
            s[k + 1 : hi, hi:] = (s[k + 1 : hi, hi:] - column[: hi - k - 1] * s[k, hi:]) % PRIME
        s[hi:, hi:] = (s[hi:, hi:] - s[hi:, lo:hi] @ s[lo:hi, hi:]) % PRIME
