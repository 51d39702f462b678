"""Accuracy against trained parameters, on every task (the paper's figure 1).

python benchmarks/evidence/parameters.py [--tasks TASK ...] [--methods METHOD ...] [--jobs N]
                                         [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common import TASKS, answer, before, every, point
from protocol import Run

COMPARED = ("lora", "isometric", "dense")
EVERY = (*COMPARED, "full", "dora", "hira", "shira", "vera", "nola", "kradapter")
METHODS = {
    "digits": (*EVERY, "lora 1", "head"),
    "fashion": (*EVERY, "lora 1", "head"),
    "glosses": (*EVERY, "head", "prompt"),
    "memory": (*EVERY, "lora 1", "prompt"),
    "recall": EVERY,
    "language": EVERY,
    "words": EVERY,
}
# Ranks of LoRA beside the task's own, for which a rank of RandLoRA has as many numbers.
BUDGETS = {
    "digits": (2, 14),
    "fashion": (2, 14),
    "glosses": (4,),
    "memory": (4, 64),
    "recall": (4,),
    "language": (4,),
    "words": (4,),
}
UNIFORM = ("digits", "fashion")  # where uniform bases are compared at these ranks too
TRAINED_A = {"digits": 14, "fashion": 14, "memory": 16}  # it cannot have far fewer


def counts(task: str) -> Sequence[int]:
    """The ranks of LoRA that are compared, the least first."""
    return sorted((TASKS[task].rank, *BUDGETS[task]))


def points() -> Iterator[Run]:
    for task, names in METHODS.items():
        yield from every([task], names)
        for rank in BUDGETS[task]:
            for method in COMPARED if task in UNIFORM else ("lora", "isometric"):
                yield point(task, method, rank)
        if task in TRAINED_A:
            yield point(task, "trained A", TRAINED_A[task])


if __name__ == "__main__":
    answer(points(), __doc__, beside=lambda rows: [run for task in METHODS for run in before(task)])
