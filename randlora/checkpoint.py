"""Adapters as files: the numbers that were trained and the recipe of the bases, and nothing else.

A file holds one tensor for each adapted weight, ``Λ`` and ``Γ`` side by side, ``(n, r + p)``, what
``modules_to_save`` were trained to, and a header: the format, the choices made for each weight, the
recipe and a digest of each bank, and a checksum of all of it. The bases are drawn anew, which the
contract of :mod:`randlora.bases` makes reproducible, and compared with their digest. A few entries
of each frozen weight tell another base model.

Reading executes no code (safetensors, or ``torch.load`` with ``weights_only``), and a model is
changed only after everything was checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from randlora.adapted import Adapted, adapted_modules
from randlora.adapters import DEFAULT, Settings, Site, check_adapter_name
from randlora.bases import FORMAT_VERSION, BasisBank
from randlora.handlers import parameter_site
from randlora.injection import SAVED, Place, adapt

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
    "save_adapter",
]

_FORMAT = 1
_SAMPLES = 8  # entries of each frozen weight
_BASE, _SAVED = "randlora.base", "randlora.saved."
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
ModelT = TypeVar("ModelT", bound=nn.Module)


class CheckpointError(ValueError):
    """A file holds no adapter that fits; the model was not changed."""


class FileError(CheckpointError):
    """There is no whole file of a known format at the path."""


class MismatchError(CheckpointError):
    """File and model differ in the weights that are adapted, their sizes or the choices made."""


class BasesError(CheckpointError):
    """The bases that are drawn here, or that the model has, are not those of the file."""


class BaseModelError(CheckpointError):
    """The frozen weights are not those that the adapter was trained on."""


# --- what is in a file ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """One adapter, away from any model. Updates go by the full names of their parameters."""

    updates: dict[str, tuple[Site, Settings, int]]  # the last is the place of the bank
    banks: tuple[BasisBank, ...]
    digests: tuple[str, ...]
    numbers: dict[str, Tensor]  # Λ and Γ, (n, r + p); of a stack (stack, n, r + p)
    base: Tensor  # (updates by name, samples), float32
    saved: dict[str, Tensor]
    modules_to_save: tuple[str, ...]
    version: str

    def sizes(self, place: int) -> list[tuple[int, int, int, int]]:
        """What the updates use of a bank: ``r, p, q, m`` of each."""
        return [
            (settings.rank, site.p, site.q, settings.num_bases * settings.rank)
            for site, settings, bank in self.updates.values()
            if bank == place
        ]

    def check_bases(self) -> None:
        """Draw the bases, and raise :class:`BasesError` unless they are those of the file."""
        for place, (bank, digest) in enumerate(zip(self.banks, self.digests, strict=True)):
            if bank.digest(self.sizes(place)) != digest:
                raise BasesError(f"the bases that {bank!r} gives here are not those of the file")

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the header."""
        saved = {_SAVED + name: tensor for name, tensor in self.saved.items()}
        return {**self.numbers, **saved, _BASE: self.base}

    def header(self) -> dict[str, Any]:
        """The rest, as JSON has it; updates in the order of their names, choices said once."""
        choices: list[dict[str, Any]] = []
        places = []
        for name in sorted(self.updates):
            site, settings, bank = self.updates[name]
            choice = {**asdict(site), **asdict(settings), "bank": bank}
            del choice["parameter"]  # the end of the name
            if choice not in choices:
                choices.append(choice)
            places.append(choices.index(choice))
        return {
            "format": _FORMAT,
            "version": self.version,
            "banks": [
                {"kind": b.kind, "seed": b.seed, "sparsity": b.sparsity, "digest": d}
                for b, d in zip(self.banks, self.digests, strict=True)
            ],
            "bases": FORMAT_VERSION,
            "choices": choices,
            "places": places,
            "modules_to_save": list(self.modules_to_save),
        }


