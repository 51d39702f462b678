"""Merge an adapter into the weights of a model in files, without loading the model."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from randlora.bases.store import Store
from randlora.files.adapter_data import AdapterData, check_base_weights
from randlora.files.checkpoint import read
from randlora.files.errors import FileError, MismatchError
from randlora.files.storage import replacing, safetensors
from randlora.model.reports import progress
from randlora.modules.weight_update import add_update, factors_of

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"  # of a Hugging Face folder

# Files that may hold the weights too, unmerged, and the indexes of such files.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".npy", ".npz"),
    *(".gguf", ".onnx", ".onnx_data", ".ot", ".tflite", ".bak", ".index.json"),
)

_CHUNK = 2**24  # bytes that are copied at a time


def merge(path: str, base: str, out: str, *, check_base: bool = True) -> None:
    """Write the model ``base`` with the adapter at ``path`` merged into its weights.

    ``base`` is a ``.safetensors`` file, or a folder as ``save_pretrained`` writes it. ``out`` is of
    the same sort. After an error, all files are what they were. The finished shards of a folder are
    renamed one after another: if ``out`` is ``base``, a crash or a failed rename between two
    renames can leave some shards merged and others not.
    """
    data = read(path)
    if not check_base:
        data = replace(data, base=None)
    source, target = Path(base), Path(out)
    where = _tensors(source)
    files = list(dict.fromkeys(where.values()))
    in_place = _check_out(source, target, files)
    _check(data, where)
    for place, bank in enumerate(data.banks):
        for sizes in data.sizes(place):
            bank.reserve(*sizes)
    data.check_bases()
    others = sorted(set(source.iterdir()).difference(files)) if source.is_dir() else []
    index = source / _INDEX if source / _FILE not in files else None  # also the index of the result
    plain = [f for f in others if f.is_file() and not f.name.startswith(".")]
    copied = [f for f in plain if f == index or not f.name.endswith(_WEIGHTS)]
    stores: dict[Any, Store] = {}  # held, so that bases are drawn once
    names = [target / file.name if source.is_dir() else target for file in files]
    with ExitStack() as stack:
        if source.is_dir() and not in_place:
            stack.enter_context(_folder(target, copied, names))
        step = stack.enter_context(progress(len(where)))
        # The new files replace old ones only when all are complete.
        opened = [stack.enter_context(replacing(name)) for name in names]
        for file, merged in zip(files, opened, strict=True):
            _write(data, file, merged, stores, step)
    if left_out := [file.name for file in others if file not in copied]:
        print(f"not {'merged' if in_place else 'copied'}: {', '.join(left_out)}", file=sys.stderr)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A .safetensors file, checked and read by the library, which maps tensors into memory."""
    library = safetensors()
    try:
        with library.safe_open(str(file), "pt") as tensors:
            yield tensors
    except library.SafetensorError as error:
        raise FileError(f"{str(file)!r} is not a complete .safetensors file: {error}") from error


