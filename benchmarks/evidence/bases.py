"""The kind of the random bases, at one count of trained parameters (the paper's table 3).

python benchmarks/evidence/bases.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from functools import partial

from common import answer, every
from methods import ZEROS

KINDS = (
    "dense",
    "normal",
    "binary",
    *(f"sparse {zeros}" for zeros in ZEROS),
    "isometric",
    *(f"ternary {zeros}" for zeros in ZEROS),
)
points = partial(every, ("digits", "fashion"), KINDS)


if __name__ == "__main__":
    answer(points(), __doc__)
