"""A new head with a rate of its own, beside one rate for the head and the layers below.

python benchmarks/evidence/heads.py [--tasks TASK ...] [--methods METHOD ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, point
from protocol import Run

HEAD = 1e-2
TASKS = "glosses", "fashion", "digits"
NAMES = "lora", "isometric", "full", "kradapter", "shira", "hira"


def points() -> Iterator[Run]:
    for task in TASKS:
        for name in NAMES:
            yield point(task, name, head=HEAD)


if __name__ == "__main__":
    answer(points(), __doc__)
