"""One adapter away from any model: what it holds, taken from a model, and put into one.

Whatever file it comes from, a model is changed only after everything was checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from randlora.adapted import (
    Adapted,
    active_adapter,
    adapted_modules,
    fold_again,
    is_same,
    own_names,
    set_copy,
    state_of,
    tensor_of,
)
from randlora.adapters import Settings, Site, check_adapter_name
from randlora.bases import BasisBank
from randlora.handlers import parameter_site
from randlora.injection import adapt, add_copies, untrainable
from randlora.patterns import modules_by_name
from randlora.peft_bases import PeftBank
from randlora.streams import FORMAT_VERSION
from randlora.targets import BESIDES, Place, device_of, moving_buffers, tensor_names

__all__ = [
    "BASE",
    "BASES",
    "FORMAT",
    "RESERVED",
    "SAMPLES",
    "SAVED_PREFIX",
    "BaseModelError",
    "BasesError",
    "CheckpointError",
    "Contents",
    "FileError",
    "MismatchError",
    "check_base_weights",
    "collect",
    "known_adapter",
    "restore",
]

FORMAT = 1
SAMPLES = 8  # entries of each frozen weight
BASE, BASES, SAVED_PREFIX = RESERVED = "randlora.base", "randlora.bases.", "randlora.saved."
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


@dataclass(frozen=True)
class Contents:
    """One adapter, away from any model. Updates go by the full names of their parameters."""

    updates: dict[str, tuple[Site, Settings, int]]  # the last is the place of the bank
    banks: tuple[BasisBank, ...]
    digests: tuple[str | None, ...]  # None where it is not known
    numbers: dict[str, Tensor]  # Λ and Γ, (n, r + p); of a stack (stack, n, r + p)
    base: Tensor | None  # (updates by name, samples), float32; None where it is not known
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
            if digest is None:
                continue
            try:
                found = bank.digest(self.sizes(place))
            except (RuntimeError, MemoryError) as error:  # larger than any that were used
                raise BasesError(f"{bank!r} cannot be drawn here: {error}") from error
            if found != digest:
                raise BasesError(f"the bases that {bank!r} gives here are not those of the file")

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the header."""
        saved = {SAVED_PREFIX + name: tensor for name, tensor in self.saved.items()}
        bases = {
            f"{BASES}{place}.{name}": entries
            for place, bank in enumerate(self.banks)
            if isinstance(bank, PeftBank) and bank.entries is not None
            for name, entries in zip("ab", bank.entries, strict=True)
        }
        base = {} if self.base is None else {BASE: self.base}
        return {**self.numbers, **saved, **bases, **base}

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
            "format": FORMAT,
            "version": self.version,
            "banks": [
                {**b.recipe, "digest": d} for b, d in zip(self.banks, self.digests, strict=True)
            ],
            "bases": FORMAT_VERSION,
            "choices": choices,
            "places": places,
            "modules_to_save": list(self.modules_to_save),
        }


# --- from a model --------------------------------------------------------------------------------


def known_adapter(modules: Mapping[str, Any], adapter: str | None) -> str:
    """``adapter``, or the active one, if the model has it."""
    adapter = active_adapter(modules) if adapter is None else check_adapter_name(adapter)
    known = dict.fromkeys(name for m in modules.values() for name in m._randlora.names)
    if adapter not in known:
        raise ValueError(f"adapter must be one of {', '.join(map(repr, known))}, got {adapter!r}")
    return adapter


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _saved(modules: Mapping[str, Any], adapter: str) -> dict[str, Tensor]:
    """What an adapter has copies of, by the names of the originals: buffers where they moved."""
    saved: dict[str, Tensor] = {}
    for path, module in modules.items():
        state = module._randlora
        for name, key in state.copies.get(adapter, {}).items():
            copied = tensor_of(module, key)
            if copied is None:
                raise ValueError(
                    f"model must have what it had to be saved, but {_joined(path, name)!r} was set "
                    "to None"
                )
            moves = name in module._buffers and adapter not in state.in_full
            if not (moves and is_same(tensor_of(module, name), copied)):
                saved[_joined(path, name)] = copied
    return saved


