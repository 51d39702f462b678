"""The commands of ``python -m randlora``: inspect and verify adapter files, merge adapters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from randlora.core.operators import DenseOperator
from randlora.files.adapter_data import AdapterData
from randlora.files.checkpoint import read
from randlora.files.errors import CheckpointError
from randlora.files.merge_files import merge
from randlora.model.reports import spectrum, table
from randlora.modules.weight_update import factors_of, update_matrix

_MERGE = """\
Write a model with an adapter merged into its weights. Each weight is rounded
once, to its own dtype. Everything is checked before anything is written.
Weights are read and written one at a time.

BASE and OUT are .safetensors files, or folders as save_pretrained writes them:
with model.safetensors, or with model.safetensors.index.json and its shards.
A folder OUT must be new, empty, or BASE itself. The other files of BASE are
copied, but not its sub-folders, hidden files, and files that may hold unmerged
weights (.bin, .gguf, ...). These are listed on stderr. If OUT is BASE, a crash
while the new files replace the old ones can leave some merged and others not.

Tied weights (of an embedding and the head, say) are often one tensor in BASE.
If the adapter changes that tensor, the merged model has the change in both; if
it changes the one that BASE lacks, that is an error.

example:
  python -m randlora merge adapter.safetensors model-folder merged-folder"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. If a file is wrong, print the error to stderr and return 1."""
    parser = argparse.ArgumentParser(prog="python -m randlora", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., None], summary: str, text: str) -> Any:
        kind = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=summary, description=text, formatter_class=kind)
        command.add_argument("path", metavar="ADAPTER", help="a file of randlora.save_adapter")
        command.set_defaults(run=run)
        return command.add_argument

    summary = "print what an adapter file holds, weight by weight"
    example = "python -m randlora inspect adapter.safetensors --ranks"
    argument = add("inspect", inspect, summary, f"{summary}\n\nexample:\n  {example}")
    argument("--ranks", action="store_true", help="compute the ranks of the updates")
    summary = "draw the bases again and compare their digests with those in the file"
    example = "python -m randlora verify adapter.safetensors"
    add("verify", verify, summary, f"{summary}\n\nexample:\n  {example}")
    argument = add("merge", merge, "write a model with an adapter merged into its weights", _MERGE)
    argument("base", metavar="BASE", help="the model: a .safetensors file or a folder")
    argument("out", metavar="OUT", help="what to write: a file or a folder, as BASE is")
    other_base = "accept weights that the adapter was not trained on"
    argument("--any-base", dest="check_base", action="store_false", help=other_base)
    given = vars(parser.parse_args(arguments))
    try:
        given.pop("run")(**given)
    except (CheckpointError, ImportError, OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def inspect(path: str, *, ranks: bool = False) -> None:
    """Print the header of an adapter file, and a line for each update."""
    data = read(path)
    rows = []
    for name, (spec, settings, place) in data.updates.items():
        rows.append(
            (
                name,
                str(spec),
                str(settings.rank),
                str(settings.num_bases),
                f"{settings.scaling:g}",
                f"{sum(t.numel() for t in data.trained(name)):,}" + " with A" * settings.train_a,
                str(place),
                *([_ranks(data, name)] if ranks else []),
            )
        )
    header = ("weight", "out x in", "rank", "bases", "scaling", "trained", "bank")
    print(f"written by randlora {data.version}")
    print(table((*header, "rank of update") if ranks else header, rows))
    for place, (bank, digest) in enumerate(zip(data.banks, data.digests, strict=True)):
        print(f"bank {place}: {bank!r}, digest {str(digest)[:16]}…")
    tops = tuple(f"{name}." for name in data.modules_to_save)
    in_full = {name for name in data.saved if name.startswith(tops)}

    def count(names: Iterable[str]) -> int:
        return sum(data.saved[name].numel() for name in names)

    if data.modules_to_save:
        print(f"trained in full: {', '.join(data.modules_to_save)}: {count(in_full):,} numbers")
    if others := data.saved.keys() - in_full:
        print(f"other saved tensors: {', '.join(sorted(others))}: {count(others):,} numbers")


def verify(path: str) -> None:
    """Draw the bases again. Raises an error unless the adapter was trained with the same ones."""
    data = read(path)
    data.check_bases()
    banks = ", ".join(map(repr, data.banks))
    print(f"{len(data.updates)} updates; {banks}: the bases are those of the file")


def _ranks(data: AdapterData, name: str) -> str:
    """The rank of an update in float64 (for a stack, the lowest) and the largest possible one."""
    spec, settings, place = data.updates[name]
    bank, (r, p, q, m) = data.banks[place], settings.sizes(spec)
    trained = [tensor.double() for tensor in data.trained(name)]
    operands = bank.a(r, p).double(), DenseOperator(bank.b(q, m, torch.float64))
    delta = update_matrix(spec, settings, *factors_of(trained, operands)).reshape(
        -1, spec.out, spec.in_
    )
    spectra = (spectrum(name, one, spec.q, certified=False) for one in torch.linalg.svdvals(delta))
    return f"{min(one.rank for one in spectra)} of {spec.p}"
