"""The rank of the update, at one count of trained parameters (the paper's table 2).

LoRA and RandLoRA-a have the rank of one basis, RandLoRA-b has half of full rank.

    python benchmarks/evidence/rank.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, point
from protocol import Run

METHODS = ("lora", "randlora a", "randlora b", "dense")


def points() -> Iterator[Run]:
    for task in ("digits", "fashion", "memory"):
        for method in METHODS:
            yield point(task, method)


if __name__ == "__main__":
    answer(points(), __doc__)
