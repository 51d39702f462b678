"""Few examples: from one of each class to all (the paper's figures 2 and 3), and what is forgotten.

python benchmarks/evidence/shots.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, point
from protocol import Run

SHOTS = ("1", "2", "4", "16", "50%", "")


NAMES = ("isometric", "lora", "full", "head")
TASKS = ("fashion", "glosses")


def case(task: str, method: str, shots: str) -> Run:
    """A few glosses need fewer steps: 60 of 32 see 16 of a class three times."""
    steps = 60 if task == "glosses" and shots.isdigit() else 0
    return point(task, method, shots=shots, steps=steps)


def points() -> Iterator[Run]:
    for task in TASKS:
        for shots in SHOTS:
            for method in NAMES:
                yield case(task, method, shots)


if __name__ == "__main__":
    answer(points(), __doc__)
