"""Choose the weights of a model to adapt, from the arguments of `inject`. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from randlora.model.index import ModelIndex, device_of
from randlora.model.patterns import NAME, Pattern, Target, beneath, is_predicate, matches, selected
from randlora.modules.state import state_of
from randlora.modules.table import handler_of, parameter_spec
from randlora.modules.weight_update import WeightSpec

STACK = "a stack of matrices,"  # the start of the reason why a stack is left out


class TargetWeight(NamedTuple):
    """One weight of a model that is to be adapted: its module, and which weight of it."""

    module: nn.Module
    spec: WeightSpec


def chosen_weights(
    index: ModelIndex,
    target_modules: Target | None,
    exclude_modules: Target | None,
    target_parameters: Pattern | Iterable[Pattern] | None,
    saved: set[nn.Module],
) -> list[TargetWeight]:
    """The weights to adapt: those of layers in the order of the model, then further parameters.

    Patterns are as in :func:`inject`. The modules in ``saved`` are not adapted.
    """
    layers = _layers(index, target_modules)
    excluded = selected("exclude_modules", exclude_modules, index.names) | saved
    targets = [target for target in layers if target.module not in excluded]
    targets += _further(index, target_parameters, excluded, targets)
    _check(index, targets)
    return targets


def _layers(index: ModelIndex, target: Target | None) -> list[TargetWeight]:
    chosen: set[nn.Module]
    specs = dict(index.supported)
    if target is None:
        chosen = {module for module in specs if module not in index.heads}
    elif is_predicate(target):
        chosen = {m for m in specs if any(target(name, m) for name in index.names[m])}
    else:
        hits = matches("target_modules", target, index.names)
        for pattern, modules in hits.items():
            _refuse_unsupported(index, pattern, modules)
        named: set[nn.Module] = set().union(*hits.values())
        for module in named - set(specs):  # an embedding is adapted only if a pattern matches it
            if isinstance(found := index.specs[module], list):
                specs[module] = found
        chosen = beneath(named) & set(specs)
    return [TargetWeight(m, spec) for m in index.names if m in chosen for spec in specs[m]]


def _further(
    index: ModelIndex,
    patterns: Pattern | Iterable[Pattern] | None,
    excluded: set[nn.Module],
    targets: list[TargetWeight],
) -> list[TargetWeight]:
    """The parameters that ``target_parameters`` names and ``targets`` does not have yet."""
    if patterns is None:
        return []
    further: dict[TargetWeight, None] = {}
    for pattern, parameters in matches("target_parameters", patterns, index.parameters).items():
        for module, name in parameters:
            spec = parameter_spec(module, name)
            if isinstance(spec, str):
                raise TypeError(
                    f"target_parameters={pattern!r} matches {index.parameters[module, name][0]!r}, "
                    f"but {spec}"
                )
            if module not in excluded and TargetWeight(module, spec) not in targets:
                further[TargetWeight(module, spec)] = None
    return list(further)


def _check(index: ModelIndex, targets: list[TargetWeight]) -> None:
    """Raise if there is no target, or if one is on the meta device."""
    if not targets:
        known = ", ".join(
            repr(index.name(module)) + " (output head)" * (module in index.heads)
            for module in index.supported
        )
        raise ValueError(
            "target_modules, less exclude_modules and modules_to_save, must leave a layer to "
            f"adapt, but leave none; layers of the model that can be adapted: {known or 'none'}; "
            "for classes of your own see randlora.register"
        )
    for module, spec in targets:
        weight = None if spec.unreadable else module._parameters.get(spec.parameter)
        if device_of(module).type == "meta" if weight is None else weight.is_meta:
            raise ValueError(
                f"model must have real weights, but {index.name(module)!r} is on the meta device; "
                "materialise the model first"
            )


def _refuse_unsupported(index: ModelIndex, pattern: Pattern, hits: set[nn.Module]) -> None:
    """Raise if a target pattern selects no layer that can be adapted, or names one that cannot be.

    A container with layers beneath it is not a layer, even if it has a parameter of its own (for
    example, a position embedding). A module class of torch with a parameter is a layer.
    """

    def empty(modules: Iterable[nn.Module]) -> bool:
        return all(isinstance(index.specs.get(m, ""), str) for m in beneath(modules))

    nothing = empty(hits)
    by_name = isinstance(pattern, str) and NAME.fullmatch(pattern)
    for module in index.names:
        if module not in hits or isinstance(reason := index.specs[module], list):
            continue
        layer = any(True for _ in module.parameters(recurse=False)) and (
            empty([module]) or type(module).__module__.startswith("torch.")
        )
        if nothing or (by_name and layer):
            raise TypeError(
                f"target_modules={pattern!r} matches {index.name(module)!r}, but {reason}"
            )


def left_out(index: ModelIndex) -> dict[str, str]:
    """The layers and stacks of matrices that could be adapted and are not: the reasons, by name."""
    why: dict[nn.Module, str] = dict.fromkeys(index.supported, "not a target")
    why |= index.heads
    for module, specs in index.specs.items():
        if isinstance(specs, str) and not isinstance(handler_of(module), str):
            why[module] = specs
    frozen = {module for module in index.names if not state_of(module).fully_trained}
    layers = frozen & why.keys()
    left = {
        index.name(module): why[module]
        for module in index.names
        if module in layers and not any(state_of(module).all_updates())
    }
    for (module, name), names in index.parameters.items():  # stacks, such as fused experts
        updates, handler = state_of(module).active_updates, handler_of(module)
        if isinstance(handler, str) and module in frozen and name not in updates:
            spec = parameter_spec(module, name)
            if isinstance(spec, WeightSpec) and spec.stack:
                left[names[0]] = f"{STACK} {spec}, which target_parameters adapts"
    return left
