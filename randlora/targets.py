"""Which weights of a model are meant: those of its layers, less the output head, or those named.

It reads a model, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from randlora.adapted import Adapted, own_names, plain_class, state_of
from randlora.adapters import Site
from randlora.handlers import handler_of, is_opaque, parameter_site, sites_of
from randlora.patterns import (
    NAME,
    Names,
    Parameter,
    Pattern,
    Target,
    beneath,
    is_predicate,
    matches,
    modules_by_name,
    selected,
)

__all__ = [
    "BESIDES",
    "NEW_TASK",
    "Place",
    "check_targets",
    "chosen_weights",
    "device_of",
    "further_parameters",
    "left_out",
    "moving_buffers",
    "names_of",
    "output_heads",
    "parameter_names",
    "stacks",
    "supported_layers",
    "tensor_names",
]

# Usual names of output heads, and whether they are those of a new task, and of no language model.
_HEADS = {
    "classifier": True,
    "embed_out": False,
    "fc": True,
    "head": True,
    "heads": True,
    "lm_head": False,
    "logits": False,
    "score": True,
}
_LAST = "output head: the last layer, called {!r}"
NEW_TASK = {_LAST.format(name) for name, new in _HEADS.items() if new}  # why these are heads


# Set on modules: by adapter, the parameters that were trained besides it before it was switched.
BESIDES = "randlora_besides"


class Place(NamedTuple):
    """A weight of a model: which module's, and which."""

    module: nn.Module
    site: Site


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module once, with every dotted name it can be reached by."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules_by_name(model, remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def parameter_names(names: Names) -> dict[Parameter, list[str]]:
    """Each parameter by its module and its name there, with every dotted name."""
    return {
        (module, name): [f"{alias}.{name}" if alias else name for alias in aliases]
        for module, aliases in names.items()
        for name, parameter in module._parameters.items()
        if parameter is not None and name not in own_names(module)
    }


def tensor_names(module: nn.Module) -> list[str]:
    """What a module trained in full holds by itself: its parameters, and buffers that persist."""
    ours = own_names(module)
    tensors = {**module._parameters, **module._buffers}
    return [
        name
        for name, tensor in tensors.items()
        if tensor is not None and name not in ours | module._non_persistent_buffers_set
    ]


def moving_buffers(module: nn.Module) -> list[str]:
    """The buffers of a module that training may move, as it does the statistics of a BatchNorm.

    Those that persist and are floating, or single numbers. What is larger and integer is taken to
    be part of the weights, and so is all that a layer holds whose weight cannot be read.
    """
    if isinstance(module, torch.jit.ScriptModule) or is_opaque(handler_of(module)):
        return []
    if isinstance(module, Adapted) and plain_class(module) is None:
        return []  # of a class of its author's, whose names are what they are
    buffers = [(name, module._buffers.get(name)) for name in tensor_names(module)]
    return [
        name
        for name, buffer in buffers
        if buffer is not None
        and (buffer.is_floating_point() or buffer.is_complex() or buffer.numel() == 1)
    ]


def supported_layers(names: Names) -> dict[nn.Module, list[Site]]:
    """The modules that are adapted unless something is said against it, with their weights."""
    supported = {}
    for module in names:
        handler, sites = handler_of(module), sites_of(module)
        if isinstance(sites, list) and not isinstance(handler, str) and handler.default:
            supported[module] = sites
    return supported


def output_heads(
    model: nn.Module, names: Names, supported: Mapping[nn.Module, Any]
) -> dict[nn.Module, str]:
    """The layers that map to the outputs, and what says so: the model, a tied weight, a name."""
    heads: dict[nn.Module, str] = {}
    if supported:
        last = list(supported)[-1]
        parts = [name.split(".") for name in names[last]]
        if called := _HEADS.keys() & {end for part in parts for end in (part[0], part[-1])}:
            heads[last] = _LAST.format(min(called))
    embeddings = {id(m._parameters.get("weight")) for m in names if isinstance(m, nn.Embedding)}
    for module in supported:
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in embeddings:
            heads[module] = "output head: its weight is an embedding's too"
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        with suppress(AttributeError, NotImplementedError):  # a transformers model without a head
            head = ask()
            if isinstance(head, nn.Module) and head in supported:
                heads[head] = "output head: the model says so"
    return heads


