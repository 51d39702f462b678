"""Isometric bases: the shapes of their two factors, their entries, and a theorem on rank.

``B / scale`` is the leading ``q × m`` block of ``R1 ⊗ R2``. The factors ``R1`` ``(q1, m1)`` and
``R2`` ``(q2, m2)`` have orthonormal columns, with ``q1 q2 ≥ q`` and ``m1 m2 ≥ m``.
``scale = √(q1 q2)``, so the mean square of the entries of ``B`` is one, as for the other kinds.

**Theorem.** Let ``C`` be the matrix of the coefficients, ``ΔW = scaling · B C``, and ``m ≤ q``.

1. If ``q1 q2 = q``, then ``σ_i(ΔW) = scaling · scale · σ_i(C)`` for every ``i``: ``ΔW`` has the
   rank and the condition number of ``C``. (Up to rounding of the factors to a layer's dtype.)
2. If ``q1 q2 > q``, then for almost all factors ``B`` has full column rank, so
   ``rank(ΔW) = rank(C)``.

If ``m > q`` (a square layer whose rank does not divide its size), that many columns cannot be
orthonormal. The factors are then square and orthogonal, and cut to ``q`` rows: orthonormal rows if
their product has the order ``m``, else full row rank for almost all factors.

``docs/theorem.md`` has the proofs, the limits, and why full rank of ``B`` matters. The proof of 2
needs the shapes that :func:`factor_shapes` returns: for ``R1 = [I; 0]`` and ``R2 = [I; 0]``, column
``j1 m2 + j2`` of the product is the unit vector of row ``j1 q2 + j2``, which must be below ``q``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from randlora.core.kronecker import RATE, Shape, kronecker_costs

# The most rows that R1 may have. Its products with tokens are batched and slow, and their work
# grows with the square of its rows.
_LARGEST = 256


@lru_cache(maxsize=1024)
def factor_shapes(q: int, m: int) -> tuple[Shape, Shape]:
    """Return the shapes ``(q1, m1)`` and ``(q2, m2)`` of the factors of a ``B`` of ``q × m``.

    The result is part of the format of the bases: another choice needs another format version.

    The shapes are those of lowest cost that the theorem allows, with the cost of one column plus
    one token (:func:`randlora.core.kronecker.kronecker_costs`). Shapes with ``q1 q2 = max(q, m)``
    are exact: the columns of ``B / scale`` are orthonormal (its rows, if ``m > q``). They are
    preferred unless they cost more than one and a half times as much as shapes that have to be cut.

    There is only one factor, ``q1 = 1``, if two exact factors would save nothing (up to about
    20,000 entries of ``B``), or if two factors that are cut would save less than a third (up to
    about 45,000 entries).
    """
    rows = max(q, m)
    best: dict[bool, tuple[int, tuple[Shape, Shape]]] = {}
    for q1 in range(1, min(rows, _LARGEST) + 1):
        q2 = -(-rows // q1)
        exact = q1 * q2 == rows
        for m2 in [q2] if m > q else range(-(-m // q1), min(q2, m) + 1):
            if exact in best and 2 * RATE * rows * m2 > best[exact][0]:
                break  # no larger m2 is cheaper
            if _last_row(m, m2, q2) < rows:
                shapes = (q1, q1 if m > q else -(-m // m2)), (q2, m2)
                found = sum(kronecker_costs(q, m, *shapes)), shapes
                best[exact] = min(best.get(exact, found), found)
    if False in best and 3 * best[False][0] < 2 * best[True][0]:
        return best[False][1]
    return best[True][1]


def is_isometry(q: int, m: int) -> bool:
    """Whether the columns of ``B / scale`` are orthonormal: case 1 of the theorem."""
    (q1, _), (q2, _) = factor_shapes(q, m)
    return m <= q == q1 * q2


def _last_row(m: int, m2: int, q2: int) -> int:
    """The largest row of the unit vectors in the proof of case 2."""
    block, place = divmod(m - 1, m2)
    return block * q2 + place


def orthonormal(matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Orthonormalise the columns of a matrix ``(q, m)``, ``q ≥ m``, in their order.

    The method is Gram–Schmidt, applied twice to each column, which is enough for orthogonality up
    to rounding. The operations are those of IEEE 754, one by one in a fixed order. Libraries for
    linear algebra are not used, because their rounding depends on the machine. So the result is the
    same bit for bit on every machine. A column that depends on the columns before it is replaced by
    the first unit vector that does not.
    """
    q, m = matrix.shape
    if m > q:
        raise ValueError(f"matrix must have at least as many rows as columns, got {q} x {m}")
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
    """The unit vectors, one at a time, because usually none is needed."""
    for place in range(q):
        unit = np.zeros(q)
        unit[place] = 1
        yield unit


def _total(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sum over the first axis, by adding one half to the other, repeatedly."""
    while len(terms) > 1:
        half = len(terms) // 2
        rest = terms[2 * half :]
        terms = terms[:half] + terms[half : 2 * half]
        terms = np.concatenate([terms, rest]) if len(rest) else terms
    return terms[0] if len(terms) else np.zeros(terms.shape[1:])
