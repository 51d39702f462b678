"""Files: atomic writing, tensors packed for a ``.pt`` file, and the package safetensors."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Yield a file to write. It replaces ``target`` when it is complete, if there is no error."""
    target = target.resolve()  # replace the file that a link leads to, not the link
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            if target.exists():
                shutil.copymode(target, beside)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name has to be on the disk too
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """All tensors as one tensor of bytes, because ``torch.save`` adds some 100 bytes to each."""
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    table = [[name, str(t.dtype), list(t.shape)] for name, t in tensors.items()]
    return {"table": table, "bytes": torch.cat(flat)}


def _unpacked(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors, start = {}, 0
    for name, kind, shape in loaded["table"]:
        dtype = _DTYPES[kind]
        end = start + math.prod(shape) * dtype.itemsize
        # A copy, because a view as another dtype must start at a multiple of its item size.
        tensors[name] = loaded["bytes"][start:end].clone().view(dtype).reshape(shape)
        start = end
    if start != len(loaded["bytes"]):
        raise ValueError(f"the tensors need {start} bytes, got {len(loaded['bytes'])}")
    return tensors


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a path, got {path!r} of type {type(path).__name__}")
    target = Path(path)
    if target.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"path must end in .safetensors or .pt, got {str(path)!r}")
    return target


def safetensors() -> Any:
    """The package safetensors; an ``ImportError`` says how to install it."""
    try:
        import safetensors as package
        import safetensors.torch as _  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs the package safetensors (randlora[safetensors]); a .pt file "
            "does not"
        ) from error
    return package


_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