def _tensors(base: Path) -> dict[str, Path]:
    """The file of each tensor of a model."""
    base.stat()  # raises its own error if there is nothing
    single, index = base / _FILE, base / _INDEX
    indexed: dict[str, Path] | None = None
    if base.is_file():
        files = [base]
    elif single.is_file():  # comes before an index, as in from_pretrained
        files = [single]
    elif index.is_file():
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
            indexed = {name: base / file for name, file in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{str(index)!r} is not an index of weights: {error!r}") from error
        files = list(dict.fromkeys(indexed.values()))
        if outside := [f.name for f in files if f.parent != base or f.suffix != ".safetensors"]:
            raise FileError(f"{str(index)!r} names {outside[0]!r}, no .safetensors file beside it")
    else:
        raise ValueError(
            f"base must be a .safetensors file, or a folder with {_FILE} or {_INDEX}, got "
            f"{str(base)!r}"
        )
    where: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            names = tensors.keys()
        if twice := where.keys() & names:
            raise FileError(f"{str(file)!r} has {min(twice)!r}, as {where[min(twice)].name!r} has")
        where |= dict.fromkeys(names, file)
    if indexed is not None and where != indexed:
        for name in sorted(where | indexed):
            said, found = (m.get(name, Path("no file")).name for m in (indexed, where))
            if said != found:
                raise FileError(f"{str(index)!r} has {name!r} in {said}, but it is in {found}")
    return where


def _check_out(base: Path, out: Path, files: Iterable[Path]) -> bool:
    """Raise an error if the result cannot be written to ``out``. Returns whether it is ``base``."""
    out.resolve().parent.stat()  # raises its own error if there is nothing
    in_place = out.exists() and out.samefile(base)
    if base.is_file() and (out.suffix != ".safetensors" or out.is_dir()):
        raise ValueError(f"out must be a .safetensors file, as base is, got {str(out)!r}")
    if base.is_dir() and (out.suffix == ".safetensors" or out.is_file()):
        raise ValueError(f"out must be a folder, as base is, got {str(out)!r}")
    if base.is_dir() and not in_place and out.exists() and any(out.iterdir()):
        raise ValueError(
            f"out must be a new or empty folder, or base itself, but {str(out)!r} has other files"
        )
    links = [str(file) for file in files if file.is_symlink()]
    if in_place and links:
        raise ValueError(
            f"out must not be base if that has links, but {links[0]!r} is one: what it leads to "
            "may be shared, as in the cache of Hugging Face"
        )
    return in_place


def _check(data: AdapterData, where: Mapping[str, Path]) -> None:
    """Raise an error unless all that the adapter changes is in the base, and fits."""
    for name, (spec, *_) in data.updates.items():
        if spec.unreadable:
            raise MismatchError(f"{name!r} is quantised or unreadable: nothing can be added to it")
    for name in [*data.updates, *data.saved]:
        if name in where:
            continue
        saved = data.saved.get(name)
        tied = saved is not None and any(
            other in where and torch.equal(saved, value) for other, value in data.saved.items()
        )
        if not tied:
            similar = ", ".join(map(repr, get_close_matches(name, where, n=3))) or "none"
            raise MismatchError(
                f"the base has no {name!r}, which the adapter "
                f"{'updates' if saved is None else 'trained in full'}; similar names in the base: "
                f"{similar}"
            )
    for file in dict.fromkeys(where.values()):
        with _opened(file) as tensors:
            for name in tensors.offset_keys():
                if name in data.updates or name in data.saved:
                    _check_fit(data, name, tensors.get_tensor(name))


def _check_fit(data: AdapterData, name: str, weight: Tensor) -> None:
    floating = weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if name in data.updates:
        spec = data.updates[name][0]
        first = (*spec.stack_shape, spec.in_ if spec.transposed else spec.out)
        size = math.prod((*spec.stack_shape, spec.out, spec.in_))  # the rest is flattened
        fits = floating and weight.numel() == size and weight.shape[: len(first)] == first
        needs = f"an update for {spec}"
    else:
        saved = data.saved[name]
        kept = weight.dtype == saved.dtype or (floating and saved.is_floating_point())
        fits = kept and weight.shape == saved.shape
        needs = f"{saved.dtype} of {list(saved.shape)}"
    if not fits:
        raise MismatchError(
            f"the base has {name!r} as {weight.dtype} of {list(weight.shape)}, the adapter {needs}"
        )
    check_base_weights(data, {name: weight})


@contextmanager
def _folder(target: Path, copied: Iterable[Path], merged: Iterable[Path]) -> Iterator[None]:
    """Create a folder with copies of files. If the code within raises, remove what was made."""
    copies, created = [target / file.name for file in copied], not target.exists()
    if created:
        target.mkdir()
    try:
        for file, to in zip(copied, copies, strict=True):
            shutil.copy(file, to)
        yield
    except BaseException:
        for file in (*copies, *merged):
            file.unlink(missing_ok=True)
        if created:
            with suppress(OSError):  # another program may have put a file there
                target.rmdir()
        raise


def _write(
    data: AdapterData,
    source: Path,
    target: BinaryIO,
    stores: dict[Any, Store],
    step: Callable[[], None],
) -> None:
    """Copy a .safetensors file byte by byte, except for what the adapter changes."""
    with open(source, "rb") as file, _opened(source) as tensors:  # opening it checks the header
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        target.write(size + header)
        entries = json.loads(header)
        for name in tensors.offset_keys():
            begin, end = entries[name]["data_offsets"]
            if name in data.updates or name in data.saved:
                changed = _changed(data, name, tensors.get_tensor(name), stores)
                target.write(changed.reshape(-1).view(torch.uint8).numpy().data)
                del changed  # before the next is computed
            else:
                file.seek(len(size) + len(header) + begin)
                for at in range(begin, end, _CHUNK):
                    target.write(file.read(min(_CHUNK, end - at)))
            step()
    target.flush()
    os.fsync(target.fileno())  # a full disk is an error before any file is replaced


def _changed(data: AdapterData, name: str, weight: Tensor, stores: dict[Any, Store]) -> Tensor:
    """A weight with its update, or its trained value if it was trained in full."""
    if name in data.saved:
        return data.saved[name].to(weight.dtype).contiguous()
    spec, settings, place = data.updates[name]
    trained = data.trained(name)
    wide = torch.promote_types(trained[0].dtype, torch.float32)
    key = place, weight.dtype
    if key not in stores:
        stores[key] = data.banks[place].store(weight.device, weight.dtype)
    operands = stores[key].operands(*settings.sizes(spec))
    factors = factors_of([tensor.to(wide) for tensor in trained], operands)
    return add_update(weight, spec, settings, *factors)