def _contents(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Contents:
    """The other way round; errors of any type where the file was not written here."""
    numbers = {n: t for n, t in tensors.items() if n != _BASE and not n.startswith(_SAVED)}
    updates = {}
    for name, place in zip(sorted(numbers), header["places"], strict=True):
        choice = {"parameter": name.rpartition(".")[2], **header["choices"][place]}
        bank = choice.pop("bank")
        site = Site(**{field.name: choice.pop(field.name) for field in fields(Site)})
        settings = Settings(**choice)
        header["banks"][bank]
        lead, n, width = numbers[name].shape[:-2], *numbers[name].shape[-2:]
        if (tuple(lead), n, width) != (site.lead, settings.num_bases, settings.rank + site.p):
            raise ValueError(f"{name!r} is not of the size that its choices give")
        if Settings.of(
            site, rank=settings.rank, dropout=settings.dropout, num_bases=settings.num_bases
        ) != replace(settings, scaling=1.0, asked_rank=settings.rank):
            raise ValueError(f"{name!r} has choices of wrong types")
        updates[name] = site, settings, bank
    if tensors[_BASE].shape != (len(updates), _SAMPLES):
        raise ValueError("the entries of the base weights are missing")
    return Contents(
        updates=updates,
        banks=tuple(
            BasisBank(b["kind"], seed=b["seed"], sparsity=b["sparsity"]) for b in header["banks"]
        ),
        digests=tuple(bank["digest"] for bank in header["banks"]),
        numbers=numbers,
        base=tensors[_BASE],
        saved={n.removeprefix(_SAVED): t for n, t in tensors.items() if n.startswith(_SAVED)},
        modules_to_save=tuple(header["modules_to_save"]),
        version=header["version"],
    )


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
        ``Λ`` and ``Γ`` of each adapted weight, and the state of ``modules_to_save``.

    Raises:
        TypeError: if ``adapter`` is not a name.
        ValueError: if no layer of ``model`` is adapted, or none under this name.
    """
    modules = adapted_modules(model)
    adapter = _known(modules, adapter)
    state = {
        f"{path}.{name}" if path else name: parameter.detach()
        for path, module in modules.items()
        for update in module._randlora.adapters.get(adapter, {}).values()
        for name, parameter in zip(update.names, update.parameters(module), strict=True)
    }
    return {**state, **_saved_state(model)[1]}


def _known(modules: Mapping[str, Any], adapter: str | None) -> str:
    """``adapter``, or the active one, if the model has it."""
    states = [module._randlora for module in modules.values()]
    adapter = states[0].active if adapter is None else check_adapter_name(adapter)
    known = dict.fromkeys(name for state in states for name in state.adapters)
    if adapter not in known:
        raise ValueError(f"adapter must be one of {', '.join(map(repr, known))}, got {adapter!r}")
    return adapter


def _saved_state(model: nn.Module) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The names of the ``modules_to_save``, and their tensors by full names."""
    names = tuple(name for name, m in model.named_modules() if SAVED in vars(m))
    prefixes = tuple(f"{name}." if name else "" for name in names)
    state = model.state_dict() if names else {}
    return names, {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(prefixes) and isinstance(tensor, Tensor)
    }


def _samples(weight: Tensor | None) -> Tensor:
    """Some entries of a frozen weight, the same in every dtype but for rounding."""
    if weight is None or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        return torch.zeros(_SAMPLES)  # one that cannot be read
    places = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).long()
    return weight.detach().reshape(-1)[places.to(weight.device)].float().cpu()


