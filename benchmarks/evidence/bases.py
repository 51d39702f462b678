"""The kind of the random bases, at one count of trained parameters (the paper's table 3).

python benchmarks/evidence/bases.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, point
from protocol import Run

KINDS = (
    "dense",
    "normal",
    "binary",
    "sparse 66",
    "sparse 93",
    "sparse 98",
    "sparse 99",
    "isometric",
)


def points() -> Iterator[Run]:
    for task in ("digits", "fashion"):
        for kind in KINDS:
            yield point(task, kind)


if __name__ == "__main__":
    answer(points(), __doc__)
