"""Three times as many steps, with rates of their own: does what is slow catch up?

python benchmarks/evidence/longer.py [--tasks TASK ...] [--methods METHOD ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from common import TASKS, answer, point
from parameters import counts
from protocol import Run

TIMES = 3


def points() -> Iterator[Run]:
    for task in ("memory", "recall"):
        one = [point(task, "full")]
        one += [point(task, method, r) for r in counts(task) for method in ("isometric", "lora")]
        yield from (replace(run, steps=TIMES * TASKS[task].steps) for run in one)


if __name__ == "__main__":
    answer(points(), __doc__)
