"""Reading a parameter of an adapted module gives the effective weight, ``W0 + ΔW``.

The properties of an adapted class call :func:`active_tensor`. The rest of this file computes
``ΔW``, merged weights, and weighted sums of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.store import Store
from randlora.core.operators import DenseOperator, Operator
from randlora.modules.disabling import innermost_scope
from randlora.modules.sharding import is_sharded, whole
from randlora.modules.state import AdapterState, saved_tensor_hooks, state_of, tensor_of, thread_id
from randlora.modules.weight_update import WeightUpdate, add_update, factors_of, update_matrix


def active_tensor(module: Any, name: str) -> Tensor:
    """Return what reading a parameter or buffer of an adapted module gives.

    A parameter with an active update gives ``W0 + ΔW``, differentiable in ``W0``, ``Λ`` and ``Γ``.
    It is computed once in each call of the module, and at each read outside of calls; a merged
    module gives the merged weight. A tensor with an active copy gives the copy. All others, and all
    while disabled, give the original; for disabled buffers see :func:`_disabled_buffer`. A sharded
    parameter is returned itself: FSDP, which reads it by its name, means the original.
    """
    base = tensor_of(module, name)
    if base is None:
        raise AttributeError(f"{type(module).__name__} has no {name} yet")
    state: AdapterState | None = vars(module).get("_randlora")
    if state is None or state.reads_base:
        return base
    if type(base) is not nn.Parameter and is_sharded(base) and not state.call_caches:
        return base
    if not state.is_enabled():
        return base if name in module._parameters else _disabled_buffer(module, name, base)
    if (copy_key := state.copies.get(state.active, {}).get(name)) is not None:
        return tensor_of(module, copy_key)  # type: ignore[return-value]  # None if None was assigned
    update = state.active_updates.get(name)
    if update is None:
        return base
    try:
        if state.merged:
            return read_merged_weight(module, name)
        cache = state.call_caches.get(thread_id())
        if cache is None or cache.hooks != saved_tensor_hooks():
            # Other hooks mean a checkpointed part of the call. Backward recomputes this part after
            # the call, without the cache, so the part must not use the cache in the forward either.
            return _compute_effective_weight(module, update)
        cache_key = name, torch.is_grad_enabled(), _in_inference_mode()
        if cache_key not in cache.weights:
            cache.weights[cache_key] = _compute_effective_weight(module, update)
        return cache.weights[cache_key]
    except AttributeError as error:
        # After an AttributeError, Python would call Module.__getattr__, which returns W0.
        raise RuntimeError(f"the effective weight could not be computed: {error}") from error


def _in_inference_mode() -> bool:
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _disabled_buffer(module: Any, name: str, base: Tensor) -> Tensor:
    """Return a buffer while adapters are disabled.

    In training mode it is a temporary copy, which lasts as long as the scope: what a forward writes
    into it (the statistics of a BatchNorm) must not reach the original.
    """
    scope = innermost_scope(module._randlora)
    if scope is None or torch.compiler.is_compiling():
        return base.clone() if module.training else base
    key = module._randlora, name
    if module.training and key not in scope.temporary_buffers:
        scope.temporary_buffers[key] = base.clone()
    return scope.temporary_buffers.get(key, base)  # type: ignore[no-any-return]


def buffer_write_key(module: Any, name: str, value: Any) -> str | None:
    """Return the key to store a new value of a buffer under: the active copy's, or the name.

    While disabled, a module in training mode must not change the original. Then this function
    stores the value in the disabled scope, which drops it at its end, and returns None.
    """
    state: AdapterState = module._randlora
    scope = innermost_scope(state)
    if scope is None or not module.training:
        return state.active_copy(name) or name
    scope.temporary_buffers[state, name] = value
    return None


def frozen_weight(module: Any, name: str) -> Tensor:
    """Return the frozen weight of an adapted module, to compute with it; raise if it is sharded."""
    weight: Tensor | None = module._parameters.get(name)
    if weight is None:
        raise AttributeError(f"{type(module).__name__} has no {name} yet")
    if type(weight) is not nn.Parameter and is_sharded(weight):
        raise RuntimeError(
            f"{name} of a {type(module).__name__} is sharded, so the module cannot be called by "
            "itself; with FSDP, call the module that fully_shard was given; tensor parallelism is "
            "not supported"
        )
    return weight


def _compute_effective_weight(module: Any, update: WeightUpdate) -> Tensor:
    base = frozen_weight(module, update.spec.parameter)
    factors = update.factors(module, base.device, base.dtype)
    token = module._randlora.checkpoint_token
    w = add_update(base, update.spec, update.settings, *factors, token=token)
    return _match_memory_format(w, base)


def _match_memory_format(weight: Tensor, like: Tensor) -> Tensor:
    """Return ``weight`` in the channels-last format if ``like`` is in it.

    Convolutions choose their kernels by memory format. The results equal the plain module's bit for
    bit only if the format is the same.
    """
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.ndim)
    if layout is None or like.is_contiguous() or not like.is_contiguous(memory_format=layout):
        return weight
    return weight.contiguous(memory_format=layout)


def delta_of(module: Any, update: WeightUpdate, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``ΔW``, shape ``(out, in)``, differentiable in what is trained; or a stack of these.

    It is computed in ``dtype``, by default that of the weight; that of ``Λ`` if the weight is
    unreadable. To judge a rank, use float64.
    """
    spec, trained = update.spec, tuple(map(whole, update.parameters(module)))
    lam = trained[0]
    default = (lam if spec.unreadable else module._parameters[spec.parameter]).dtype
    operands: tuple[Tensor, Operator]
    if dtype is None or dtype == default:
        operands = update.operands(lam.device, default)
    else:  # only reports ask for another dtype, so the bank does not keep these bases
        r, p, q, m = update.sizes
        a = update.bank.a(r, p).to(lam.device, dtype)
        operands = a, DenseOperator(update.bank.b(q, m, dtype).to(lam.device))
    return update_matrix(spec, update.settings, *factors_of(trained, operands))


