"""LoRA and RandLoRA again on another device, at the rates and seeds that are reported.

Rows of ``devices.csv`` are of runs that ``results.csv`` has from elsewhere.

python benchmarks/evidence/devices.py [--tasks TASK ...] [--jobs N] [--device DEVICE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from common import HERE, MEASURED, TASKS, device_name, every, found, perform, results
from protocol import Run
from runs import perform_all

DEVICES = HERE / "devices.csv"
NAMES = "lora", "isometric"


def points(tasks: Sequence[str]) -> list[Run]:
    return every(tasks, NAMES)


def reported(tasks: Sequence[str], device: torch.device) -> Iterator[Run]:
    """The runs of the points that were made on another device than this."""
    rows = results()
    here = device_name(device)
    for one in points(tasks):
        if got := found(rows, one):
            yield from (run for run in got.runs() if rows[run]["device"] != here)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    tasks = "digits", "fashion", "language"
    parser.add_argument("--tasks", nargs="+", default=list(tasks), choices=list(TASKS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    wanted = list(reported(options.tasks, torch.device(options.device)))
    perform_all(lambda rows: wanted, Run, perform, MEASURED, DEVICES, options.jobs, options.device)


if __name__ == "__main__":
    main()
