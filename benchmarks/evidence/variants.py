"""Other forms of the update, at one count of trained parameters: what wins beside RandLoRA.

python benchmarks/evidence/variants.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from functools import partial

from common import answer, every

FORMS = ("isometric", "dense", "hybrid", "overcomplete", "singular B", "singular")
points = partial(every, ("digits", "fashion", "memory"), FORMS)


if __name__ == "__main__":
    answer(points(), __doc__)
