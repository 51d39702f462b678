"""Adapters as files: the numbers that were trained and the recipe of the bases, and nothing else.

A file holds one tensor for each adapted weight, ``Λ`` and ``Γ`` side by side, ``(n, r + p)``, what
``modules_to_save`` were trained to, and a header: the format, the choices made for each weight, the
recipe and a digest of each bank, and a checksum of all of it. The bases are drawn anew, which the
contract of :mod:`randlora.streams` makes reproducible, and compared with their digest. A few
entries of each frozen weight tell another base model.

Reading executes no code (safetensors, or ``torch.load`` with ``weights_only``), and a model is
changed only after everything was checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from randlora._checks import as_positive_int, as_real
from randlora.adapted import adapted_modules
from randlora.adapters import DEFAULT, Settings, Site, check_adapter_name
from randlora.bases import BasisBank
from randlora.contents import (
    BASE,
    BASES,
    FORMAT,
    RESERVED,
    SAMPLES,
    SAVED_PREFIX,
    BaseModelError,
    BasesError,
    CheckpointError,
    Contents,
    FileError,
    MismatchError,
    collect,
    known_adapter,
    restore,
)
from randlora.peft_bases import PEFT_KINDS, PeftBank
from randlora.streams import FORMAT_VERSION

__all__ = [
    "BaseModelError",
    "BasesError",
    "CheckpointError",
    "Contents",
    "FileError",
    "MismatchError",
    "adapter_state_dict",
    "load_adapter",
    "read",
    "replacing",
    "safetensors",
    "save_adapter",
]

_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
ModelT = TypeVar("ModelT", bound=nn.Module)


def _contents(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Contents:
    """The other way round; errors of any type where the file was not written here."""
    saved = {
        n.removeprefix(SAVED_PREFIX): t for n, t in tensors.items() if n.startswith(SAVED_PREFIX)
    }
    banks = [_bank(recipe, tensors, place) for place, recipe in enumerate(header["banks"])]
    given = [
        f"{BASES}{place}.{base}"
        for place, bank in enumerate(banks)
        if isinstance(bank, PeftBank) and bank.entries is not None
        for base in "ab"
    ]
    known = {BASE, *given, *(SAVED_PREFIX + name for name in saved)}
    numbers = {name: tensor for name, tensor in tensors.items() if name not in known}
    updates = {}
    for name, place in zip(sorted(numbers), header["places"], strict=True):
        choice = {"parameter": name.rpartition(".")[2], **_at(header["choices"], place)}
        bank = choice.pop("bank")
        site = Site(**{field.name: choice.pop(field.name) for field in fields(Site)})
        settings = Settings(**choice)
        lead, n, width = numbers[name].shape[:-2], *numbers[name].shape[-2:]
        if (tuple(lead), n, width) != (site.lead, settings.num_bases, settings.rank + site.p):
            raise ValueError(f"{name!r} is not of the size that its choices give")
        if not numbers[name].is_floating_point() or name.startswith(RESERVED[1:]):
            raise ValueError(f"{name!r} is no update")
        checked = Settings.of(
            site,
            rank=settings.rank,
            dropout=settings.dropout,
            num_bases=settings.num_bases,
            any_rank=not _at(banks, bank).lowers_rank,
        )
        checked = replace(
            checked,
            scaling=as_real("scaling", settings.scaling),
            asked_rank=as_positive_int("asked_rank", settings.asked_rank),
        )
        if checked != settings:
            raise ValueError(f"{name!r} has choices of wrong types")
        updates[name] = site, settings, bank
    if tensors[BASE].shape != (len(updates), SAMPLES):
        raise ValueError("the entries of the base weights are missing")
    return Contents(
        updates=updates,
        banks=tuple(banks),
        digests=tuple(_texts([bank["digest"] for bank in header["banks"]])),
        numbers=numbers,
        base=tensors[BASE],
        saved=saved,
        modules_to_save=tuple(_texts(header["modules_to_save"])),
        version=header["version"],
    )


def _at(items: list[Any], place: Any) -> Any:
    """The item at a place, counted from the front only."""
    if not isinstance(place, int) or not 0 <= place < len(items):
        raise ValueError(f"there is no place {place!r} among {len(items)}")
    return items[place]


def _texts(items: list[Any]) -> list[str]:
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{items!r} must be names")
    return items


def _bank(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor], place: int) -> BasisBank:
    arguments = {name: value for name, value in recipe.items() if name != "digest"}
    kind = arguments.pop("kind")
    if kind not in PEFT_KINDS:
        return BasisBank(kind, **arguments)
    names = f"{BASES}{place}.a", f"{BASES}{place}.b"
    entries = (tensors[names[0]], tensors[names[1]]) if names[0] in tensors else None
    return PeftBank(kind, **arguments, entries=entries)


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- from a model --------------------------------------------------------------------------------


def adapter_state_dict(model: nn.Module, *, adapter: str | None = None) -> dict[str, Tensor]:
    """What was trained, by the names it has in ``model.state_dict()``, without copying.

    Args:
        model: an adapted model.
        adapter: of which adapter; by default the active one.

    Returns:
        ``Λ`` and ``Γ`` of each adapted weight, and the adapter's copies of what it trains in full
        and of buffers that move.

    Raises:
        TypeError: if ``adapter`` is not a name.
        ValueError: if no layer of ``model`` is adapted, or none under this name.
    """
    modules = adapted_modules(model)
    adapter = known_adapter(modules, adapter)
    return {
        f"{path}.{key}" if path else key: getattr(module, key).detach()
        for path, module in modules.items()
        for key in module._randlora.keys(adapter)
    }


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    trained_besides: bool | None = None,
) -> None:
    """Write an adapter to a file, in the place of what was there only once all of it is written.

    It holds all that the training of the adapter changed: ``Λ``, ``Γ``, the ``modules_to_save``,
    and buffers that are not what they were, such as the statistics of a BatchNorm.

    Args:
        model: an adapted model, merged or not, or what ``torch.compile`` or
            ``DistributedDataParallel`` made of one.
        path: where to; ends in ``.safetensors`` (which needs the package of that name) or ``.pt``.
        adapter: which one; by default the active one.
        dtype: to store the trained numbers in, ``torch.float32`` or ``torch.bfloat16``; by default
            as they are.
        trained_besides: whether parameters that require gradients and are not the adapter's, a bias
            say, are saved as a part of it; by default they are an error.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if no layer of ``model`` is adapted, or none under this name, parts of it have
            different active adapters, something else is trained, a number is not finite, or the
            path has another ending.
        OSError: if the file cannot be written. What was there before is still there.
    """
    target = _path(path)
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype!r}")
    if trained_besides not in (None, True, False):
        raise TypeError(f"trained_besides must be True, False or None, got {trained_besides!r}")
    with torch.device("cpu"):  # whatever the default device is
        contents = collect(model, adapter, dtype, trained_besides)
    tensors = {name: tensor.contiguous() for name, tensor in contents.tensors().items()}
    header = contents.header()
    header["checksum"] = _checksum(header, tensors)
    text = json.dumps(header)
    with replacing(target) as file:
        if target.suffix == ".pt":
            torch.save({"randlora": text, **_packed(tensors)}, file)
        else:
            file.write(safetensors().torch.save(tensors, {"randlora": text}))


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``target`` once all is written and on the disk."""
    target = target.resolve()  # what a link leads to, not the link
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # its name, too
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """All tensors as one, of bytes: hundreds would take a hundred bytes and more each."""
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    table = [[name, str(t.dtype), list(t.shape)] for name, t in tensors.items()]
    return {"table": table, "bytes": torch.cat(flat)}


