"""Add an adapter to a model: prepare all that can fail, then install it. Which parameters train.

This module and :mod:`randlora.modules` change the classes and parameters of a user's model.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn

from randlora.bases.bank import BasisBank
from randlora.core.checks import as_positive_real
from randlora.model.choosing import TargetWeight
from randlora.model.index import (
    TRAINED_BESIDES,
    ModelIndex,
    active_adapter,
    adapted_modules,
    device_of,
    moving_buffers,
    refuse_wrapped,
    tensor_names,
)
from randlora.modules import adapted
from randlora.modules.adapted import AdaptedModule, change_class, classes_in_front
from randlora.modules.classes import adapted_class, can_become
from randlora.modules.recurrent import AdaptedRNN
from randlora.modules.sharding import (
    Groups,
    NewMember,
    check_dtypes,
    note_trained,
    reshard,
    whole,
)
from randlora.modules.state import state_of, tensor_of
from randlora.modules.table import handler_of, is_unreadable
from randlora.modules.weight_update import DEFAULT, Settings, WeightUpdate

# The groups of `adapter_parameters`. The first ones are in the order of an update's parameters.
_SAVED = "modules_to_save"
_GROUPS = ("lambda", "gamma", "a", _SAVED)


@dataclass
class ModuleChanges:
    """What an adapter adds to one module, complete before the module is changed."""

    updates: dict[WeightUpdate, tuple[nn.Parameter, ...]] = field(default_factory=dict)
    copies: dict[str, tuple[str, Tensor]] = field(default_factory=dict)  # by name: key, tensor
    fully_trained: bool = False
    new_class: Any = None
    sharded: dict[str, NewMember] = field(default_factory=dict)  # by key, for FSDP


Changes: TypeAlias = dict[nn.Module, ModuleChanges]


def prepare(
    index: ModelIndex,
    adapter: str,
    updates: Mapping[TargetWeight, tuple[Settings, BasisBank]],
    saved: Iterable[nn.Module],
    also: Mapping[nn.Module, Iterable[str]] | None = None,
    wide: Container[TargetWeight] = (),
) -> Changes:
    """Make everything that a new adapter needs, or raise. The model is not changed.

    The adapter trains the modules in ``saved`` in full. It also gets copies of the parameters and
    buffers that ``also`` names. The trained tensors of updates in ``wide`` are in float64.
    """
    changes: Changes = {}
    saved = set(saved)
    refuse_wrapped(index.model, "get an adapter")
    reshard(index.model)
    groups = Groups(index.model)
    for module in dict.fromkeys([*(module for module, _ in updates), *saved]):
        groups.require(index.name(module), module)
    for (module, spec), (settings, bank) in updates.items():
        update = WeightUpdate(adapter, spec, settings, bank)
        _refuse_taken_names(index, module, adapter, update.parameter_names)
        bank.reserve(*update.sizes)
        dtype = torch.float64 if (module, spec) in wide else torch.float32
        made = update.make_parameters(device_of(module), dtype)
        own = changes.setdefault(module, ModuleChanges())
        own.updates[update] = ()
        for key, one in zip(update.parameter_names, made, strict=True):
            if (member := groups.new_member(one, module, spec.parameter)) is not None:
                own.sharded[key] = member
            own.updates[update] += (one if member is None else member.parameter,)
    wanted = {}
    for module in index.names:
        usual = tensor_names(module) if module in saved else moving_buffers(module)
        wanted[module] = list(dict.fromkeys([*usual, *(also or {}).get(module, ())]))
    _add_copies(index, adapter, changes, wanted, groups)
    for module, own in changes.items():
        own.fully_trained = module in saved
        own.new_class = _new_class(index, module, own)
    check_dtypes(member for own in changes.values() for member in own.sharded.values())
    for module, own in changes.items():  # after all sizes are reserved
        for update in own.updates:
            update.draw_bases(module)
    return changes


def prepare_copies(
    index: ModelIndex, adapter: str, wanted: Mapping[nn.Module, Iterable[str]]
) -> Changes:
    """Make copies of further parameters and buffers for an adapter that the model has, or raise."""
    changes: Changes = {}
    if wanted:
        refuse_wrapped(index.model, "get new parameters")
    reshard(index.model)
    _add_copies(index, adapter, changes, wanted, Groups(index.model))
    for module, own in changes.items():
        own.new_class = _new_class(index, module, own)
    members = [member for own in changes.values() for member in own.sharded.values()]
    check_dtypes(members, _trained_by(index.adapted, adapter) if members else {})
    return changes


def install(index: ModelIndex, adapter: str, changes: Changes) -> None:
    """Add an adapter to the model, freeze all else; the active adapter stays, if there is one."""
    before = index.adapted
    active = active_adapter(before) if before else adapter
    _freeze(index, active if before else None)
    install_changes(adapter, changes, active)
    train(index.model)


def install_changes(adapter: str, changes: Changes, active: str) -> None:
    """Put the parameters, copies and classes of an adapter into their modules."""
    for module, own in changes.items():
        for name in own.copies:
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(False)
        adapted.install(module, adapter, own.updates, own.copies, fully_trained=own.fully_trained)
        state_of(module).active = active
        change_class(module, own.new_class)
    for module, own in changes.items():
        for key, member in own.sharded.items():
            member.join(module, key)


def _add_copies(
    index: ModelIndex,
    adapter: str,
    changes: Changes,
    wanted: Mapping[nn.Module, Iterable[str]],
    groups: Groups,
) -> None:
    """Copy tensors for an adapter. A tensor that several modules share gets one copy."""
    made: dict[int, Tensor] = {}
    members: dict[int, NewMember] = {}
    prefix = "" if adapter == DEFAULT else f"{adapter}_"
    for module, names in wanted.items():
        keys = {name: f"{prefix}randlora_copy_{name}" for name in names}
        _refuse_taken_names(index, module, adapter, keys.values())
        for name, key in keys.items():
            tensor = tensor_of(module, name)
            assert tensor is not None
            if id(tensor) not in made:
                with torch.inference_mode(False):
                    copied = whole(tensor.detach()).clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(copied) if is_parameter else copied
                    member = groups.new_member(copied, module, name) if is_parameter else None
                    if member is not None:
                        members[id(tensor)], made[id(tensor)] = member, member.parameter
            own = changes.setdefault(module, ModuleChanges())
            own.copies[name] = key, made[id(tensor)]
            if id(tensor) in members:
                own.sharded[key] = members[id(tensor)]


def _refuse_taken_names(
    index: ModelIndex, module: nn.Module, adapter: str, keys: Iterable[str]
) -> None:
    for key in keys:
        if hasattr(module, key):
            raise TypeError(
                f"{index.name(module)!r} has an attribute {key!r}, which adapter {adapter!r} would "
                "need"
            )


def _new_class(index: ModelIndex, module: nn.Module, changes: ModuleChanges) -> Any:
    """The adapted class for a module, after checking that the module can change to it."""
    names = {update.spec.parameter for update in changes.updates if not update.spec.unreadable}
    names |= {name for name, (_, t) in changes.copies.items() if isinstance(t, nn.Parameter)}
    buffers = set(changes.copies) - names
    handler = handler_of(module)
    mixin: type[AdaptedModule] = AdaptedModule
    has_updates = bool(changes.updates) or any(state_of(module).all_updates())
    if has_updates and not isinstance(handler, str):
        mixin = handler.mixin
    elif isinstance(module, nn.RNNBase):
        mixin = AdaptedRNN
    own = classes_in_front(module)[-1]
    made = adapted_class(own, mixin, frozenset(names), frozenset(buffers))
    for name in names | buffers:
        if not isinstance(inspect.getattr_static(made, name, None), property):
            raise TypeError(
                f"{name!r} of {index.name(module)!r} cannot be an adapter's: its class, "
                f"{type(module).__name__}, was made for updates of other parameters"
            )
    if not can_become(own, made):
        raise TypeError(
            f"{index.name(module)!r} cannot be an adapter's: Python cannot change objects of its "
            f"class, {type(module).__name__}"
        )
    return made


def untrainable(module: nn.Module) -> str | None:
    """The reason why a module (not those beneath it) cannot be trained in full, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "code compiled by TorchScript, which reads its parameters outside of Python"
    for name, parameter in module.named_parameters(recurse=False):
        trainable = parameter.is_floating_point() or parameter.is_complex()
        if not trainable or parameter.is_inference():
            return f"{name!r}, {'an inference tensor' if trainable else parameter.dtype}"
        if name == "weight" and is_unreadable(handler_of(module)):
            return f"{name!r}, which is quantised"
    return None