def _collect(model: nn.Module, adapter: str | None, dtype: torch.dtype | None) -> Contents:
    from randlora import __version__

    modules = adapted_modules(model)
    adapter = _known(modules, adapter)
    updates: dict[str, tuple[Site, Settings, int]] = {}
    banks: list[BasisBank] = []
    numbers, base = {}, {}
    for path, module in modules.items():
        for parameter, update in module._randlora.adapters.get(adapter, {}).items():
            name = f"{path}.{parameter}" if path else parameter
            if update.bank not in banks:
                banks.append(update.bank)
            updates[name] = update.site, update.settings, banks.index(update.bank)
            packed = torch.cat([t.detach().cpu() for t in update.parameters(module)], -1)
            if not packed.isfinite().all():
                raise ValueError(
                    f"model must have finite updates to be saved, but that of {name!r} has values "
                    "that are infinite or no number"
                )
            numbers[name] = packed if dtype is None else packed.to(dtype)
            base[name] = _samples(module._parameters.get(parameter))
    to_save, saved = _saved_state(model)
    contents = Contents(
        updates=updates,
        banks=tuple(banks),
        digests=(),
        numbers=numbers,
        base=torch.stack([base[name] for name in sorted(base)]),
        saved={name: tensor.detach().cpu() for name, tensor in saved.items()},
        modules_to_save=to_save,
        version=__version__,
    )
    digests = tuple(bank.digest(contents.sizes(place)) for place, bank in enumerate(banks))
    return replace(contents, digests=digests)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter to a file, in the place of what was there only once all of it is written.

    Args:
        model: an adapted model, merged or not.
        path: where to; ends in ``.safetensors`` (which needs the package of that name) or ``.pt``.
        adapter: which one; by default the active one.
        dtype: to store the trained numbers in, ``torch.float32`` or ``torch.bfloat16``; by default
            as they are.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if no layer of ``model`` is adapted, or none under this name, a number is not
            finite, or the path has another ending.
        OSError: if the file cannot be written. What was there before is still there.
    """
    target = _path(path)
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype!r}")
    contents = _collect(model, adapter, dtype)
    tensors = {name: tensor.contiguous() for name, tensor in contents.tensors().items()}
    header = contents.header()
    header["checksum"] = _checksum(header, tensors)
    text = json.dumps(header)
    with replacing(target) as file:
        if target.suffix == ".pt":
            torch.save({"randlora": text, **_packed(tensors)}, file)
        else:
            file.write(_safetensors().torch.save(tensors, {"randlora": text}))


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``target`` once all is written and on the disk."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "a .safetensors file needs the package safetensors (randlora[safetensors]); a .pt file "
            "does not"
        ) from error
    return safetensors


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
            with _safetensors().safe_open(str(target), "pt") as file:
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
    if known != _FORMAT:
        raise FileError(f"{str(target)!r} is of format {known!r}; this version reads {_FORMAT}")
    try:
        checksum = header.pop("checksum")
        whole = checksum == _checksum(header, tensors)
        contents = _contents(header, tensors) if whole else None
    except Exception as error:
        raise FileError(f"{str(target)!r} has contents of another making: {error}") from error
    if contents is None:
        raise FileError(f"{str(target)!r} was changed or damaged: its checksum is another")
    if header["bases"] != FORMAT_VERSION:
        raise BasesError(
            f"{str(target)!r} has bases of version {header['bases']}; this is {FORMAT_VERSION}"
        )
    for name, tensor in {**contents.numbers, **contents.saved}.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
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

    Either all is loaded, or there is an error and the model is what it was.

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
    contents = read(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = {name: _target(modules, name, site) for name, (site, *_) in contents.updates.items()}
    present = {
        (module, parameter): update
        for module in model.modules()
        if isinstance(module, Adapted)
        for parameter, update in module._randlora.adapters.get(adapter, {}).items()
    }
    if present:
        _check_same(contents, targets, present)
    saved = _check_saved(contents, model, modules)
    if check_base:
        _check_base(contents, targets)
    contents.check_bases()

    if not present:
        order = {module: list(module._parameters) for module in model.modules()}
        ranks = {module: place for place, module in enumerate(order)}

        def position(name: str) -> tuple[int, int]:  # in the order that `inject` has
            module, parameter = targets[name].module, targets[name].site.parameter
            inner = order[module].index(parameter) if parameter in order[module] else 0
            return ranks[module], inner

        updates = {
            targets[name]: (contents.updates[name][1], contents.banks[contents.updates[name][2]])
            for name in sorted(contents.updates, key=position)
        }
        adapt(model, adapter, updates, [modules[name] for name in contents.modules_to_save])
    with torch.no_grad():
        for name, numbers in contents.numbers.items():
            module: Any = targets[name].module
            update = module._randlora.adapters[adapter][targets[name].site.parameter]
            lam, gamma = update.parameters(module)
            rank = update.settings.rank
            lam.copy_(numbers[..., :rank])
            gamma.copy_(numbers[..., rank:])
        for tensor, value in saved:
            tensor.copy_(value)
    return model


def _target(modules: Mapping[str, nn.Module], name: str, site: Site) -> Place:
    path, _, parameter = name.rpartition(".")
    if path not in modules:
        raise MismatchError(f"the file has an update for {name!r}, but the model has no {path!r}")
    module = modules[path]
    found = parameter_site(module, parameter)
    if isinstance(found, str):
        raise MismatchError(f"the file has an update for {name!r}, but {found}")
    if found != site:
        raise MismatchError(
            f"the file has an update for {name!r} as {_size(site)}, but the model has it as "
            f"{_size(found)}"
        )
    return Place(module, site)


def _size(site: Site) -> str:
    size = " x ".join(map(str, (*site.lead, site.out, site.in_)))
    return size + ", transposed" * site.transposed + ", not to be read" * site.opaque


def _check_same(contents: Contents, targets: Mapping[str, Place], present: Any) -> None:
    """Raise unless an adapter that is there is that of the file."""
    wanted = {(module, site.parameter): name for name, (module, site) in targets.items()}
    missing = [name for place, name in wanted.items() if place not in present]
    if missing:
        raise MismatchError(f"the model's adapter has no update for {', '.join(missing)}")
    extra = [
        f"{parameter} of a {type(module).__name__}"
        for module, parameter in present
        if (module, parameter) not in wanted
    ]
    if extra:
        raise MismatchError(f"the file has no update for {', '.join(extra)}, which the model has")
    for place, name in wanted.items():
        _, settings, bank = contents.updates[name]
        ours, theirs = present[place].settings, replace(settings, asked_rank=0)
        if replace(ours, asked_rank=0) != theirs:
            raise MismatchError(f"the update of {name!r} is {settings} in the file, here {ours}")
        if not present[place].bank.same_recipe(contents.banks[bank]):
            raise BasesError(
                f"the update of {name!r} uses {contents.banks[bank]!r} in the file, here "
                f"{present[place].bank!r}"
            )


def _check_saved(
    contents: Contents, model: nn.Module, modules: Mapping[str, nn.Module]
) -> list[tuple[Tensor, Tensor]]:
    """What is to be copied into the ``modules_to_save``, checked."""
    state = model.state_dict() if contents.modules_to_save else {}
    for name in contents.modules_to_save:
        if name not in modules:
            raise MismatchError(f"the file has a module {name!r}, trained in full; the model none")
        prefix = f"{name}." if name else ""
        lacking = [n for n in state if n.startswith(prefix) and n not in contents.saved]
        if lacking:
            raise MismatchError(f"the file has nothing for {', '.join(lacking)}")
    pairs = []
    for name, value in contents.saved.items():
        if name not in state or state[name].shape != value.shape:
            has = tuple(state[name].shape) if name in state else "nothing"
            raise MismatchError(
                f"the file has {name!r} of shape {tuple(value.shape)}, the model {has}"
            )
        pairs.append((state[name], value))
    return pairs


def _check_base(contents: Contents, targets: Mapping[str, Place]) -> None:
    for name, theirs in zip(sorted(contents.updates), contents.base, strict=True):
        module, site = targets[name]
        ours = _samples(module._parameters.get(site.parameter))
        # Entries rounded to bfloat16 differ by 2**-8, small ones in float16 by 2**-24.
        if not torch.allclose(ours, theirs, rtol=2**-7, atol=2**-23):
            raise BaseModelError(
                f"the adapter was trained on another base model: {name!r} has other values "
                "(check_base=False loads it nevertheless)"
            )