def weighted_sum(
    module: Any, parameter: str, weights: Mapping[str, float], stores: dict[Any, Store]
) -> Tensor:
    """Return ``W0 + Σ w ΔW`` over adapters, without a gradient; ``weights`` maps adapters to ``w``.

    The sum is computed in float32 or wider, and rounded once to the dtype of ``W0``. ``stores``, a
    dict that is empty at first, keeps the bases that are drawn here for the next calls.
    """
    base = module._parameters[parameter]
    with torch.inference_mode(False), torch.no_grad():
        wider = torch.promote_types(base.dtype, torch.float32)
        total = base.to(wider, copy=True)
        for name, weight in weights.items():
            update = module._randlora.updates.get(name, {}).get(parameter)
            if update is None:
                continue
            key = update.bank, base.device, wider
            if key not in stores:
                stores[key] = update.bank.store(base.device, wider)
            factors = factors_of(update.parameters(module), stores[key].operands(*update.sizes))
            delta = update_matrix(update.spec, update.settings, *factors)
            delta = delta.transpose(-1, -2) if update.spec.transposed else delta
            total += weight * delta.reshape(base.shape)
        return _match_memory_format(total.to(base.dtype), base)


def merged_weight(module: Any, parameter: str) -> Tensor:
    """Return ``W0 + ΔW`` of the active update, without a gradient."""
    # In this order: inference_mode(False) turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        return _compute_effective_weight(module, module._randlora.active_updates[parameter])


def set_merged_weight(module: Any, parameter: str, weight: Tensor) -> None:
    """Store ``W0 + ΔW``, with which the merged module computes from now on.

    Writing into ``W0``, ``Λ`` or ``Γ`` does not change it, because there is no reliable way to
    notice that. But while the module has other tensors in their places (as in
    ``torch.func.functional_call``), ``W0 + ΔW`` is computed from those instead.
    """
    update = module._randlora.active_updates[parameter]
    tensors = module._parameters[parameter], *update.parameters(module)
    module._randlora.merged_weights[parameter] = update.names, tensors, weight


def refresh_merged_weights(module: Any) -> None:
    """Compute the merged weights of a module again, if it is merged.

    This cannot wait until they are read: compiled code that reads them cannot compute them. But a
    sharded weight is gathered only in calls, each of which computes it.
    """
    state = state_of(module)
    state.merged_weights.clear()
    if state.merged:
        for parameter in state.active_updates:
            if not is_sharded(module._parameters.get(parameter)):
                set_merged_weight(module, parameter, merged_weight(module, parameter))


def read_merged_weight(module: Any, parameter: str) -> Tensor:
    """Return ``W0 + ΔW`` of a merged module, or raise if it should get a gradient."""
    state: AdapterState = module._randlora
    if module.training and torch.is_grad_enabled():
        update = state.active_updates[parameter]
        if any(tensor.requires_grad for tensor in update.parameters(module)):
            raise RuntimeError(
                f"{type(module).__name__} is merged, so its update gets no gradient; call "
                "randlora.unmerge(model) to train it, or model.eval() to use it"
            )
    if parameter not in state.merged_weights:
        return merged_weight(module, parameter)
    names, tensors, weight = state.merged_weights[parameter]
    if torch.compiler.is_compiling():
        return weight
    own = module._parameters
    for name, tensor in zip(names, tensors, strict=True):
        if own.get(name) is not tensor:
            return merged_weight(module, parameter)
    return weight
