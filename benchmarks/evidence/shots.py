"""Few examples: from one of each class to all (the paper's figures 2 and 3), and what is forgotten.

python benchmarks/evidence/shots.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, point
from protocol import Run

SHOTS = ("1", "2", "4", "16", "50%", "")


def points() -> Iterator[Run]:
    for task in ("fashion", "glosses"):
        for shots in SHOTS:
            for method in ("isometric", "lora", "full", "head"):
                yield point(task, method, shots=shots)


if __name__ == "__main__":
    answer(points(), __doc__)
