"""Save an adapter to a file and load it: format 1, or 2 with a trained ``A``.

A file has one tensor for each adapted weight, ``Λ`` and ``Γ`` side by side, ``(n, r + p)``, and
its ``A`` if that is trained; the adapter's copies of other parameters and buffers; a few entries of
each base weight, by which another base model is noticed; and a header: the format, the settings of
each update, the recipe and a digest of each bank, and a checksum of everything. The shared bases
are not stored. They are drawn again, which :mod:`randlora.bases.streams` makes reproducible, and
compared with the digest.

Reading executes no code from the file (safetensors, or ``torch.load`` with ``weights_only``). A
model is changed only after everything was checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.streams import FORMAT_VERSION
from randlora.files.adapter_data import FORMATS, SAVED_PREFIX, AdapterData
from randlora.files.collecting import collect
from randlora.files.errors import (
    BaseModelError,
    BasesError,
    CheckpointError,
    FileError,
    MismatchError,
)
from randlora.files.restoring import restore
from randlora.files.storage import _packed, _path, _unpacked, replacing, safetensors
from randlora.model.index import ModelT, active_adapter, adapted_modules, check_adapter_exists, join
from randlora.modules.sharding import mesh_of, write_once
from randlora.modules.weight_update import DEFAULT, check_adapter_name

__all__ = ["adapter_state_dict", "load_adapter", "read", "save_adapter"]
__all__ += ["BaseModelError", "BasesError", "CheckpointError", "FileError", "MismatchError"]


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_state_dict(model: nn.Module, *, adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter, by their names in ``model.state_dict()``, without copying.

    Args:
        model: an adapted model.
        adapter: the name of the adapter; by default the active one.

    Returns:
        ``Λ`` and ``Γ`` of each adapted weight, and the adapter's copies of parameters that it
        trains in full and of moving buffers.

    Raises:
        TypeError: if ``adapter`` is not a string.
        ValueError: if no layer of ``model`` is adapted, or none has this adapter.
    """
    modules = adapted_modules(model)
    adapter = active_adapter(modules) if adapter is None else adapter
    check_adapter_exists(modules, adapter)
    return {
        join(path, key): getattr(module, key).detach()
        for path, module in modules.items()
        for key in module._randlora.keys_of(adapter)
    }


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    trained_besides: bool | None = None,
) -> None:
    """Write an adapter to a file. An existing file is replaced after the new one is complete.

    If FSDP has sharded the model, all processes must call this. The adapter is then gathered, and
    the first process writes the file before the call returns in any of them.

    The file holds everything that training the adapter changed: ``Λ``, ``Γ``, a trained ``A``, the
    ``modules_to_save``, and buffers that moved, such as the statistics of a BatchNorm.

    Args:
        model: an adapted model, merged or not; also one that ``torch.compile`` or
            ``DistributedDataParallel`` has wrapped.
        path: a file name that ends in ``.safetensors`` (which needs the package safetensors) or
            ``.pt``.
        adapter: the name of the adapter; by default the active one.
        dtype: the dtype of ``Λ`` and ``Γ`` in the file, torch.float32 or torch.bfloat16; by
            default the one they have.
        trained_besides: whether parameters that were trained but are not the adapter's, such as a
            bias, are saved as part of it. By default such parameters are an error.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if no layer of ``model`` is adapted or has this adapter, parts of the model have
            different active adapters, parameters were trained beside the adapter, a number is not
            finite, or the path has another ending.
        OSError: if the file cannot be written. A file that was there before is unchanged.
    """
    target = _path(path)
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype!r}")
    if trained_besides not in (None, True, False):
        raise TypeError(f"trained_besides must be True, False or None, got {trained_besides!r}")
    with torch.device("cpu"):  # whatever the default device is
        data = collect(model, adapter, dtype, trained_besides)
    tensors = {name: tensor.contiguous() for name, tensor in data.tensors().items()}
    header = data.header()
    header["checksum"] = _checksum(header, tensors)
    text = json.dumps(header)

    def write() -> None:
        with replacing(target) as file:
            if target.suffix == ".pt":
                torch.save({"randlora": text, **_packed(tensors)}, file)
            else:
                file.write(safetensors().torch.save(tensors, {"randlora": text}))

    write_once(mesh_of(adapter_state_dict(model, adapter=adapter).values()), write)


def read(path: str | os.PathLike[str]) -> AdapterData:
    """Read a file without executing code from it.

    Raises:
        FileError: if it is not a complete file of a known format.
        BasesError: if its bases are of another version.
        OSError: if it cannot be read.
    """
    target = _path(path)
    if target.is_dir():
        raise FileError(f"path must be a file, but {str(target)!r} is a directory")
    target.stat()  # raises its own error if there is no file
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
    if known not in FORMATS:
        readable = " and ".join(map(str, FORMATS))
        raise FileError(f"{str(target)!r} is of format {known!r}; this version reads {readable}")
    try:
        checksum = header.pop("checksum")
        whole = checksum == _checksum(header, tensors)
        data = AdapterData.from_parts(header, tensors) if whole else None
        version = header["bases"]
    except Exception as error:
        raise FileError(
            f"{str(target)!r} has contents that randlora.save_adapter does not write: {error}"
        ) from error
    if data is None:
        raise FileError(f"{str(target)!r} was changed or damaged: its checksum is wrong")
    if version != FORMAT_VERSION:
        raise BasesError(
            f"{str(target)!r} has bases of version {version!r}; this package reads {FORMAT_VERSION}"
        )
    for name, tensor in tensors.items():
        # A module trained in full may have a buffer with infinities, such as a mask.
        if tensor.isnan().any() or not (name.startswith(SAVED_PREFIX) or tensor.isfinite().all()):
            raise FileError(f"{str(target)!r} has values in {name!r} that are not finite")
    return data


def load_adapter(
    model: ModelT, path: str | os.PathLike[str], *, adapter: str = DEFAULT, check_base: bool = True
) -> ModelT:
    """Load an adapter from a file into ``model``. A plain model is adapted for it first.

    An error leaves the model as it was. Parameters trained in full and moved buffers are loaded
    into copies that belong to the adapter; the model's own tensors do not change.

    Args:
        model: a plain model, which gets the adapter of the file; or a model with an adapter of this
            name, which must have the same weights and settings, and gets the numbers of the file;
            or a model with other adapters, to which this one is added.
        path: the path of the file.
        adapter: the name of the adapter in the model, whatever it was called when saved.
        check_base: whether to refuse a model whose base weights differ from those that the adapter
            was trained on by more than the rounding of another dtype.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if the path has another ending.
        FileError: if the file is incomplete, damaged or of another format.
        MismatchError: if model and file differ in adapted weights, sizes or settings.
        BasesError: if the bases are not those that the adapter was trained with.
        BaseModelError: if the base weights are not those that it was trained on.
        OSError: if the file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(check_base, bool):
        raise TypeError(f"check_base must be True or False, got {check_base!r}")
    check_adapter_name(adapter)
    with torch.device("cpu"):  # whatever the default device is
        return restore(model, read(path), adapter, check_base=check_base)
