"""Bases with orthonormal columns from two small factors: which sizes, which entries, and a theorem.

``B / scale`` is the leading ``q × m`` block of ``R1 ⊗ R2``, where ``R1`` ``(q1, m1)`` and ``R2``
``(q2, m2)`` have orthonormal columns, ``q1 q2 ≥ q`` and ``m1 m2 ≥ m``; ``scale = √(q1 q2)``, so the
entries of ``B`` have a mean square of one, as those of the other kinds have.

**Theorem.** Let ``C`` be the matrix of the coefficients, ``ΔW = scaling · B C``, and ``m ≤ q``.

1. If ``q1 q2 = q``, then ``σ_i(ΔW) = scaling · scale · σ_i(C)`` for every ``i``: the rank and the
   condition number of ``ΔW`` are those of ``C``. (Of the ideal ``B``; factors rounded to a layer's
   dtype are orthonormal to rounding, and so are the values.)
2. If ``q1 q2 > q``, then for almost all factors ``B`` has full column rank, so
   ``rank(ΔW) = rank(C)``.

*Proof.* ``(R1 ⊗ R2)ᵀ (R1 ⊗ R2) = R1ᵀR1 ⊗ R2ᵀR2 = I``, and columns that are kept stay orthonormal.
So in 1 ``ΔWᵀ ΔW = (scaling · scale)² CᵀC``, whose eigenvalues are the squares. In 2, the sum of the
squares of the ``m × m`` minors of the block is a polynomial in the entries of the factors. At
``R1 = [I; 0]``, ``R2 = [I; 0]`` column ``j1 m2 + j2`` of the product is the unit vector of row
``j1 q2 + j2``. :func:`factor_shapes` returns none but sizes at which the largest of these rows is
below ``q``; there the polynomial is 1. The matrices with orthonormal columns form a connected real
analytic manifold, up to the signs of columns of square ones, which change no rank; a polynomial
that is not zero all over it is zero on a set of measure zero. ∎

In a square layer whose rank does not divide its size, ``m = n r > p = q``: that many columns cannot
be orthonormal. The factors are then square and orthogonal of an order of at least ``m``, and cut to
``q`` rows: orthonormal rows where the order is ``m``, and by the same argument, with rows and
columns exchanged, full row rank for almost all factors where it is more. No column is zero for
almost all factors (each is not at some, so the same argument holds for it): every number trained
keeps an effect, though some may have a small one in a layer of a few columns.

The entries drawn are some of finitely many numbers, of which a statement on almost all says
nothing: that draws are of full rank is tested.

Where rows are cut, rank is all that is certain. The condition number of ``B`` is then small where
it is much higher than wide (1.3 at 1021 × 256), mostly some tens where it is nearly square, and of
a heavy tail where as many columns are left as rows: at 397 × 397 it was 92 in the median of 60
seeds and 5e4 at most, beside 1,600 and 6e3 of 20 draws of independent normal entries.

**What full rank of B is good for.** If ``B`` has rank ``min(q, m) ≥ p`` and ``A`` has no vanishing
minor, then ``rank(ΔW) = p`` for almost all ``Λ``, ``Γ``. *Proof.* Choose ``p`` independent columns
of ``B``, ``s_j`` of them in ``B_j``; let ``Λ_j`` be 1 at these and 0 elsewhere; give each block
``s_j`` columns of ``ΔW`` of its own, by ``Γ``. These are ``B_j Λ_j`` times an ``s_j × s_j`` minor
of ``A``: they span the chosen columns. So the ``p × p`` minors of ``ΔW``, polynomials in ``Λ`` and
``Γ``, do not all vanish everywhere. ∎
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["factor_shapes", "is_isometry", "orthonormal", "work"]

Shape = tuple[int, int]

_LARGEST = 256  # rows of R1: its work for each token, batched and slow, grows with their square
_RATE = 13  # tenths of multiply-adds that one in a product with a small matrix takes
_CALLS = 100_000  # what the calls for a second factor take, over a thousand columns or tokens


def work(q: int, m: int, left: Shape, right: Shape) -> tuple[int, int]:
    """What applying ``B`` by factors of these shapes takes, in tenths of multiply-adds.

    That is, for each column of a matrix like the weight and, second, for each token; fitted to
    measurements in float32 (``benchmarks/README.md``). Products with ``R2``, and those of ``R1``
    with many columns, run at three quarters of the rate of a large product. The batched ones of
    ``R1`` with tokens run at three fifths, and with fewer than 12 columns take as long as with some
    40. Each number read and written is taken as 28 multiply-adds, and each that is copied to be
    padded, or cut, as 30 on the ``q`` side and 15 on the ``m`` side. One factor is applied as the
    dense matrix that it is.
    """
    (q1, m1), (q2, m2), rows = left, right, max(q, m)
    passes = 280 * rows
    if q1 == 1:
        return 10 * q * m + passes, 10 * q * m + passes
    passes += 300 * rows * (q1 * q2 > q) + 150 * m * (m1 * m2 > m) + _CALLS
    column = _RATE * q1 * m2 * (q2 + m1) + passes
    token = _RATE * q1 * m2 * q2 + q1 * m1 * (17 * m2 if m2 >= 12 else 700) + passes
    return column, token


@lru_cache(maxsize=1024)
def factor_shapes(q: int, m: int) -> tuple[Shape, Shape]:
    """``(q1, m1)`` and ``(q2, m2)`` for a ``B`` of ``q × m``: the fastest that the theorem allows.

    By :func:`work`, for one column and one token. Sizes with ``q1 q2 = max(q, m)``, whose columns,
    or rows where ``m > q``, are orthonormal, are preferred unless they cost half as much again as
    some that are cut. ``q1`` is 1, so there is one factor, where two would save nothing, up to some
    20,000 entries of ``B``, or are cut and save less than a third, up to some 45,000. What is
    returned is part of the format of the bases: another choice is another version.
    """
    rows = max(q, m)
    best: dict[bool, tuple[int, tuple[Shape, Shape]]] = {}
    for q1 in range(1, min(rows, _LARGEST) + 1):
        q2 = -(-rows // q1)
        exact = q1 * q2 == rows
        for m2 in [q2] if m > q else range(-(-m // q1), min(q2, m) + 1):
            if exact in best and 2 * _RATE * rows * m2 > best[exact][0]:
                break  # no larger m2 is cheaper
            if _last_row(m, m2, q2) < rows:
                shapes = (q1, q1 if m > q else -(-m // m2)), (q2, m2)
                found = sum(work(q, m, *shapes)), shapes
                best[exact] = min(best.get(exact, found), found)
    if False in best and 3 * best[False][0] < 2 * best[True][0]:
        return best[False][1]
    return best[True][1]


def is_isometry(q: int, m: int) -> bool:
    """Whether the columns of ``B / scale`` are orthonormal: case 1 of the theorem."""
    (q1, _), (q2, _) = factor_shapes(q, m)
    return m <= q == q1 * q2


def _last_row(m: int, m2: int, q2: int) -> int:
    """The largest row that the unit vectors of the proof of 2 take."""
    block, place = divmod(m - 1, m2)
    return block * q2 + place


def orthonormal(matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Orthonormalise the columns of a matrix, at least as high as wide, in their order.

    By Gram and Schmidt, each column twice, which is enough for orthogonality to rounding. The
    operations are those of IEEE 754, one by one and in a fixed order, without a library of linear
    algebra whose rounding depends on the machine: the result is the same to the bit everywhere. A
    column that depends on those before it gives way to the first unit vector that does not.
    """
    q, m = matrix.shape
    if m > q:
        raise ValueError(f"matrix must be at least as high as wide, got {q} x {m}")
    done = np.empty((m, q))
    for j, column in enumerate(matrix.T.astype(np.float64)):
        before = done[:j]
        for candidate in itertools.chain([column], _units(q)):
            if not candidate.any():
                continue
            rest = candidate / np.sqrt(_total(candidate * candidate))
            for _ in range(2):
                rest = rest - _total(before * _total((before * rest).T)[:, None])
            length = np.sqrt(_total(rest * rest))
            if length > 1e-6:
                done[j] = rest / length
                break
    return np.ascontiguousarray(done.T)


def _units(q: int) -> Iterator[npt.NDArray[np.float64]]:
    """The unit vectors, one at a time: few are needed, if any."""
    for place in range(q):
        unit = np.zeros(q)
        unit[place] = 1
        yield unit


def _total(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sum over the first axis, by halves."""
    while len(terms) > 1:
        half = len(terms) // 2
        rest = terms[2 * half :]
        terms = terms[:half] + terms[half : 2 * half]
        terms = np.concatenate([terms, rest]) if len(rest) else terms
    return terms[0] if len(terms) else np.zeros(terms.shape[1:])
