"""LoRA and RandLoRA again on another device, at the rates and seeds that are reported.

Rows of ``devices.csv`` are of runs that ``results.csv`` has from elsewhere.

python benchmarks/evidence/devices.py [--tasks TASK ...] [--jobs N] [--device DEVICE] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

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
    parser.add_argument("--quick", action="store_true", help="one run of 10 steps, not kept")
    options = parser.parse_args()
    if options.quick:
        first = points(options.tasks)[0]
        wanted = [replace(first, rate=1e-3, seed=TASKS[first.task].seeds[0], steps=10)]
        path = Path(tempfile.mkdtemp()) / "quick.csv"
    else:
        wanted, path = list(reported(options.tasks, torch.device(options.device))), DEVICES
    perform_all(lambda rows: wanted, Run, perform, MEASURED, path, options.jobs, options.device)


if __name__ == "__main__":
    main()
