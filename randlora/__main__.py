"""Commands on adapter files: ``python -m randlora inspect | verify | merge``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from randlora.bases import Store
from randlora.checkpoint import CheckpointError, Contents, FileError, MismatchError, read, replacing
from randlora.contents import check_base_weights
from randlora.diagnostics import progress, spectrum, table
from randlora.functional import delta_weight, effective_weight
from randlora.operators import DenseOperator

_CHUNK = 2**24
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 1 where a file does not hold what it should, with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m randlora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="say what is in a file, weight by weight")
    command.add_argument("file")
    command.add_argument("--ranks", action="store_true", help="compute the ranks of the updates")
    command.set_defaults(run=lambda given: inspect(given.file, ranks=given.ranks))
    command = commands.add_parser("verify", help="draw the bases anew and compare their digests")
    command.add_argument("file")
    command.set_defaults(run=lambda given: verify(given.file))
    command = commands.add_parser("merge", help="add the updates to a model's weights, one by one")
    command.add_argument("file")
    command.add_argument("base", help="a .safetensors file with the weights of the model")
    command.add_argument("out", help="the .safetensors file to write")
    command.add_argument("--any-base", action="store_true", help="whatever the weights are")
    command.set_defaults(
        run=lambda given: merge(given.file, given.base, given.out, check_base=not given.any_base)
    )
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def inspect(path: str, *, ranks: bool = False) -> None:
    """Print the header, and a line for each update."""
    contents = read(path)
    rows = []
    for name, (site, settings, place) in contents.updates.items():
        size = " x ".join(map(str, (*site.lead, site.out, site.in_)))
        rows.append(
            (
                name,
                size,
                str(settings.rank),
                str(settings.num_bases),
                f"{settings.scaling:g}",
                f"{contents.numbers[name].numel():,}",
                str(place),
                *([_ranks(contents, name)] if ranks else []),
            )
        )
    header = ("weight", "out x in", "rank", "bases", "scaling", "trained", "bank")
    print(f"written by randlora {contents.version}")
    print(table((*header, "rank of update") if ranks else header, rows))
    for place, (bank, digest) in enumerate(zip(contents.banks, contents.digests, strict=True)):
        print(f"bank {place}: {bank!r}, digest {str(digest)[:16]}…")
    tops = tuple(f"{name}." for name in contents.modules_to_save)
    in_full = {name for name in contents.saved if name.startswith(tops)}

    def count(names: Iterable[str]) -> int:
        return sum(contents.saved[name].numel() for name in names)

    if contents.modules_to_save:
        print(f"trained in full: {', '.join(contents.modules_to_save)}: {count(in_full):,} numbers")
    if besides := contents.saved.keys() - in_full:
        print(f"moved or trained besides: {', '.join(sorted(besides))}: {count(besides):,} numbers")


def verify(path: str) -> None:
    """Draw the bases anew; an error unless they are those that the adapter was trained with."""
    contents = read(path)
    contents.check_bases()
    banks = ", ".join(map(repr, contents.banks))
    print(f"{len(contents.updates)} updates; {banks}: the bases are those of the file")


def merge(path: str, base: str, out: str, *, check_base: bool = True) -> None:
    """Write the weights of ``base`` with the updates added, each rounded once to its dtype.

    They are read, changed and written one by one. ``out`` may be ``base``.
    """
    contents = read(path)
    if not check_base:
        contents = replace(contents, base=None)
    for place, bank in enumerate(contents.banks):
        for sizes in contents.sizes(place):
            bank.reserve(*sizes)
    stores: dict[Any, Store] = {}  # held, so that bases are drawn once
    if Path(out).suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors, got {out!r}")
    with open(base, "rb") as source:
        head, entries = _entries(source)
        start = source.tell()
        _check(contents, entries)
        contents.check_bases()
        order = sorted(entries, key=lambda name: int(entries[name]["data_offsets"][0]))
        with replacing(Path(out)) as target, progress(len(order)) as step:
            target.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                lo, hi = entries[name]["data_offsets"]
                source.seek(start + lo)
                target.seek(8 + len(head) + lo)
                if name in contents.updates or name in contents.saved:
                    data = bytearray(hi - lo)
                    source.readinto(data)
                    changed = _changed(contents, name, entries[name], data, stores)
                    target.write(changed.reshape(-1).view(torch.uint8).numpy().data)
                    del data, changed  # before the next is read
                else:
                    for at in range(lo, hi, _CHUNK):
                        target.write(source.read(min(_CHUNK, hi - at)))
                step()


def _entries(file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file, as it is and read."""
    try:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("it is shorter than its header says")
        head = file.read(size)
        entries = json.loads(head)
        entries.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, stop = entry["data_offsets"]
            count = math.prod(entry["shape"])
            itemsize = _DTYPES[entry["dtype"]].itemsize if entry["dtype"] in _DTYPES else None
            if start != end or stop < start or min(entry["shape"], default=0) < 0:
                raise ValueError(f"{name!r} is not where the one before it ends")
            if itemsize is not None and stop - start != count * itemsize:
                raise ValueError(f"{name!r} is not as long as its shape says")
            end = stop
        if 8 + size + end != os.fstat(file.fileno()).st_size:
            raise ValueError("it is not as long as its header says")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{file.name!r} is not a whole .safetensors file: {error}") from error
    return head, entries


