"""What a step takes: the methods in turn, in one process, 10 steps each, for several rounds.

python benchmarks/evidence/seconds.py [--rounds N] [--quick]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from common import HERE, TASKS, below, point
from protocol import PILOTS
from tqdm import tqdm

TIMES = HERE / "seconds.csv"
COLUMNS = "task", "method", "size", "round", "seconds"
NAMES = ("full", "isometric", "dense", "lora", "dora", "hira", "shira", "kradapter", "vera", "nola")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=TIMES)
    parser.add_argument("--quick", action="store_true", help="four methods on one task, not kept")
    options = parser.parse_args()
    tasks = ("fashion",) if options.quick else ("fashion", "memory", "recall")
    rounds, names = (1, NAMES[:4]) if options.quick else (options.rounds, NAMES)
    rows = []
    for task in tqdm(tasks, desc="tasks"):
        for number in range(rounds):
            for name in names:
                run = point(task, name, seed=PILOTS[0])  # of recall it is not tested
                below.cache_clear()
                seconds = TASKS[task].perform(run, torch.device("cpu"), 10).seconds
                rows.append((task, name, run.size, number, f"{seconds:.4f}"))
    if options.quick:
        print(*rows, sep="\n")
        return
    with options.csv.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
