"""The kind of the random bases, at one count of trained parameters (the paper's table 3).

python benchmarks/evidence/bases.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from functools import partial

from common import answer, every

KINDS = (
    "dense",
    "normal",
    "binary",
    "sparse 66",
    "sparse 93",
    "sparse 98",
    "sparse 99",
    "isometric",
)
points = partial(every, ("digits", "fashion"), KINDS)


if __name__ == "__main__":
    answer(points(), __doc__)