def chosen_weights(
    names: Names,
    supported: Mapping[nn.Module, list[Site]],
    heads: Mapping[nn.Module, str],
    target: Target | None,
    exclude: Target | None,
    saved: set[nn.Module],
) -> list[Place]:
    """The weights to adapt, in the order of the model."""
    chosen: set[nn.Module]
    sites = dict(supported)
    if target is None:
        chosen = {m for m in supported if m not in heads}
    elif is_predicate(target):
        chosen = {m for m in supported if any(target(name, m) for name in names[m])}
    else:
        hits = matches("target_modules", target, names)
        for pattern, modules in hits.items():
            _refuse_unsupported(pattern, modules, names)
        named = set().union(*hits.values())
        for module in named - set(supported):  # embeddings, where they are meant themselves
            if isinstance(found := sites_of(module), list):
                sites[module] = found
        chosen = beneath(named) & set(sites)
    chosen -= selected("exclude_modules", exclude, names) | saved
    return [Place(m, site) for m in names if m in chosen for site in sites[m]]


def further_parameters(
    names: Names,
    targets: list[Place],
    patterns: Pattern | Iterable[Pattern] | None,
    exclude: Target | None,
    saved: set[nn.Module],
) -> list[Place]:
    """The parameters to adapt that ``target_parameters`` names."""
    further: dict[Place, None] = {}
    if patterns is None:
        return []
    out = selected("exclude_modules", exclude, names) | saved
    known = parameter_names(names)
    for pattern, parameters in matches("target_parameters", patterns, known).items():
        for module, name in parameters:
            site = parameter_site(module, name)
            if isinstance(site, str):
                raise TypeError(
                    f"target_parameters={pattern!r} matches {known[module, name][0]!r}, but {site}"
                )
            if module not in out and Place(module, site) not in targets:
                further[Place(module, site)] = None
    return list(further)


def check_targets(
    names: Names,
    supported: Mapping[nn.Module, Any],
    heads: Mapping[nn.Module, str],
    targets: list[Place],
) -> None:
    """Raise unless there is something to adapt, and all of it has values."""
    if not targets:
        known = ", ".join(repr(names[m][0]) + " (output head)" * (m in heads) for m in supported)
        raise ValueError(
            "target_modules, less exclude_modules and modules_to_save, must leave a layer to "
            f"adapt, but leave none; layers of the model that can be adapted: {known or 'none'}"
        )
    for module, site in targets:
        weight = module._parameters.get(site.parameter)
        if device_of(module).type == "meta" if site.opaque or weight is None else weight.is_meta:
            raise ValueError(
                f"model must have real weights, but {names[module][0]!r} is on the meta device; "
                "materialise the model first"
            )


def device_of(module: nn.Module) -> torch.device:
    """Where a module is: where its first tensor is that says so."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _refuse_unsupported(pattern: Pattern, hits: set[nn.Module], names: Names) -> None:
    """Raise if a target pattern selects no supported layer, or names an unsupported one itself.

    A container with supported layers beneath it may well hold a parameter of its own, say an
    embedding of positions; a layer of torch's that holds one is a layer.
    """

    def empty(modules: Iterable[nn.Module]) -> bool:
        return all(isinstance(sites_of(m), str) for m in beneath(modules))

    nothing = empty(hits)
    by_name = isinstance(pattern, str) and NAME.fullmatch(pattern)
    for module in names:
        reason = sites_of(module) if module in hits else None
        layer = any(True for _ in module.parameters(recurse=False)) and (
            empty([module]) or type(module).__module__.startswith("torch.")
        )
        if isinstance(reason, str) and (nothing or (by_name and layer)):
            raise TypeError(
                f"target_modules={pattern!r} matches {names[module][0]!r}, but {reason}"
            )


def left_out(model: nn.Module) -> dict[str, str]:
    """The layers of a kind that is adapted that are not, and why, by name."""
    names = names_of(model)
    supported = supported_layers(names)
    why: dict[nn.Module, str] = dict.fromkeys(supported, "not a target")
    why |= output_heads(model, names, supported)
    for module in names:
        sites = sites_of(module)
        if isinstance(sites, str) and not isinstance(handler_of(module), str):
            why[module] = sites
    return {
        names[module][0]: why[module]
        for module in names
        if module in why and not any(state_of(module).all()) and not state_of(module).in_full
    }


def stacks(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Stacks of matrices that are held by modules of no kind that is adapted, with their shapes.

    Fused experts are such: only ``target_parameters`` adapts them.
    """
    names = names_of(model)
    return {
        known[0]: tuple(module._parameters[name].shape)  # type: ignore[union-attr]
        for (module, name), known in parameter_names(names).items()
        if isinstance(handler_of(module), str)
        and name not in state_of(module).current
        and not state_of(module).in_full
        and isinstance(site := parameter_site(module, name), Site)
        and site.stack
    }
