"""Runs that are rows of a CSV file: what the file has is not computed again.

A run is a frozen dataclass. Its fields identify a row, further columns hold what was measured.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from tqdm import tqdm

R = TypeVar("R")
Row = dict[str, str]


def crossed(start: R, **values: Iterable[Any]) -> Iterator[R]:
    """Copies of ``start`` with all combinations of these values."""
    for chosen in itertools.product(*values.values()):
        yield replace(start, **dict(zip(values, chosen, strict=True)))


def read(path: Path, kind: type[R]) -> dict[R, Row]:
    """The rows of the file, by run. A field for which the file has no column has its default.

    A last line without its end was cut off when it was written, and does not count.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    types = {**get_type_hints(kind)}
    convert = {name: types[name] if types[name] is not bool else "True".__eq__ for name in types}
    names = [f.name for f in fields(kind) if rows and f.name in rows[0]]
    return {kind(**{name: convert[name](row[name]) for name in names}): row for row in rows}


def cut_last_line(path: Path) -> None:
    """Remove a last line without its end."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def perform_all(
    lacking: Callable[[dict[R, Row]], Iterable[R]],
    kind: type[R],
    perform: Callable[[R, torch.device], dict[str, Any]],
    measured: Sequence[str],
    path: Path,
    jobs: int = 1,
    device: torch.device | str = "cpu",
) -> dict[R, Row]:
    """Add the rows that are lacking, ``jobs`` of them at a time, and return all rows.

    ``lacking`` is asked again after each run: what it wants may depend on the rows so far. A run
    that fails does not stop the others; at the end the first error is raised. Two processes may add
    to one file if no run is wanted by both.
    """
    cut_last_line(path)
    columns = [*(f.name for f in fields(kind)), *measured]
    with path.open(newline="") if path.exists() else io.StringIO() as file:
        header = next(csv.reader(file), columns)
    if header != columns:
        raise ValueError(
            f"{path.name} must have the columns {columns} to be added to, got {header}"
        )
    rows, failed = read(path, kind), {}
    threads = max(1, torch.get_num_threads() // jobs)
    futures: dict[Future[dict[str, Any]], R] = {}
    with (
        path.open("a", newline="") as file,
        ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool,
        tqdm(desc="runs", total=0, smoothing=0) as bar,
    ):
        writer = csv.DictWriter(file, columns)
        if not path.stat().st_size:
            writer.writeheader()
            file.flush()
        while True:
            wanted = [r for r in lacking(rows) if r not in rows and r not in failed]
            wanted = [run for run in dict.fromkeys(wanted) if run not in futures.values()]
            bar.total = bar.n + len(futures) + len(wanted)
            bar.refresh()
            for run in wanted[: 2 * jobs - len(futures)]:  # few, so that an interrupt ends soon
                futures[pool.submit(perform, run, torch.device(device))] = run
            if not futures:
                break
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                run = futures.pop(future)
                if error := future.exception():
                    failed[run] = error
                    bar.write(f"{run}: {error!r}")
                    continue
                row = {**asdict(run), **future.result()}
                writer.writerow(row)
                file.flush()
                rows[run] = {name: str(value) for name, value in row.items()}
                bar.update()
    for error in failed.values():
        raise error
    return rows
