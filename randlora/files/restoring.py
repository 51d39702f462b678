"""Load adapter data into a model: check everything, then install the adapter and its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from randlora.bases.bank import BasisBank
from randlora.files.adapter_data import AdapterData, check_base_weights
from randlora.files.errors import BasesError, MismatchError
from randlora.model.choosing import TargetWeight
from randlora.model.index import ModelIndex, ModelT, active_adapter, device_of, join, tensor_names
from randlora.model.installing import (
    install,
    install_changes,
    prepare,
    prepare_copies,
    train,
    untrainable,
)
from randlora.modules.effective import refresh_merged_weights
from randlora.modules.sharding import like
from randlora.modules.state import set_copy, state_of, tensor_of
from randlora.modules.table import parameter_spec
from randlora.modules.weight_update import Settings, WeightSpec, WeightUpdate

# Tensors of a file by module and name in it, and updates of a model by module and parameter.
Tensors = Mapping[tuple[nn.Module, str], Tensor]
Updates = Mapping[tuple[nn.Module, str], WeightUpdate]

_OTHER = "give adapter= another name to add that of the file"


def restore(model: ModelT, data: AdapterData, adapter: str, *, check_base: bool) -> ModelT:
    """Load an adapter into ``model``, which is adapted for it unless it has this adapter already.

    A :class:`CheckpointError` says that the data does not fit; the model is then unchanged.
    """
    index = ModelIndex(model)
    targets = {name: _target(index, name, spec) for name, (spec, *_) in data.updates.items()}
    present = {
        (module, parameter): update
        for module in index.adapted.values()
        for parameter, update in module._randlora.updates.get(adapter, {}).items()
    }
    saved_modules = _saved_modules(data, index)
    _check_targets(targets, saved_modules)
    if present:
        _check_same(data, index, targets, present)
        _check_same_modules(data, index, adapter, saved_modules)
    saved = _check_saved(data, index, saved_modules)
    if check_base:
        check_base_weights(data, dict(_base_weights(targets)))
    data.check_bases()

    further = _without_copies(saved, adapter)
    try:
        if present:
            changes = prepare_copies(index, adapter, further)
        else:
            updates = _updates(data, index, targets)
            wide = {
                target
                for name, target in targets.items()
                if any(numbers.dtype == torch.float64 for numbers in data.trained(name))
            }
            changes = prepare(index, adapter, updates, saved_modules, further, wide)
    except TypeError as error:
        raise MismatchError(str(error)) from error
    if present:
        install_changes(adapter, changes, active_adapter(index.adapted))
        train(model)
    else:
        install(index, adapter, changes)
    _load_numbers(data, targets, adapter)
    _load_copies(index, saved, adapter)
    for module in index.adapted.values():
        refresh_merged_weights(module)
    return model


def _updates(
    data: AdapterData, index: ModelIndex, targets: Mapping[str, TargetWeight]
) -> dict[TargetWeight, tuple[Settings, BasisBank]]:
    """The updates to make, in the order in which `inject` makes them.

    A bank of the model that has the same recipe is used instead of a new one.
    """
    known = [u.bank for module in index.adapted.values() for u in module._randlora.all_updates()]
    banks = [next((o for o in known if o.same_recipe(b)), b) for b in data.banks]
    places = {module: place for place, module in enumerate(index.names)}

    def position(name: str) -> tuple[int, int]:
        module, spec = targets[name]
        parameters = list(module._parameters)
        held = spec.parameter in parameters
        return places[module], parameters.index(spec.parameter) if held else 0

    names = sorted(data.updates, key=position)
    return {targets[n]: (data.updates[n][1], banks[data.updates[n][2]]) for n in names}


@torch.no_grad()
def _load_numbers(data: AdapterData, targets: Mapping[str, TargetWeight], adapter: str) -> None:
    """Write ``Λ``, ``Γ`` and ``A``."""
    for name, (module, spec) in targets.items():
        update = state_of(module).updates[adapter][spec.parameter]
        for parameter, numbers in zip(update.parameters(module), data.trained(name), strict=True):
            parameter.copy_(like(numbers, parameter))


def _load_copies(index: ModelIndex, saved: Tensors, adapter: str) -> None:
    """Write the adapter's copies. A copy that the file does not have is set to its original."""
    for module in index.names:
        for name, key in state_of(module).copies.get(adapter, {}).items():
            original = tensor_of(module, name)
            value = saved.get((module, name), original)
            if value is not None and original is not None:
                set_copy(module, key, value.to(original.device, original.dtype))
    for (module, name), value in saved.items():
        if tensor_of(module, name) is None:  # a buffer that the model creates when it needs it
            module._buffers[name] = value.to(device_of(module))


def _without_copies(saved: Tensors, adapter: str) -> dict[nn.Module, list[str]]:
    """The tensors of the file of which the adapter has no copies in the model yet."""
    lacking: dict[nn.Module, list[str]] = {}
    for module, name in saved:
        there = tensor_of(module, name) is not None
        if there and name not in state_of(module).copies.get(adapter, {}):
            lacking.setdefault(module, []).append(name)
    return lacking


