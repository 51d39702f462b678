"""Other forms of the update, at one count of trained parameters: what wins beside RandLoRA.

python benchmarks/evidence/variants.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, point
from protocol import Run

FORMS = ("isometric", "dense", "hybrid", "overcomplete", "singular B", "singular")


def points() -> Iterator[Run]:
    for task in ("digits", "fashion", "memory"):
        for form in FORMS:
            yield point(task, form)


if __name__ == "__main__":
    answer(points(), __doc__)
