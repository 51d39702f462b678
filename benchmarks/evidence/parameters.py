"""Accuracy against trained parameters, on every task, for all methods (the paper's figure 1).

python benchmarks/evidence/parameters.py [--tasks TASK ...] [--methods METHOD ...] [--jobs N]
                                         [--quick]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common import TASKS, answer, point
from protocol import Run

# Ranks of LoRA beside the task's own, for which a rank of RandLoRA has as many numbers.
BUDGETS = {"digits": (2, 14), "fashion": (2, 14), "glosses": (4, 64), "memory": (4, 64)}
OF_LIBRARIES = ("lora", "lora 1", "dora", "hira", "shira", "vera")
OURS = ("isometric", "dense")
COMPARED = ("lora", *OURS)  # at every count
TRAINED_A = {"digits": 14, "fashion": 14, "glosses": 16, "memory": 16}  # it cannot have far fewer


def counts(task: str) -> Sequence[int]:
    """The ranks of LoRA that are compared, the least first."""
    return sorted((TASKS[task].rank, *BUDGETS.get(task, (4,))))


def points() -> Iterator[Run]:
    for task in TASKS:
        fixed = ("head",) if task in ("digits", "fashion", "glosses") else ()
        prompt = ("prompt",) if task in ("glosses", "memory") else ()
        for method in (*OURS, *OF_LIBRARIES, "full", *fixed, "nola", "kradapter", *prompt):
            yield point(task, method)
        for rank in BUDGETS.get(task, (4,)):
            yield from (point(task, method, rank) for method in COMPARED)
        if task in TRAINED_A:
            yield point(task, "trained A", TRAINED_A[task])


if __name__ == "__main__":
    answer(points(), __doc__)
