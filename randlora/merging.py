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

import torch
from torch import Tensor, nn

from randlora._checks import as_real
from randlora.adapted import (
    active_adapter,
    adapted_modules,
    fold,
    form,
    plain_class,
    remove,
    state_of,
    tensor_of,
    uninstall,
    weighted,
)
from randlora.adapters import check_adapter_name, weight_name
from randlora.injection import train
from randlora.patterns import walk
from randlora.suspension import suspended
from randlora.targets import BESIDES

__all__ = [
    "check_weights",
    "delete_adapter",
    "disabled",
    "merge",
    "merged_state_dict",
    "set_adapter",
    "unload",
    "unmerge",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


def merge(model: ModelT) -> ModelT:
    """Have every adapted layer compute with ``W0 + ΔW``, formed once: no cost beyond a plain model.

    The weights are those of the moment of the call. They are formed again by another ``merge``, by
    ``load_state_dict``, :func:`randlora.load_adapter`, ``.to`` and copying; and by nothing else:
    what an optimiser, an average of weights or ``.data`` writes into ``Λ``, ``Γ`` or ``W0`` counts
    once ``merge`` is called again. Merged layers do not train: in training mode, with gradients
    recorded, using one is an error.

    The ``state_dict`` is what it was, so the model's own ``save_pretrained`` writes the frozen
    weights. :func:`merged_state_dict` is that of the merged model.

    Returns:
        ``model``.

    Raises:
        TypeError: if a layer has a weight that cannot be read, a quantised one.
        ValueError: if no layer of ``model`` is adapted, or an effective weight is not finite; then
            nothing is merged.
    """
    modules = adapted_modules(model)
    formed = _form_all(modules)
    for name, module in modules.items():
        for parameter, weight in formed[name].items():
            fold(module, parameter, weight)
        module._randlora.merged = True
    return model


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the plain model with the active adapter in its weights.

    Its names are those of the plain model, so it loads there, and
    ``model.save_pretrained(folder, state_dict=randlora.merged_state_dict(model))`` writes a model
    of transformers that needs no adapter. The model stays as it is, merged or not.

    Returns:
        The effective weights, each rounded once to its dtype; what the adapter trained in full, the
        buffers that moved; and the rest, all but these without copying.

    Raises:
        TypeError: if a layer has a weight that cannot be read, a quantised one.
        ValueError: if no layer of ``model`` is adapted, or an effective weight is not finite.
    """
    modules = adapted_modules(model)
    active_adapter(modules)
    formed = _form_all(modules)
    first = {module: name for name, module in modules.items()}
    ours: set[str] = set()
    counting: dict[str, Tensor] = {}
    plain: dict[str, str] = {}  # names without wrappers, by those with them
    for path, full, module in walk(model):
        prefix, whole = (f"{name}." if name else "" for name in (path, full))
        plain |= {whole + name: prefix + name for name in (*module._parameters, *module._buffers)}
        if module in first:
            state = state_of(module)
            ours |= {prefix + key for name in state.names for key in state.keys(name)}
            tensors = formed[first[module]] | _copies(module, state.active)
            counting |= {prefix + name: tensor.detach() for name, tensor in tensors.items()}
    state_dict = {plain.get(name, name): t for name, t in model.state_dict().items()}
    return {name: counting.get(name, t) for name, t in state_dict.items() if name not in ours}


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
        module._randlora.folded = {}
    return model


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Within it, ``model`` computes as if it had not been adapted, to the bit, merged or not.

    So do ``modules_to_save`` and the statistics of a BatchNorm; what training moves of the latter
    within it is forgotten. It holds in the context, and so in the thread, that entered it: others
    go on computing with the adapter, and a copy made within it is not disabled. In compiled code it
    holds in the thread.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    with suspended([module._randlora for module in adapted_modules(model).values()]):
        yield model


def set_adapter(model: ModelT, adapter: str) -> ModelT:
    """Have the adapter of this name count, and be trained, in the place of the one that did.

    The parameters of the others are frozen, and lose their gradients. A layer without an update of
    this name computes as it did before any. An optimiser that was made before does not know the
    parameters of this adapter: make one from :func:`adapter_parameters` now. Between a forward and
    its backward the adapter is not to be changed: a checkpointed part raises then.

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
        module._randlora.activate(adapter)
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
        merge: whether the active adapter goes into the model, each weight rounded once to its
            dtype, instead of being discarded as the others are; or which adapters, by name, and how
            much of each: ``{"one": 0.7, "other": 0.3}``. The weights that took them up are new
            parameters: what shared the old one keeps it. Of what adapters trained in full the
            differences to the originals are added so; buffers that moved are averaged by the
            weights (integer ones are those of the adapter with the most).

    Returns:
        ``model``. What ``inject`` froze stays frozen; ``modules_to_save`` that were merged are the
        parameters that were trained.

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
        made: dict[Any, Tensor] = {}
        for name, module in modules.items():
            adapters = module._randlora.adapters
            named = [u for adapter in weights for u in adapters.get(adapter, {}).values()]
            for parameter in dict.fromkeys(update.site.parameter for update in named):
                _check_readable(name, module, parameter)
                new[name][parameter] = weighted(module, parameter, weights, stores)
                _check_finite(name, parameter, new[name][parameter])
            new[name] |= weighted_copies(module, weights, made)
    elif merge:
        new = _form_all(modules)
        for name, module in modules.items():
            new[name] |= _copies(module, module._randlora.active)
    for name, module in modules.items():
        remove(module, new.pop(name))
    for module in model.modules():
        vars(module).pop(BESIDES, None)
    return model


def _copies(module: Any, adapter: str) -> dict[str, Tensor]:
    """What an adapter has copies of in a module, by the names of the originals."""
    found = {}
    for name, key in module._randlora.copies.get(adapter, {}).items():
        if (tensor := tensor_of(module, key)) is not None:
            found[name] = tensor
    return found


@torch.no_grad()
def weighted_copies(
    module: Any, weights: Mapping[str, float], made: dict[Any, Tensor]
) -> dict[str, Tensor]:
    """The originals with the weighted differences of copies added, of a module, by name.

    Buffers are averaged: a variance is none any more once differences are added to it.

    ``made`` holds those of modules before, so that what was tied stays so.
    """
    copies = {adapter: _copies(module, adapter) for adapter in weights}
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for ours in copies.values() for name in ours):
        base = tensor_of(module, name)
        if base is None:
            continue
        terms = [(weight, copies[a][name]) for a, weight in weights.items() if name in copies[a]]
        key = (id(base), *(id(tensor) for _, tensor in terms))
        if key not in made:
            total = _sum(base.detach(), terms, average=name in module._buffers)
            if total.isnan().any():
                raise ValueError(f"the sum for {name!r} of a {type(module).__name__} is no number")
            made[key] = nn.Parameter(total) if isinstance(base, nn.Parameter) else total
        found[name] = made[key]
    return found


def _sum(base: Tensor, terms: list[tuple[float, Tensor]], *, average: bool) -> Tensor:
    most = max(terms, key=lambda term: term[0])[1]
    if not (base.is_floating_point() or base.is_complex()) or [w for w, _ in terms] == [1]:
        return most.detach().clone()
    wide = torch.promote_types(base.dtype, torch.float32)
    if average and (whole := sum(abs(weight) for weight, _ in terms)):
        return sum(abs(w) / whole * t.to(wide) for w, t in terms).to(base.dtype)  # type: ignore[union-attr]
    moved = sum(weight * (tensor.to(wide) - base.to(wide)) for weight, tensor in terms)
    return (base.to(wide) + moved).to(base.dtype)


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
    known = dict.fromkeys(name for module in modules.values() for name in module._randlora.names)
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


def _form_all(modules: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """All effective weights of the active updates, by module and parameter, or raise."""
    formed: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for name, module in modules.items():
        for parameter in module._randlora.current:
            _check_readable(name, module, parameter)
            formed[name][parameter] = form(module, parameter)
            _check_finite(name, parameter, formed[name][parameter])
    return formed