def _unpacked(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors, start = {}, 0
    for name, kind, shape in loaded["table"]:
        dtype = _DTYPES[kind]
        end = start + math.prod(shape) * dtype.itemsize
        # A copy, because a view of another dtype must start at a multiple of its size.
        tensors[name] = loaded["bytes"][start:end].clone().view(dtype).reshape(shape)
        start = end
    if start != len(loaded["bytes"]):
        raise ValueError("there are bytes of no tensor")
    return tensors


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a path, got {path!r} of type {type(path).__name__}")
    target = Path(path)
    if target.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"path must end in .safetensors or .pt, got {str(path)!r}")
    return target


def safetensors() -> Any:
    """The package of that name, with a word where it is lacking."""
    try:
        import safetensors as package
        import safetensors.torch as _  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs the package safetensors (randlora[safetensors]); a .pt file "
            "does not"
        ) from error
    return package


# --- to a model ----------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a file, executing nothing of it, and check that it is whole.

    Raises:
        FileError: if it is not a whole file of a known format.
        OSError: if it cannot be read.
    """
    target = _path(path)
    if target.is_dir():
        raise FileError(f"path must be a file, but {str(target)!r} is a directory")
    target.stat()  # its own error where there is nothing
    try:
        if target.suffix == ".pt":
            with open(target, "rb") as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
            text, tensors = loaded["randlora"], _unpacked(loaded)
        else:
            with safetensors().safe_open(str(target), "pt") as file:
                text = file.metadata()["randlora"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(text)
        known = header["format"]
    except ImportError:
        raise
    except Exception as error:
        raise FileError(
            f"{str(target)!r} is not a whole file of randlora.save_adapter: {error}"
        ) from error
    if known != FORMAT:
        raise FileError(f"{str(target)!r} is of format {known!r}; this version reads {FORMAT}")
    try:
        checksum = header.pop("checksum")
        whole = checksum == _checksum(header, tensors)
        contents = _contents(header, tensors) if whole else None
        version = header["bases"]
    except Exception as error:
        raise FileError(f"{str(target)!r} has contents of another making: {error}") from error
    if contents is None:
        raise FileError(f"{str(target)!r} was changed or damaged: its checksum is another")
    if version != FORMAT_VERSION:
        raise BasesError(
            f"{str(target)!r} has bases of version {version}; this is {FORMAT_VERSION}"
        )
    for name, tensor in tensors.items():
        # What is trained in full may have a buffer with infinities, a mask.
        if tensor.isnan().any() or not (name.startswith(SAVED_PREFIX) or tensor.isfinite().all()):
            raise FileError(f"{str(target)!r} has values in {name!r} that are not finite")
    return contents


def load_adapter(
    model: ModelT,
    path: str | os.PathLike[str],
    *,
    adapter: str = DEFAULT,
    check_base: bool = True,
) -> ModelT:
    """Load an adapter from a file: adapt ``model`` as the file says, unless it is so already.

    Either all is loaded, or there is an error and the model is what it was. What the file has of
    tensors that were trained in full, or moved, goes into copies of this adapter.

    Args:
        model: a plain model; or one that has an adapter of this name, which must be the file's in
            all but its numbers; or one with others, to which this one is added.
        path: of the file.
        adapter: the name it is to have, whichever it had.
        check_base: whether to refuse a model whose frozen weights are others than those that the
            adapter was trained on, beyond the rounding of another dtype.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the path has another ending.
        FileError: if the file is not whole, or of another format.
        MismatchError: if model and file differ in layers, sizes or choices.
        BasesError: if the bases are not those that the adapter was trained with.
        BaseModelError: if the frozen weights are not.
        OSError: if the file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(check_base, bool):
        raise TypeError(f"check_base must be True or False, got {check_base!r}")
    check_adapter_name(adapter)
    with torch.device("cpu"):  # whatever the default device is
        return restore(model, read(path), adapter, check_base=check_base)
