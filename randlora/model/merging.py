"""Merge, unmerge and unload adapters. An error leaves every module as it was.

Merging never writes the base weights. A merged layer stores ``W0 + ΔW``, rounded once, beside
``W0`` and computes with it. Therefore:

- unmerging is exact in every dtype, however often it is done;
- a module that shares ``W0``, such as a tied embedding, does not change;
- the ``state_dict`` is the same, merged or not, so loading it cannot apply an update twice.

The adapted weights take their memory a second time, until :func:`unload`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from randlora.core.checks import as_real
from randlora.model.index import (
    TRAINED_BESIDES,
    ModelT,
    active_adapter,
    adapted_modules,
    check_adapter_exists,
    require_groups,
    walk,
)
from randlora.modules.adapted import plain_class, remove
from randlora.modules.effective import merged_weight, set_merged_weight, weighted_sum
from randlora.modules.sharding import is_sharded, leave, note_trained
from randlora.modules.state import state_of, tensor_of
from randlora.modules.weight_update import weight_name


def merge(model: ModelT) -> ModelT:
    """Compute ``W0 + ΔW`` of every adapted weight once; the model is then as fast as a plain one.

    Merged weights are computed by this call, and again by another ``merge``, ``load_state_dict``,
    :func:`randlora.load_adapter`, ``.to`` and copying. Nothing else updates them: after an
    optimiser, an average of weights or ``.data`` has written into ``Λ``, ``Γ`` or ``W0``, call
    ``merge`` again. A merged layer cannot be trained: to use it in training mode, with gradients
    recorded, is an error.

    The ``state_dict`` does not change, so ``save_pretrained`` of a merged model writes the base
    weights. Pass it :func:`merged_state_dict` to write the merged ones.

    Returns:
        ``model``.

    Raises:
        TypeError: if a layer has an unreadable (quantised) weight.
        ValueError: if no layer of ``model`` is adapted, or an effective weight is not finite.
            Nothing is merged then.
    """
    modules = adapted_modules(model)
    merged = _merged_weights(modules)
    for name, module in modules.items():
        for parameter, weight in merged[name].items():
            set_merged_weight(module, parameter, weight)
        module._randlora.merged = True
    return model


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the plain model, with the active adapter merged into it.

    It has the names of the plain model and loads into it.
    ``model.save_pretrained(folder, state_dict=randlora.merged_state_dict(model))`` writes a
    transformers model that needs no adapter. ``model`` does not change.

    Returns:
        The effective weights, each rounded once to its dtype; the adapter's copies of parameters
        and buffers; and all other tensors. Only effective weights are new tensors.

    Raises:
        TypeError: if a layer has an unreadable (quantised) weight.
        ValueError: if no layer of ``model`` is adapted, or an effective weight is not finite.
    """
    modules = adapted_modules(model)
    active_adapter(modules)
    merged = _merged_weights(modules)
    paths = {module: name for name, module in modules.items()}
    ours: set[str] = set()
    replaced: dict[str, Tensor] = {}
    plain: dict[str, str] = {}  # names without wrappers, by those with them
    for path, full, module in walk(model):
        prefix, whole = (f"{name}." if name else "" for name in (path, full))
        names = (*module._parameters.keys(), *module._buffers.keys())  # ScriptModules have no dicts
        plain |= {whole + name: prefix + name for name in names}
        if module in paths:
            state = state_of(module)
            ours |= {prefix + key for name in state.adapter_names for key in state.keys_of(name)}
            tensors = merged[paths[module]] | _copies(module, state.active)
            replaced |= {prefix + name: tensor.detach() for name, tensor in tensors.items()}
    state_dict = {plain.get(name, name): t for name, t in model.state_dict().items()}
    return {name: replaced.get(name, t) for name, t in state_dict.items() if name not in ours}


