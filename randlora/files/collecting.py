"""Collect the data of an adapter from a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from randlora.bases.bank import BasisBank
from randlora.files.adapter_data import BASE, RESERVED, AdapterData, samples
from randlora.model.index import (
    TRAINED_BESIDES,
    ModelIndex,
    active_adapter,
    adapted_modules,
    check_adapter_exists,
    join,
    moving_buffers,
    tensor_names,
)
from randlora.modules.sharding import whole
from randlora.modules.state import adapter_keys, state_of, tensor_of, tensors_equal
from randlora.modules.weight_update import Settings, WeightSpec


def _saved(modules: Mapping[str, Any], adapter: str) -> dict[str, Tensor]:
    """The copies of an adapter by the names of the originals, without buffers that did not move."""
    saved: dict[str, Tensor] = {}
    for path, module in modules.items():
        state = module._randlora
        for name, key in state.copies.get(adapter, {}).items():
            copied = tensor_of(module, key)
            if copied is None:
                raise ValueError(
                    f"model must be whole to be saved, but {join(path, name)!r} was set to None"
                )
            moves = name in module._buffers and adapter not in state.fully_trained
            if not (moves and tensors_equal(tensor_of(module, name), copied)):
                saved[join(path, name)] = whole(copied.detach())
    return saved


def _besides(model: nn.Module, adapter: str, include: bool | None) -> dict[str, Tensor]:
    """The tensors that training changed but the adapter has no copies of, by name.

    These are parameters that were trained beside the adapter, and moving buffers around a
    ``RandLoRALinear`` that was put into its model by hand. If there are such parameters,
    ``include=None`` is an error, and so is True if one has an update: a file cannot store both.
    """
    trained: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    updated = []
    for module, (path, *_) in ModelIndex(model).names.items():
        state = state_of(module)
        known = {*state.copies.get(adapter, {}), *adapter_keys(module)}
        parameters = dict(module._parameters.items())  # those of a ScriptModule are not in a dict
        before = vars(module).get(TRAINED_BESIDES, {}).get(adapter, ())
        for name in tensor_names(module):
            parameter = parameters.get(name)
            if name in known:
                continue
            if parameter is not None and (parameter.requires_grad or name in before):
                trained[join(path, name)] = parameter
                if name in state.updates.get(adapter, {}):
                    updated.append(join(path, name))
            elif parameter is None and name in moving_buffers(module):
                buffers[join(path, name)] = cast(Tensor, module._buffers[name])
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
    return {name: whole(t) for name, t in trained.items() if include} | buffers


def collect(
    model: nn.Module,
    adapter: str | None,
    dtype: torch.dtype | None,
    trained_besides: bool | None = None,
) -> AdapterData:
    """The data of an adapter of ``model``; arguments and errors are those of `save_adapter`."""
    from randlora import __version__

    modules = adapted_modules(model)
    adapter = active_adapter(modules) if adapter is None else adapter
    check_adapter_exists(modules, adapter)
    updates: dict[str, tuple[WeightSpec, Settings, int]] = {}
    banks: list[BasisBank] = []
    numbers, base = {}, {}
    trained_a: dict[str, Tensor] = {}
    for path, module in modules.items():
        for parameter, update in module._randlora.updates.get(adapter, {}).items():
            name = join(path, parameter)
            if name == BASE or name.startswith(RESERVED[1:]):
                raise ValueError(f"model must have no weight called {name!r}, to be saved")
            if update.bank not in banks:
                banks.append(update.bank)
            updates[name] = update.spec, update.settings, banks.index(update.bank)
            lam, gamma, *own = (whole(t.detach()).cpu() for t in update.parameters(module))
            packed = [torch.cat([lam, gamma], -1), *(a.clone() for a in own)]
            numbers[name], *own = (t if dtype is None else t.to(dtype) for t in packed)
            if own:
                (trained_a[name],) = own
            if not all(t.isfinite().all() for t in (numbers[name], *own)):
                raise ValueError(
                    f"model must have finite updates to be saved, but that of {name!r} has values "
                    "that are infinite or NaN"
                )
            weight = module._parameters.get(parameter)
            base[name] = samples(weight, update.spec)
    saved = _saved(modules, adapter)
    saved |= _besides(model, adapter, trained_besides)
    for name, tensor in saved.items():
        if tensor.isnan().any():
            raise ValueError(
                f"model must have no NaN values to be saved, but {name!r} has some of them"
            )
    data = AdapterData(
        updates=updates,
        banks=tuple(banks),
        digests=(),
        numbers=numbers,
        trained_a=trained_a,
        base=torch.stack([base[name] for name in sorted(base)]),
        saved={name: tensor.detach().cpu().clone() for name, tensor in saved.items()},  # untied
        modules_to_save=_fully_trained(modules, adapter),
        version=__version__,
    )
    digests = tuple(bank.digest(data.sizes(place)) for place, bank in enumerate(banks))
    return replace(data, digests=digests)


def _fully_trained(modules: Mapping[str, Any], adapter: str) -> tuple[str, ...]:
    return tuple(name for name, m in modules.items() if adapter in m._randlora.fully_trained)
