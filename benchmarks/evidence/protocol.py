"""How a rate is chosen, and what is reported.

For each method on each task every rate of ``RATES`` is run on a seed of its own, and the next rate
while the best is the least or the largest one. The rate that is best on validation is run on the
other seeds, and these runs are reported, on test. The tasks memory and recall have one score, since
what they learn cannot be guessed.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs.py is there

from runs import Row, crossed

ALL_RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PILOT = 100  # the seed that chooses the rate, and nothing else
SEEDS = range(10)  # that may be reported


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


Table = dict[Run, Row]


def pilots(rows: Table, chosen: Run) -> dict[float, float]:
    """The scores of a point on validation, by rate. A loss that is not a number is the worst."""
    found = {}
    for rate in ALL_RATES:
        row = rows.get(replace(chosen, rate=rate, seed=PILOT))
        if row:
            score = float(row["validation"])
            found[rate] = -math.inf if math.isnan(score) else score
    return found


def next_runs(
    rows: Table,
    chosen: Run,
    seeds: Sequence[int],
    rates: Sequence[float] = RATES,
    extend: bool = True,
) -> list[Run]:
    """What a point lacks next: pilot runs, or with these the runs that are reported."""
    scores = pilots(rows, chosen)
    missing = [rate for rate in rates if rate not in scores]
    if not missing:
        best = max(scores, key=scores.__getitem__)
        if extend and best in (min(scores), max(scores)):
            place = ALL_RATES.index(best) + (1 if best == max(scores) else -1)
            missing = [rate for rate in ALL_RATES[max(place, 0) : place + 1] if rate not in scores]
    if missing:
        return [replace(chosen, rate=rate, seed=PILOT) for rate in missing]
    runs = crossed(replace(chosen, rate=best), seed=seeds)
    return [run for run in runs if run not in rows]


@dataclass(frozen=True)
class Found:
    """The runs of a point at its chosen rate, by seed."""

    point: Run
    rate: float
    rows: dict[int, Row]

    def values(self, column: str = "test") -> dict[int, float]:
        return {seed: float(row[column]) for seed, row in self.rows.items()}

    def mean(self, column: str = "test") -> float:
        return statistics.fmean(self.values(column).values())


def found(rows: Table, chosen: Run) -> Found | None:
    """What a point gave, or None if runs are missing."""
    scores = pilots(rows, chosen)
    if not scores:
        return None
    rate = max(scores, key=scores.__getitem__)
    runs = crossed(replace(chosen, rate=rate), seed=SEEDS)
    reported = {run.seed: rows[run] for run in runs if run in rows}
    return Found(chosen, rate, reported) if len(reported) > 1 else None


# The quantile of Student's t for a two-sided interval of 95 %, by degrees of freedom.
STUDENT = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A mean and the half width of its 95 % interval."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), STUDENT[len(values) - 1] * error


def difference(one: Found, other: Found, column: str = "test") -> tuple[float, float]:
    """Of ``one`` less ``other``, paired by seed."""
    left, right = one.values(column), other.values(column)
    return interval([left[seed] - right[seed] for seed in left if seed in right])