def unmerge(model: ModelT) -> ModelT:
    """Undo :func:`merge`: the layers compute from ``W0`` and the update again, and can be trained.

    ``W0`` is bit for bit what it was. Layers that are not merged do not change.

    Returns:
        ``model``.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    for module in adapted_modules(model).values():
        module._randlora.merged = False
        module._randlora.merged_weights = {}
    return model


def unload(model: ModelT, *, merge: bool | Mapping[str, float] = False) -> ModelT:
    """Make the model plain again. Each layer gets its class back and keeps its hooks and buffers.

    Args:
        model: an adapted model.
        merge: False discards all adapters. True merges the active adapter into the weights, each
            rounded once to its dtype, and discards the others. A mapping merges a weighted sum of
            adapters: ``{"one": 0.7, "other": 0.3}`` gives ``W0 + 0.7 ΔW_one + 0.3 ΔW_other``. For
            modules trained in full, the weighted differences are added to the original. Moving
            buffers are averaged with these weights; integer ones are those of the adapter with the
            largest weight. A merged weight is a new parameter: a tied module keeps the old one.

    Returns:
        ``model``. What ``inject`` froze stays frozen. Merged ``modules_to_save`` are the trained
        parameters.

    Raises:
        TypeError: if ``merge`` is neither a bool nor a mapping from names to numbers, a layer is of
            a user's subclass of :class:`RandLoRALinear` and so was never plain, or a weight to be
            merged is unreadable.
        ValueError: if no layer of ``model`` is adapted or has an adapter of a given name, or a
            weight would not be finite. Nothing is changed then.
    """
    if not isinstance(merge, bool | Mapping):
        raise TypeError(
            f"merge must be True or False, or a mapping from names to numbers, got {merge!r}"
        )
    modules = adapted_modules(model)
    weights: dict[str, float] = {}
    if isinstance(merge, Mapping):
        if not merge:
            raise ValueError("merge must name an adapter, got an empty mapping")
        for adapter in merge:
            check_adapter_exists(modules, adapter)
        weights = {name: as_real(f"merge[{name!r}]", value) for name, value in merge.items()}
    for name, module in modules.items():
        if plain_class(module) is None:
            raise TypeError(
                f"model must have layers that were plain before, but {name!r} is a "
                f"{type(module).__name__}, a subclass of RandLoRALinear"
            )
    require_groups(model, modules)
    new: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    if weights:
        stores: dict[Any, Any] = {}
        made: dict[Any, Tensor] = {}
        for name, module in modules.items():
            adapters = [module._randlora.updates.get(adapter, {}) for adapter in weights]
            for parameter in dict.fromkeys(p for updates in adapters for p in updates):
                compute = partial(weighted_sum, module, parameter, weights, stores)
                new[name][parameter] = _checked(name, module, parameter, compute)
            new[name] |= _weighted_copies(module, weights, made)
    elif merge:
        new = _merged_weights(modules)
        for name, module in modules.items():
            new[name] |= _copies(module, module._randlora.active)
    for name, module in modules.items():
        remove(module, new.pop(name))
    leave(model)
    note_trained(model)
    for module in model.modules():
        vars(module).pop(TRAINED_BESIDES, None)
    return model


def _copies(module: Any, adapter: str) -> dict[str, Tensor]:
    """The copies of an adapter in a module, by the names of the originals."""
    copies = module._randlora.copies.get(adapter, {})
    found = {name: tensor_of(module, key) for name, key in copies.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def _weighted_copies(
    module: Any, weights: Mapping[str, float], made: dict[Any, Tensor]
) -> dict[str, Tensor]:
    """The weighted sums of the copies that adapters have in a module, by name.

    A parameter is the original plus the weighted differences to it. A buffer is the weighted
    average, because a variance must stay positive. ``made`` has the sums of other modules, so that
    tied parameters stay tied.
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
                raise ValueError(f"the sum for {name!r} of a {type(module).__name__} is NaN")
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


def _checked(name: str, module: Any, parameter: str, compute: Callable[[], Tensor]) -> Tensor:
    """A merged weight, after checking that the base weight is readable and the result finite."""
    updates = [u for u in module._randlora.all_updates() if u.spec.parameter == parameter]
    if any(update.spec.unreadable for update in updates):
        raise TypeError(
            f"{name!r} cannot be merged: the base weight of a {module._randlora_base.__name__} is "
            "not a tensor to add to"
        )
    if is_sharded(module._parameters.get(parameter)):
        raise TypeError(
            f"{name!r} cannot be merged: its {parameter} is sharded; save the adapter, and merge "
            "the file into a model that is not sharded"
        )
    weight = compute()
    if not weight.isfinite().all():
        raise ValueError(
            f"the effective weight of {weight_name(name, parameter)!r} must be finite to be merged,"
            " but has values that are infinite or NaN"
        )
    return weight


def _merged_weights(modules: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The effective weights of all active updates, by module and parameter, or raise."""
    return {
        name: {
            parameter: _checked(name, module, parameter, partial(merged_weight, module, parameter))
            for parameter in module._randlora.active_updates
        }
        for name, module in modules.items()
    }