def _besides(model: nn.Module, adapter: str, include: bool | None) -> dict[str, Tensor]:
    """What was trained besides an adapter, by name.

    Buffers that move belong to it as well: a layer that was put into its model by hand came with
    no copies of those around it.

    Raises:
        ValueError: if parameters are trained, and ``include`` does not say what to do about them;
            or if they are to be included, but one has an update too: a file has no place for it.
    """
    trained: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    updated = []
    for path, module in modules_by_name(model):
        state = state_of(module)
        known = {*state.copies.get(adapter, {}), *own_names(module)}
        before = vars(module).get(BESIDES, {}).get(adapter, ())
        for name in tensor_names(module):
            parameter = module._parameters.get(name)
            if name in known:
                continue
            if parameter is not None and (parameter.requires_grad or name in before):
                trained[_joined(path, name)] = parameter
                if name in state.adapters.get(adapter, {}):
                    updated.append(_joined(path, name))
            elif parameter is None and name in moving_buffers(module):
                buffers[_joined(path, name)] = cast(Tensor, module._buffers[name])
    names = ", ".join([*list(trained)[:8], "…"] if len(trained) > 8 else trained)
    if trained and include is None:
        raise ValueError(
            f"model must train nothing but the adapter to be saved, but trains {names} besides; "
            "trained_besides=True saves it as a part of the adapter, False leaves it out"
        )
    if updated and include:
        raise ValueError(
            f"model must have frozen base weights to be saved, but trains {', '.join(updated)} "
            "beside an update of it; trained_besides=False leaves it out"
        )
    return {**(trained if include else {}), **buffers}


