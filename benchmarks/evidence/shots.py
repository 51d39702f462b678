"""Few examples: from one of each class to all (the paper's figures 2 and 3).

python benchmarks/evidence/shots.py [--methods METHOD ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, point
from protocol import Run

TASK = "fashion"
SHOTS = ("1", "2", "4", "16", "50%", "")
NAMES = ("isometric", "lora", "full", "head")


def case(method: str, shots: str) -> Run:
    return point(TASK, method, shots=shots)


def points() -> Iterator[Run]:
    for shots in SHOTS:
        for method in NAMES:
            yield case(method, shots)


if __name__ == "__main__":
    answer(points(), __doc__)
