"""What has to be memorised, in three times as many steps: does the least LoRA catch up?

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
    task = "memory"
    one = [point(task, method, counts(task)[0]) for method in ("isometric", "lora")]
    for run in (*one, point(task, "full")):
        yield replace(run, steps=TIMES * TASKS[task].steps)


if __name__ == "__main__":
    answer(points(), __doc__)