def _freeze(index: ModelIndex, active: str | None) -> None:
    """Freeze every parameter and drop gradients, except those of the active adapter.

    An optimiser that still has a parameter would go on moving it by its old gradient. Parameters
    that were trained beside the active adapter are noted, so that `save_adapter` finds them.
    """
    for module in index.names:
        state = state_of(module)
        owner = {key: name for name in state.adapter_names for key in state.keys_of(name)}
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            parameter.requires_grad_(False)
            if active is None or owner.get(name) != active:
                parameter.grad = None
            if active and name not in owner and name not in state.copies.get(active, {}):
                besides = module.__dict__.setdefault(TRAINED_BESIDES, {})
                besides.setdefault(active, set()).add(name)


def train(model: nn.Module) -> None:
    """Make the parameters of the active adapter require gradients, and freeze other adapters.

    A frozen parameter loses its gradient, so that an optimiser that has it does not move it.
    """
    for module in adapted_modules(model).values():
        state = module._randlora
        for name in state.adapter_names:
            numbers = (parameter for _, parameter in _named_numbers(module, name))
            for parameter in (*numbers, *_copied_parameters(module, name)):
                parameter.requires_grad_(name == state.active)
                if name != state.active:
                    parameter.grad = None
    note_trained(model)


@overload
def adapter_parameters(model: nn.Module) -> list[nn.Parameter]: ...
@overload
def adapter_parameters(
    model: nn.Module, *, lr: float, multipliers: Mapping[str, float] | None = None
) -> list[dict[str, Any]]: ...
def adapter_parameters(
    model: nn.Module, *, lr: float | None = None, multipliers: Mapping[str, float] | None = None
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """The parameters to give to the optimiser: those of the updates, then of ``modules_to_save``.

    These are the parameters of the active adapter, each once, in the order of ``model.modules()``.
    After :func:`set_adapter` or :func:`load_adapter` make a new optimiser: the old one has the
    parameters of the adapter that was active when it was made.

    With ``lr`` they come as groups, which torch's optimisers and schedulers take: ``"lambda"``,
    ``"gamma"``, ``"a"`` (if ``A`` is trained) and ``"modules_to_save"``. Each is a dict with its
    ``params``, its ``name`` and its ``lr``, and the first three have ``weight_decay = 0``. Weight
    decay pulls parameters to zero: so it pulls ``Γ``, and with it ``ΔW``, back to the pre-trained
    model, and moves ``Λ``, which starts at 1, and ``A`` away from where they start. For the
    ``modules_to_save`` the weight decay is that of the optimiser. Change a group before you pass
    it on if you want something else.

    Args:
        model: an adapted model.
        lr: the learning rate. None gives a plain list.
        multipliers: factors of ``lr`` by the name of a group, for example ``{"lambda": 4.0}``; 1
            for a group that is not named. A group that ``model`` does not have may be named.

    Returns:
        A list of parameters or, with ``lr``, a list of groups, without empty ones.

    Raises:
        TypeError: if ``lr`` or a multiplier is not a number, or ``multipliers`` is not a mapping.
        ValueError: if no layer of ``model`` is adapted, or parts of it have different active
            adapters; if ``lr`` or a multiplier is not positive, a name is not one of a group, or
            there are ``multipliers`` without ``lr``.

    Example:
        >>> model = inject(nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), rank=4)
        >>> groups = adapter_parameters(model, lr=1e-3, multipliers={"lambda": 4.0})
        >>> optimizer = torch.optim.AdamW(groups)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('lambda', 0.004), ('gamma', 0.001)]
    """
    rates = _rates(lr, multipliers)
    modules = adapted_modules(model)
    adapter = active_adapter(modules)
    names = _trained_by(modules, adapter)
    if lr is None:
        return list(names)
    groups: list[dict[str, Any]] = []
    for name, rate in rates.items():
        if parameters := [p for p, of in names.items() if of == name]:
            decay = {} if name == _SAVED else {"weight_decay": 0.0}
            groups.append({"name": name, "params": parameters, "lr": rate, **decay})
    return groups


def _rates(lr: float | None, multipliers: Mapping[str, float] | None) -> dict[str, float]:
    """The learning rate of each group; none without ``lr``. Checks the arguments."""
    if multipliers is None:
        multipliers = {}
    elif not isinstance(multipliers, Mapping):
        raise TypeError(
            "multipliers must be a mapping from names of groups to numbers, got a "
            f"{type(multipliers).__name__}"
        )
    elif lr is None:
        raise ValueError(
            "multipliers need lr, because torch's optimisers have learning rates, not multipliers; "
            f"got {multipliers!r} without lr"
        )
    for name in multipliers:
        if name not in _GROUPS:
            known = ", ".join(map(repr, _GROUPS))
            raise ValueError(f"multipliers must have names from {known}, got {name!r}")
    if lr is None:
        return {}
    rate = as_positive_real("lr", lr)
    given = {n: as_positive_real(f"multipliers[{n!r}]", m) for n, m in multipliers.items()}
    return {name: rate * given.get(name, 1.0) for name in _GROUPS}


def _trained_by(modules: Mapping[str, Any], adapter: str) -> dict[nn.Parameter, str]:
    """The parameters that an adapter trains, each with the name of its group."""
    names = {p: name for m in modules.values() for name, p in _named_numbers(m, adapter)}
    for module in modules.values():
        names |= dict.fromkeys(_copied_parameters(module, adapter), _SAVED)
    return names


def _named_numbers(module: Any, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """What an adapter trains of the updates in a module, with the names of the groups.

    If one of these is parametrized, the parameters behind it.
    """
    for update in module._randlora.updates.get(adapter, {}).values():
        for group, name in zip(_GROUPS, update.parameter_names, strict=False):
            if (parameter := module._parameters.get(name)) is not None:
                yield group, parameter
            else:
                yield from ((group, p) for p in module.parametrizations[name].parameters())


def _copied_parameters(module: Any, adapter: str) -> list[nn.Parameter]:
    """An adapter's own copies of parameters in a module."""
    keys = module._randlora.copies.get(adapter, {}).values()
    copied = (module._parameters.get(key) for key in keys)
    return [parameter for parameter in copied if parameter is not None]
