"""How a rate is chosen, and what is reported.

1. Every rate of ``RATES`` is run on a first seed, and the next one while the best is the least or
   the largest, or while none has learned anything.
2. The rates half a step below and above the best follow.
3. The best so far and its two neighbours are run on a second seed. While the best mean of the two
   is at an edge of what both have, the next rate follows on both. This mean, on validation, chooses
   the rate of the method; of equal ones the least.
4. This rate is run on the other seeds, and these runs are reported, on test.

The tasks memory and recall have one score, since what they learn cannot be guessed.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs.py is there

from runs import Row

COARSE = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
HALVES = (2e-5, 5e-5, 2e-4, 5e-4, 2e-3, 5e-3, 2e-2, 5e-2, 2e-1, 5e-1)
FINE = tuple(sorted(COARSE + HALVES))
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PILOTS = 100, 101  # the seeds that choose the rate, and nothing else


@dataclass(frozen=True)
class Run:
    """One run: the columns of the CSV file that identify a row."""

    task: str
    method: str = "isometric"
    size: int = 8
    rate: float = 1e-3
    seed: int = 0
    shots: str = ""  # how many images or glosses of each class, or a share of all; all by default
    steps: int = 0  # instead of the task's own
    head: float = 0.0  # the rate of a head that is trained, instead of the method's


Table = dict[Run, Row]


def validation(rows: Table, run: Run) -> float | None:
    """The score of a run on validation; the worst if it is not a number, None if it is lacking."""
    if run not in rows:
        return None
    score = float(rows[run]["validation"])
    return -math.inf if math.isnan(score) else score


def beside(rate: float, among: Sequence[float], steps: Sequence[int] = (-1, 1)) -> list[float]:
    """The rates next to this one."""
    places = (among.index(rate) + step for step in steps)
    return [among[place] for place in places if 0 <= place < len(among)]


def choose(
    rows: Table,
    point: Run,
    floor: float = -math.inf,
    rates: Sequence[float] = RATES,
    thorough: bool = True,
) -> tuple[list[Run], float | None]:
    """The pilot runs that a point lacks next; or none, and its rate.

    ``floor`` is the score of what has learned nothing. Without ``thorough`` the best of ``rates``
    is taken.
    """

    def score(rate: float, pilot: int = PILOTS[0]) -> float | None:
        return validation(rows, replace(point, rate=rate, seed=pilot))

    def lacking(wanted: Iterable[float], pilots: Sequence[int] = PILOTS[:1]) -> list[Run]:
        return [
            replace(point, rate=rate, seed=pilot)
            for rate in wanted
            for pilot in pilots
            if score(rate, pilot) is None
        ]

    if missing := lacking(rates):
        return missing, None
    tried = [rate for rate in COARSE if score(rate) is not None]
    best = max(tried, key=score)
    if not thorough:
        return [], best
    nothing = score(best) <= floor
    wanted = beside(tried[0], COARSE, [-1]) if nothing or best == tried[0] else []
    wanted += beside(tried[-1], COARSE, [1]) if nothing or best == tried[-1] else []
    halves = beside(best, FINE)
    if missing := lacking(wanted) or lacking(halves):
        return missing, None
    top = max((best, *halves), key=score)
    last = {top}
    while wanted := {top, *beside(top, FINE)} - last:
        last |= wanted
        if missing := lacking(sorted(last), PILOTS):
            return missing, None
        top = max(sorted(last), key=lambda rate: sum(score(rate, pilot) for pilot in PILOTS))
    return [], top


@dataclass(frozen=True)
class Found:
    """The runs of a point at its chosen rate, by seed."""

    point: Run
    rate: float
    rows: dict[int, Row]

    def runs(self) -> list[Run]:
        return [replace(self.point, rate=self.rate, seed=seed) for seed in self.rows]

    def values(self, column: str = "test") -> dict[int, float]:
        return {seed: float(row[column]) for seed, row in self.rows.items()}

    def mean(self, column: str = "test") -> float:
        return statistics.fmean(self.values(column).values())


def found(rows: Table, point: Run, seeds: Sequence[int], floor: float = -math.inf) -> Found | None:
    """What a point gave, or None if runs are missing."""
    missing, rate = choose(rows, point, floor)
    if missing:
        return None
    reported = {seed: rows.get(replace(point, rate=rate, seed=seed)) for seed in seeds}
    return Found(point, rate, reported) if all(reported.values()) else None


# The quantile of Student's t for a two-sided interval of 95 %, by the number of seeds.
STUDENT = {3: 4.303, 5: 2.776}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A mean and the half width of its 95 % interval; not numbers if a value is not one."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), STUDENT[len(values)] * error


def difference(one: Found, other: Found, column: str = "test") -> tuple[float, float]:
    """Of ``one`` less ``other``, paired by seed."""
    left, right = one.values(column), other.values(column)
    return interval([left[seed] - right[seed] for seed in left])


def kept_at(score: float, curve: Iterable[Found], seed: int) -> float:
    """What a method keeps in this seed where its test first reaches a score.

    ``curve`` is what its rates gave, the least first; linear between two of them. Not a number if
    it reaches less at all of them.
    """
    rows = [got.rows[seed] for got in curve]
    points = [(float(row["test"]), float(row["kept"])) for row in rows]
    if points[0][0] >= score:
        return points[0][1]
    for (low, kept), (high, then) in itertools.pairwise(points):
        if high >= score:
            return kept + (then - kept) * (score - low) / (high - low)
    return math.nan
