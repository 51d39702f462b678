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

Where rows are cut, rank is all that is certain: the condition number of ``B`` is some tens, and has
a heavy tail where as many columns are left as rows (up to some thousands at 1021 × 1021).

**What full rank of B is good for.** If ``B`` has rank ``min(q, m) ≥ p`` and ``A`` has no vanishing
minor, then ``rank(ΔW) = p`` for almost all ``Λ``, ``Γ``. *Proof.* Choose ``p`` independent columns
of ``B``, ``s_j`` of them in ``B_j``; let ``Λ_j`` be 1 at these and 0 elsewhere; give each block
``s_j`` columns of ``ΔW`` of its own, by ``Γ``. These are ``B_j Λ_j`` times an ``s_j × s_j`` minor
of ``A``: they span the chosen columns. So the ``p × p`` minors of ``ΔW``, polynomials in ``Λ`` and
``Γ``, do not all vanish everywhere. ∎
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["factor_shapes", "is_isometry", "orthonormal"]

Shape = tuple[int, int]

# Factors with more rows than this are not looked at: a batched product of them is dense work.
_LARGEST = 256
# What a product costs beyond its multiply-adds, as a share of the dense one. Fitted to products of
# 768 to 5,632 rows, in float32 and bfloat16: batched ones of R1, with few columns, lose rate with
# its rows; a matrix padded to the sizes of the factors is copied, at 64 multiply-adds a number.
_BATCHED = 1 / 2048
_COPIED = 64


@lru_cache(maxsize=1024)
def factor_shapes(q: int, m: int) -> tuple[Shape, Shape]:
    """``(q1, m1)`` and ``(q2, m2)`` for a ``B`` of ``q × m``: the fastest that the theorem allows.

    Sizes whose product is ``q`` are taken unless they cost half as much again as some that are cut.
    What is returned is part of the format of the bases: another choice is another version.
    """
    rows = max(q, m)
    best: dict[bool, tuple[float, tuple[Shape, Shape]]] = {}
    for q1 in range(1, min(rows, _LARGEST) + 1):
        q2 = -(-rows // q1)
        exact = q1 * q2 == rows
        for m1 in [q1] if m > q else range(1, q1 + 1):
            m2 = q2 if m > q else -(-m // m1)
            if m2 > q2 or _last_row(m, m2, q2) >= rows:
                continue
            cost = m2 * (q1 * q2 + q1 * m1) / (rows * m) + q1 * _BATCHED
            cost += _COPIED * ((m1 * m2 > m) / rows + (not exact) / m)
            if exact not in best or cost < best[exact][0]:
                best[exact] = cost, ((q1, m1), (q2, m2))
    if False in best and 1.5 * best[False][0] < best[True][0]:
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
    q, _ = matrix.shape
    done = np.empty((0, q))
    for column in matrix.T.astype(np.float64):
        for candidate in (column, *np.eye(q)):
            rest = candidate / np.sqrt(_total(candidate * candidate))
            for _ in range(2):
                rest = rest - _total(done * _total((done * rest).T)[:, None])
            length = np.sqrt(_total(rest * rest))
            if length > 1e-6:
                done = np.vstack([done, rest / length])
                break
    return np.ascontiguousarray(done.T)


def _total(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sum over the first axis, by halves."""
    while len(terms) > 1:
        half = len(terms) // 2
        rest = terms[2 * half :]
        terms = terms[:half] + terms[half : 2 * half]
        terms = np.concatenate([terms, rest]) if len(rest) else terms
    return terms[0] if len(terms) else np.zeros(terms.shape[1:])
