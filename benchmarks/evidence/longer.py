"""What has to be memorised, in three times as many steps: does LoRA catch up?

python benchmarks/evidence/longer.py [--tasks TASK ...] [--methods METHOD ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from common import TASKS, answer, point
from parameters import counts
from protocol import Run

NAMES = ("full", "isometric", "lora")
TIMES = 3


def compared() -> Iterator[Run]:
    """The tasks of memory in as many steps as everywhere."""
    for task in ("memory", "recall"):
        yield point(task, "full")
        for method in ("isometric", "lora"):
            yield from (point(task, method, rank) for rank in counts(task))
    yield from points()


def points() -> Iterator[Run]:
    task = "memory"
    for method in NAMES:
        for rank in counts(task) if method != "full" else (0,):
            yield replace(point(task, method, rank), steps=TIMES * TASKS[task].steps)


if __name__ == "__main__":
    answer(points(), __doc__)