def _check(contents: Contents, entries: dict[str, Any]) -> None:
    for name, (site, *_) in contents.updates.items():
        if site.opaque:
            raise MismatchError(f"{name!r} is not to be read, so nothing can be added to it")
        if name not in entries:
            raise MismatchError(f"the base has no {name!r}, which the adapter has an update for")
    for name, saved in contents.saved.items():
        if name not in entries and not any(
            other in entries and saved.shape == value.shape and torch.equal(saved, value)
            for other, value in contents.saved.items()  # one that is tied to it
        ):
            raise MismatchError(f"the base has no {name!r}, which was trained in full")
    for name, entry in entries.items():
        if name in contents.updates:
            site = contents.updates[name][0]
            # What lies behind the rows is flattened.
            first = (*site.lead, site.in_ if site.transposed else site.out)
            size = math.prod((*site.lead, site.out, site.in_))
            shape = entry["shape"]
            fits = math.prod(shape) == size and tuple(shape[: len(first)]) == first
            if entry["dtype"] not in _DTYPES or not fits:
                raise MismatchError(
                    f"the base has {name!r} as {entry['dtype']} of {entry['shape']}, the adapter "
                    f"an update for {site.out} x {site.in_}"
                )
        elif name in contents.saved:
            lo, hi = entry["data_offsets"]
            saved = contents.saved[name]
            size = saved.numel() * _DTYPES.get(entry["dtype"], saved.dtype).itemsize
            if entry["shape"] != list(saved.shape) or hi - lo != size:
                raise MismatchError(
                    f"the base has {name!r} as {entry['dtype']} of {entry['shape']}, the adapter "
                    f"as {saved.dtype} of {list(saved.shape)}"
                )


def _changed(
    contents: Contents, name: str, entry: dict[str, Any], data: bytearray, stores: dict[Any, Store]
) -> Tensor:
    """A weight with its update, or what it was trained to in full."""
    if name in contents.saved:
        saved = contents.saved[name]
        return saved.to(_DTYPES.get(entry["dtype"], saved.dtype)).contiguous()
    dtype = _DTYPES[entry["dtype"]]
    site, settings, place = contents.updates[name]
    weight = torch.frombuffer(data, dtype=dtype).view(entry["shape"])
    check_base_weights(contents, {name: weight})
    numbers = contents.numbers[name]
    numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    if (place, dtype) not in stores:
        stores[place, dtype] = contents.banks[place].store(weight.device, dtype)
    a, b = stores[place, dtype].operands(
        settings.rank, site.p, site.q, settings.num_bases * settings.rank
    )
    lam, gamma = numbers[..., : settings.rank], numbers[..., settings.rank :]
    keywords: Any = {"scaling": settings.scaling, "wide": site.wide}
    if site.stack:
        each = zip(site.matrix(weight), lam, gamma, strict=True)
        merged = torch.stack([effective_weight(*one, a, b, **keywords) for one in each])
    else:
        merged = effective_weight(site.matrix(weight), lam, gamma, a, b, **keywords)
    result = merged.view(weight.shape)
    if site.kept is not None:
        result[site.kept] = weight[site.kept]
    return result


def _ranks(contents: Contents, name: str) -> str:
    """The rank of an update in float64, of a stack the lowest, of how many there could be."""
    site, settings, place = contents.updates[name]
    bank, m = contents.banks[place], settings.num_bases * settings.rank
    a, b = bank.a(settings.rank, site.p).double(), bank.b(site.q, m, torch.float64)
    numbers = contents.numbers[name].double().reshape(-1, *contents.numbers[name].shape[-2:])
    ranks = []
    for one in numbers:
        lam, gamma = one[:, : settings.rank], one[:, settings.rank :]
        update = delta_weight(lam, gamma, a, DenseOperator(b), scaling=settings.scaling)
        ranks.append(spectrum(name, torch.linalg.svdvals(update), site.q, certified=False).rank)
    return f"{min(ranks)} of {site.p}"


if __name__ == "__main__":
    sys.exit(main())
