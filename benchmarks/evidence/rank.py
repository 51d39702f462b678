"""The rank of the update, at one count of trained parameters (the paper's table 2).

LoRA and RandLoRA-a have one rank, RandLoRA-b has about half of full rank.

    python benchmarks/evidence/rank.py [--tasks TASK ...] [--jobs N] [--quick]
"""

from __future__ import annotations

from functools import partial

from common import answer, every

METHODS = ("lora", "randlora a", "randlora b", "dense")
points = partial(every, ("digits", "fashion", "memory"), METHODS)


if __name__ == "__main__":
    answer(points(), __doc__)
