"""What the model still can of what it was trained for, beside what it has learned, at each rate.

A rate that is chosen by what was learned may lie where little more is learned and much forgotten.
So these runs have all rates, and every seed that is reported.

    python benchmarks/evidence/forgetting.py [--tasks TASK ...] [--methods METHOD ...] [--jobs N]
                                             [--quick]
"""

from __future__ import annotations

from functools import partial

from common import answer, every
from protocol import FINE

RATES = [rate for rate in FINE if 3e-4 <= rate <= 1e-2]
COMPARED = (1e-3, 2e-3, 3e-3)  # of LoRA: more is forgotten than learned at larger ones
NAMES = ("lora", "isometric", "full")
points = partial(every, ("digits", "fashion"), NAMES)


if __name__ == "__main__":
    answer(points(), __doc__, RATES)