def _target(index: ModelIndex, name: str, spec: WeightSpec) -> TargetWeight:
    """The weight of the model that has an update in the file."""
    path, _, parameter = name.rpartition(".")
    if path not in index.modules:
        raise MismatchError(f"the file has an update for {name!r}, but the model has no {path!r}")
    module = index.modules[path]
    found = parameter_spec(module, parameter)
    if isinstance(found, str):
        raise MismatchError(f"the file has an update for {name!r}, but {found}")
    if found != spec:
        raise MismatchError(
            f"the file has an update for {name!r} as {_describe(spec)}, but the model has it as "
            f"{_describe(found)}"
        )
    return TargetWeight(module, spec)


def _describe(spec: WeightSpec) -> str:
    return f"{spec}" + ", transposed" * spec.transposed + ", unreadable" * spec.unreadable


def _check_same(
    data: AdapterData, index: ModelIndex, targets: Mapping[str, TargetWeight], present: Updates
) -> None:
    """Raise unless the adapter has the same updates in the model and in the file."""
    wanted = {(module, spec.parameter): name for name, (module, spec) in targets.items()}
    missing = [name for place, name in wanted.items() if place not in present]
    if missing:
        raise MismatchError(f"the model's adapter has no update for {', '.join(missing)}; {_OTHER}")
    extra = [
        repr(join(index.name(module), parameter))
        for module, parameter in present
        if (module, parameter) not in wanted
    ]
    if extra:
        raise MismatchError(
            f"the file has no update for {', '.join(extra)}, which the model has; {_OTHER}"
        )
    for place, name in wanted.items():
        _, settings, bank = data.updates[name]
        if not set(present[place].parameter_names) <= place[0]._parameters.keys():
            raise MismatchError(f"the update of {name!r} is parametrized here")
        theirs, ours = asdict(settings), asdict(present[place].settings)
        if differ := [key for key in theirs if theirs[key] != ours[key] and key != "asked_rank"]:
            sides = (
                ", ".join(_setting(key, side[key]) for key in differ) for side in (theirs, ours)
            )
            raise MismatchError(
                f"the update of {name!r} has {' in the file, but '.join(sides)} in the model's "
                f"adapter; {_OTHER}"
            )
        if not present[place].bank.same_recipe(data.banks[bank]):
            raise BasesError(
                f"the update of {name!r} uses {data.banks[bank]!r} in the file, but "
                f"{present[place].bank!r} in the model's adapter; {_OTHER}"
            )


def _setting(key: str, value: float) -> str:
    return f"{key}={value}" if isinstance(value, bool) else f"{key}={value:g}"


def _check_same_modules(
    data: AdapterData, index: ModelIndex, adapter: str, saved_modules: set[nn.Module]
) -> None:
    """Raise unless the adapter trains the same modules in full in the model and in the file."""
    ours = {module for module in index.names if adapter in state_of(module).fully_trained}
    if ours != {module for module in saved_modules if tensor_names(module)}:
        raise MismatchError(
            "file and model must train the same modules in full, but the file has "
            f"{list(data.modules_to_save)}, the model {[index.name(module) for module in ours]}; "
            + _OTHER
        )


def _saved_modules(data: AdapterData, index: ModelIndex) -> set[nn.Module]:
    """The modules that the adapter trains in full, after checking that this is possible."""
    for name in data.modules_to_save:
        if not name or name not in index.modules:
            raise MismatchError(f"the file has a module {name!r}, the model has none")
        if reason := untrainable(index.modules[name]):
            raise MismatchError(
                f"the file has {name!r}, trained in full; in the model it has {reason}"
            )
    return {index.modules[name] for name in data.modules_to_save}


def _check_targets(targets: Mapping[str, TargetWeight], saved_modules: set[nn.Module]) -> None:
    """Raise unless each update has its own weight, with values, of a module not trained in full."""
    names: dict[TargetWeight, str] = {}
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
    data: AdapterData, index: ModelIndex, saved_modules: set[nn.Module]
) -> dict[tuple[nn.Module, str], Tensor]:
    """The other tensors of the file by module and name, after checking that they fit the model."""
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for full, value in data.saved.items():
        path, _, name = full.rpartition(".")
        module = index.modules.get(path)
        tensor = None if module is None else tensor_of(module, name)
        if module is not None and tensor is None and name in module._buffers:
            found[module, name] = value
            continue
        if module is None or tensor is None or tensor.shape != value.shape:
            has = "nothing" if tensor is None else tuple(tensor.shape)
            raise MismatchError(
                f"the file has {full!r} of shape {tuple(value.shape)}, the model {has}"
            )
        if name not in tensor_names(module) or full in data.updates:
            raise MismatchError(f"the file has {full!r}, which is not a tensor of the plain model")
        if isinstance(tensor, nn.Parameter) and (reason := untrainable(module)):
            raise MismatchError(
                f"the file has {full!r}, trained in full; in the model it has {reason}"
            )
        found[module, name] = value
    lacking = [
        f"{path}.{name}"
        for path, module in index.modules.items()
        if module in saved_modules
        for name in tensor_names(module)
        if (module, name) not in found
    ]
    if lacking:
        raise MismatchError(f"the file has nothing for {', '.join(lacking)}")
    return found


def _base_weights(targets: Mapping[str, TargetWeight]) -> Iterator[tuple[str, Tensor | None]]:
    """The base weights by name; None for an unreadable one."""
    for name, (module, spec) in targets.items():
        weight = module._parameters.get(spec.parameter)
        yield name, weight
