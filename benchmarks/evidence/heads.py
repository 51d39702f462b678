"""A new head with a rate of its own, beside one rate for the head and the layers below.

The rate of the rest is chosen with ``HEAD`` for the head. With this rate, the head's is then
varied, on the seeds that choose.

python benchmarks/evidence/heads.py [--tasks TASK ...] [--methods METHOD ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator

from common import answer, found, point
from protocol import PILOTS, Run, Table

# isort: split
from runs import crossed  # from the folder above, which protocol puts on the path

HEAD = 1e-2
HEADS = 3e-3, HEAD, 3e-2, 1e-1
VARIED = "lora", "isometric", "full"
NAMES = {
    "glosses": (*VARIED, "kradapter", "shira", "hira"),
    "fashion": VARIED,
    "digits": VARIED,
}


def points() -> Iterator[Run]:
    for task, names in NAMES.items():
        for name in names:
            yield point(task, name, head=HEAD)


def varied(rows: Table) -> Iterator[Run]:
    for task in NAMES:
        for name in VARIED:
            one = point(task, name, head=HEAD)
            if got := found(rows, one):
                yield from crossed(one, rate=[got.rate], head=HEADS, seed=PILOTS)


if __name__ == "__main__":
    answer(points(), __doc__, beside=varied)