def _samples(weight: Tensor | None) -> Tensor:
    """Some entries of a frozen weight, the same in every dtype but for rounding."""
    if weight is None or not weight.is_floating_point():
        return torch.zeros(SAMPLES)  # one that cannot be read
    places = torch.linspace(0, weight.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return weight.detach().reshape(-1)[places.to(weight.device)].float().cpu()


def collect(
    model: nn.Module,
    adapter: str | None,
    dtype: torch.dtype | None,
    trained_besides: bool | None = None,
) -> Contents:
    """Take an adapter, by default the active one, from a model, its numbers in ``dtype``.

    Raises:
        ValueError: if no layer is adapted, or none under this name, or a number is not finite; or
            if something else is trained, unless that is said to be included or left out.
    """
    from randlora import __version__

    modules = adapted_modules(model)
    adapter = known_adapter(modules, adapter)
    updates: dict[str, tuple[Site, Settings, int]] = {}
    banks: list[BasisBank] = []
    numbers, base = {}, {}
    for path, module in modules.items():
        for parameter, update in module._randlora.adapters.get(adapter, {}).items():
            name = _joined(path, parameter)
            if name == BASE or name.startswith(RESERVED[1:]):
                raise ValueError(f"model must have no weight called {name!r}, to be saved")
            if update.bank not in banks:
                banks.append(update.bank)
            updates[name] = update.site, update.settings, banks.index(update.bank)
            packed = torch.cat([t.detach().cpu() for t in update.parameters(module)], -1)
            numbers[name] = packed if dtype is None else packed.to(dtype)
            if not numbers[name].isfinite().all():
                raise ValueError(
                    f"model must have finite updates to be saved, but that of {name!r} has values "
                    "that are infinite or no number"
                )
            weight = module._parameters.get(parameter)
            base[name] = _samples(weight if type(weight) is nn.Parameter else None)
    saved = _saved(modules, adapter)
    saved |= _besides(model, adapter, trained_besides)
    for name, tensor in saved.items():
        if tensor.isnan().any():
            raise ValueError(
                f"model must have numbers to be saved, but {name!r} has some that are none"
            )
    contents = Contents(
        updates=updates,
        banks=tuple(banks),
        digests=(),
        numbers=numbers,
        base=torch.stack([base[name] for name in sorted(base)]),
        saved={name: tensor.detach().cpu().clone() for name, tensor in saved.items()},  # untied
        modules_to_save=_in_full(modules, adapter),
        version=__version__,
    )
    digests = tuple(bank.digest(contents.sizes(place)) for place, bank in enumerate(banks))
    return replace(contents, digests=digests)


def _in_full(modules: Mapping[str, Any], adapter: str) -> tuple[str, ...]:
    return tuple(name for name, m in modules.items() if adapter in m._randlora.in_full)


# --- to a model ----------------------------------------------------------------------------------


def restore(model: ModelT, contents: Contents, adapter: str, *, check_base: bool) -> ModelT:
    """Adapt ``model`` as the contents say, unless it is so already, and load the numbers.

    Raises:
        CheckpointError: if they do not fit; ``model`` is then what it was.
    """
    modules = dict(modules_by_name(model, remove_duplicate=False))
    targets = {name: _target(modules, name, site) for name, (site, *_) in contents.updates.items()}
    adapted = [module for module in dict.fromkeys(modules.values()) if isinstance(module, Adapted)]
    present = {
        (module, parameter): update
        for module in adapted
        for parameter, update in module._randlora.adapters.get(adapter, {}).items()
    }
    saved_modules = _saved_modules(contents, modules)
    _check_places(model, targets, saved_modules)
    if present:
        _check_same(contents, targets, present, modules)
        holding = {module for module in saved_modules if tensor_names(module)}
        if {m for m in adapted if adapter in m._randlora.in_full} != holding:
            ours = [n for n, m in modules.items() if adapter in state_of(m).in_full]
            raise MismatchError(
                "file and model must train the same modules in full, but the file has "
                f"{list(contents.modules_to_save)}, the model {ours}"
            )
    saved = _check_saved(contents, modules, saved_modules)
    if check_base:
        check_base_weights(contents, dict(_weights(targets)))
    contents.check_bases()

    if not present:
        known = [other.bank for module in adapted for other in module._randlora.all()]
        banks = [next((o for o in known if o.same_recipe(b)), b) for b in contents.banks]
        order = {module: list(module._parameters) for module in model.modules()}
        ranks = {module: place for place, module in enumerate(order)}

        def position(name: str) -> tuple[int, int]:  # in the order that `inject` has
            module, parameter = targets[name].module, targets[name].site.parameter
            inner = order[module].index(parameter) if parameter in order[module] else 0
            return ranks[module], inner

        updates = {
            targets[name]: (contents.updates[name][1], banks[contents.updates[name][2]])
            for name in sorted(contents.updates, key=position)
        }
    lacking = _without_copies(saved, adapter)
    try:
        if present:
            add_copies(model, adapter, lacking)
        else:
            adapt(model, adapter, updates, saved_modules, lacking)
    except TypeError as error:
        raise MismatchError(str(error)) from error
    with torch.no_grad():
        for name, numbers in contents.numbers.items():
            module: Any = targets[name].module
            update = module._randlora.adapters[adapter][targets[name].site.parameter]
            lam, gamma = update.parameters(module)
            if not present and numbers.dtype == torch.float64:
                lam.data, gamma.data = lam.data.double(), gamma.data.double()
            rank = update.settings.rank
            lam.copy_(numbers[..., :rank])
            gamma.copy_(numbers[..., rank:])
        for module in dict.fromkeys(modules.values()):
            for name, key in state_of(module).copies.get(adapter, {}).items():
                original = tensor_of(module, name)
                value = saved.get((module, name), original)
                if value is not None and original is not None:
                    set_copy(module, key, value.to(original.device, original.dtype))
    for (module, name), value in saved.items():
        if tensor_of(module, name) is None:  # a buffer that is made when it is needed
            module._buffers[name] = value.to(device_of(module))
    for module in dict.fromkeys(modules.values()):
        if isinstance(module, Adapted):
            fold_again(module)
    return model


def _without_copies(
    saved: Mapping[tuple[nn.Module, str], Tensor], adapter: str
) -> dict[nn.Module, list[str]]:
    """What of the tensors of a file an adapter has no copies of."""
    lacking: dict[nn.Module, list[str]] = {}
    for module, name in saved:
        there = tensor_of(module, name) is not None
        if there and name not in state_of(module).copies.get(adapter, {}):
            lacking.setdefault(module, []).append(name)
    return lacking


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


def _check_same(
    contents: Contents,
    targets: Mapping[str, Place],
    present: Any,
    modules: Mapping[str, nn.Module],
) -> None:
    """Raise unless an adapter that is there is that of the file."""
    names: dict[nn.Module, str] = {}
    for name, module in modules.items():
        names.setdefault(module, name)
    wanted = {(module, site.parameter): name for name, (module, site) in targets.items()}
    missing = [name for place, name in wanted.items() if place not in present]
    if missing:
        raise MismatchError(f"the model's adapter has no update for {', '.join(missing)}")
    extra = [
        repr(_joined(names[module], parameter))
        for module, parameter in present
        if (module, parameter) not in wanted
    ]
    if extra:
        raise MismatchError(f"the file has no update for {', '.join(extra)}, which the model has")
    for place, name in wanted.items():
        _, settings, bank = contents.updates[name]
        if not set(present[place].names) <= place[0]._parameters.keys():
            raise MismatchError(f"the update of {name!r} is parametrized here")
        ours, theirs = present[place].settings, replace(settings, asked_rank=0)
        if replace(ours, asked_rank=0) != theirs:
            raise MismatchError(f"the update of {name!r} is {settings} in the file, here {ours}")
        if not present[place].bank.same_recipe(contents.banks[bank]):
            raise BasesError(
                f"the update of {name!r} uses {contents.banks[bank]!r} in the file, here "
                f"{present[place].bank!r}"
            )


def _saved_modules(contents: Contents, modules: Mapping[str, nn.Module]) -> set[nn.Module]:
    """The modules trained in full, which can be."""
    for name in contents.modules_to_save:
        if not name or name not in modules:
            raise MismatchError(f"the file has a module {name!r}, trained in full; the model none")
        if reason := untrainable(modules[name]):
            raise MismatchError(
                f"the file has {name!r}, trained in full; in the model it has {reason}"
            )
    return {modules[name] for name in contents.modules_to_save}


def _check_places(
    model: nn.Module, targets: Mapping[str, Place], saved_modules: set[nn.Module]
) -> None:
    """Raise unless each update has a real weight of its own, of a layer not trained in full."""
    names: dict[Place, str] = {}
    for name, place in targets.items():
        if place in names:
            raise MismatchError(
                f"the file has updates for {names[place]!r} and {name!r}, which are one weight of "
                "the model"
            )
        names[place] = name
        module = place.module
        if module in saved_modules:
            raise MismatchError(f"{name!r} cannot be adapted and trained in full at once")
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise MismatchError(f"{name!r} is on the meta device; materialise the model first")


def _check_saved(
    contents: Contents, modules: Mapping[str, nn.Module], saved_modules: set[nn.Module]
) -> dict[tuple[nn.Module, str], Tensor]:
    """What is to be in copies, by module and name, checked."""
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for full, value in contents.saved.items():
        path, _, name = full.rpartition(".")
        module = modules.get(path)
        tensor = None if module is None else tensor_of(module, name)
        if module is not None and tensor is None and name in module._buffers:
            found[module, name] = value
            continue
        if module is None or tensor is None or tensor.shape != value.shape:
            has = "nothing" if tensor is None else tuple(tensor.shape)
            raise MismatchError(
                f"the file has {full!r} of shape {tuple(value.shape)}, the model {has}"
            )
        if name not in tensor_names(module) or full in contents.updates:
            raise MismatchError(f"the file has {full!r}, which is no tensor of the plain model")
        if isinstance(tensor, nn.Parameter) and (reason := untrainable(module)):
            raise MismatchError(
                f"the file has {full!r}, trained in full; in the model it has {reason}"
            )
        found[module, name] = value
    lacking = [
        f"{path}.{name}"
        for path, module in modules.items()
        if module in saved_modules
        for name in tensor_names(module)
        if (module, name) not in found
    ]
    if lacking:
        raise MismatchError(f"the file has nothing for {', '.join(lacking)}")
    return found


def _weights(targets: Mapping[str, Place]) -> Iterator[tuple[str, Tensor | None]]:
    """The frozen weights by name; None where one is not to be read."""
    for name, (module, site) in targets.items():
        weight = module._parameters.get(site.parameter)
        yield name, weight if type(weight) is nn.Parameter else None


def check_base_weights(contents: Contents, weights: Mapping[str, Tensor | None]) -> None:
    """Raise :class:`BaseModelError` if some weights are not those that the file knows.

    It knows a few entries of each, to the rounding of low precision: enough to tell another model,
    not every change of the same.
    """
    if contents.base is None:
        return
    for name, theirs in zip(sorted(contents.updates), contents.base, strict=True):
        # Entries rounded to bfloat16 differ by 2**-8, small ones in float16 by 2**-24.
        if name in weights and not torch.allclose(
            _samples(weights[name]), theirs, rtol=2**-7, atol=2**-23
        ):
            raise BaseModelError(
                f"the adapter was trained on another base model: {name!r} has other values "
                "(check_base=False, or --any-base, takes it nevertheless)"
            )
