"""The update folded into the weight, left out, changed for another, or taken away; of all or none.

The frozen weights are never written. A merged layer computes with a weight of its own, ``W0 + ΔW``
rounded once, beside ``W0``. So un-merging is exact in every dtype and after any number of times,
what shares the weight (a tied embedding) does not move, and a ``state_dict`` is the same, merged or
not: loading it can apply no update twice. What that costs is the memory of the adapted weights once
more, until :func:`unload`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from randlora._checks import as_real
from randlora.adapted import adapted_modules, fold, plain_class, remove, uninstall, weighted
from randlora.adapters import check_adapter_name, weight_name
from randlora.injection import train
from randlora.targets import SAVED

__all__ = [
    "check_weights",
    "delete_adapter",
    "disabled",
    "merge",
    "set_adapter",
    "unload",
    "unmerge",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


def merge(model: ModelT) -> ModelT:
    """Have every adapted layer compute with ``W0 + ΔW``, formed once: no cost beyond a plain model.

    Merged layers do not train: in training mode, with gradients recorded, using one is an error. A
    merged layer whose parameters are changed, by loading a ``state_dict`` say, forms its weight
    again. Layers that are merged already stay so.

    Returns:
        ``model``.

    Raises:
        TypeError: if a layer has a weight that cannot be read, a quantised one.
        ValueError: if no layer of ``model`` is adapted, or an effective weight is not finite; then
            nothing is merged.
    """
    modules = adapted_modules(model)
    _fold_all(modules)
    for module in modules.values():
        module._randlora.merged = True
    return model


def unmerge(model: ModelT) -> ModelT:
    """Take :func:`merge` back: ``W0`` is what it was to the bit, and the updates can be trained.

    Layers that are not merged stay as they are.

    Returns:
        ``model``.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    for module in adapted_modules(model).values():
        module._randlora.merged = False
        module._randlora.folded.clear()
    return model


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Within it, ``model`` computes as if it had not been adapted, to the bit, merged or not.

    ``modules_to_save`` are what they were trained to.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    states = [module._randlora for module in adapted_modules(model).values()]
    before = [state.enabled for state in states]
    try:
        for state in states:
            state.enabled = False
        yield model
    finally:
        for state, enabled in zip(states, before, strict=True):
            state.enabled = enabled


def set_adapter(model: ModelT, adapter: str) -> ModelT:
    """Have the adapter of this name count, and be trained, in the place of the one that did.

    The parameters of the others are frozen. A layer without an update of this name computes as it
    did before any.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``adapter`` is not a name.
        ValueError: if no layer has an adapter of this name, or the model is merged.
    """
    modules = adapted_modules(model)
    _check_known(modules, adapter)
    if any(module._randlora.merged for module in modules.values()):
        raise ValueError("model must not be merged while its adapter is changed; unmerge it first")
    for module in modules.values():
        module._randlora.active = adapter
    train(model)
    return model


def delete_adapter(model: ModelT, adapter: str) -> ModelT:
    """Take the adapter of this name away, with its parameters; it must not be the active one.

    Layers that had no other are plain again.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``adapter`` is not a name.
        ValueError: if no layer has an adapter of this name, or it is active.
    """
    modules = adapted_modules(model)
    _check_known(modules, adapter)
    if any(module._randlora.active == adapter for module in modules.values()):
        raise ValueError(
            f"adapter must not be the active one, {adapter!r}; set_adapter another one before, or "
            "unload the model"
        )
    for module in modules.values():
        uninstall(module, adapter)
    return model


def unload(model: ModelT, *, merge: bool | Mapping[str, float] = False) -> ModelT:
    """Give back the plain model: each layer the class it had, its hooks and buffers kept.

    Args:
        model: an adapted model.
        merge: whether the active updates go into the weights, each rounded once to its dtype,
            instead of being discarded as the others are; or of which adapters, by name, and how
            much of each: ``{"one": 0.7, "other": 0.3}``. The weights that took them up are new
            parameters: what shared the old one keeps it.

    Returns:
        ``model``. What ``inject`` froze stays frozen, ``modules_to_save`` stay trained.

    Raises:
        TypeError: if ``merge`` is no bool and no mapping of names to numbers, or a layer is of a
            subclass of :class:`RandLoRALinear` of your own, which was never plain, or has a weight
            that cannot be read.
        ValueError: if no layer of ``model`` is adapted, none under a name given, or a weight would
            not be finite; then nothing is changed.
    """
    if not isinstance(merge, bool | Mapping):
        raise TypeError(
            f"merge must be True or False, or a mapping from names to numbers, got {merge!r}"
        )
    modules = adapted_modules(model)
    weights = None if isinstance(merge, bool) else check_weights("merge", merge, modules)
    for name, module in modules.items():
        if plain_class(module) is None:
            raise TypeError(
                f"model must have layers that were plain before, but {name!r} is a "
                f"{type(module).__name__}, a subclass of RandLoRALinear"
            )
    new: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    if weights is not None:
        stores: dict[Any, Any] = {}
        for name, module in modules.items():
            adapters = module._randlora.adapters
            named = [u for adapter in weights for u in adapters.get(adapter, {}).values()]
            for parameter in dict.fromkeys(update.site.parameter for update in named):
                _check_readable(name, module, parameter)
                new[name][parameter] = weighted(module, parameter, weights, stores)
                _check_finite(name, parameter, new[name][parameter])
    elif merge:
        _fold_all(modules)
        for name, module in modules.items():
            new[name] = {p: fold(module, p) for p in module._randlora.current}
    for name, module in modules.items():
        remove(module, new.pop(name))
    for module in model.modules():
        vars(module).pop(SAVED, None)
    return model


def check_weights(
    argument: str, weights: Mapping[str, float], modules: dict[str, Any]
) -> dict[str, float]:
    """How much of which adapter, checked.

    Raises:
        TypeError: if a name or a number is not one.
        ValueError: if there are none, a number is not finite, or no layer has an adapter so called.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"{argument} must be a mapping from names to numbers, got {weights!r}")
    if not weights:
        raise ValueError(f"{argument} must name an adapter")
    for adapter in weights:
        _check_known(modules, adapter)
    return {name: as_real(f"{argument}[{name!r}]", value) for name, value in weights.items()}


def _check_known(modules: dict[str, Any], adapter: str) -> None:
    check_adapter_name(adapter)
    known = dict.fromkeys(name for module in modules.values() for name in module._randlora.adapters)
    if adapter not in known:
        raise ValueError(f"adapter must be one of {', '.join(map(repr, known))}, got {adapter!r}")


def _check_readable(name: str, module: Any, parameter: str) -> None:
    if any(u.site.opaque for u in module._randlora.all() if u.site.parameter == parameter):
        raise TypeError(
            f"{name!r} cannot be merged: the base weight of a {module._randlora_base.__name__} is "
            "not a tensor to add to"
        )


def _check_finite(name: str, parameter: str, weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError(
            f"the effective weight of {weight_name(name, parameter)!r} must be finite to be merged,"
            " but has values that are infinite or no number"
        )


def _fold_all(modules: dict[str, Any]) -> None:
    """Form all effective weights, or raise and keep none that was not there."""
    before = {module: dict(module._randlora.folded) for module in modules.values()}
    try:
        for name, module in modules.items():
            for parameter in module._randlora.current:
                _check_readable(name, module, parameter)
                _check_finite(name, parameter, fold(module, parameter))
    except Exception:
        for module, folded in before.items():
            module._randlora.folded = folded
        raise
