"""``AdaptedModule``, the base of all adapted classes; installing and removing adapters.

Adapting a module changes its class, in place, to a subclass of its class and of
:class:`AdaptedModule`. The module keeps its identity, its hooks and its parameters: ``W0`` stays
registered under its name, so the keys of the ``state_dict`` do not change, and ``Λ``, ``Γ`` and
copies are registered beside it. :class:`AdaptedModule` overrides how a module assigns, deletes,
moves, loads and saves its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from randlora.modules.effective import buffer_write_key, refresh_merged_weights
from randlora.modules.sharding import is_fsdp_class, is_sharded
from randlora.modules.state import (
    AdapterState,
    base_tensors,
    reset_copy,
    state_of,
    tensor_of,
    tensors_equal,
    thread_id,
)
from randlora.modules.weight_update import WeightUpdate


class AdaptedModule:
    """The base of the class of every adapted module.

    It adds to a module only the attribute ``_randlora``, parameters whose names end in
    ``randlora_lambda``, ``randlora_gamma`` or ``randlora_a``, and parameters and buffers with
    ``randlora_copy_`` in their names. All other names are left to the author of the module.
    """

    _randlora_base: ClassVar[type[nn.Module]]
    _randlora: AdapterState
    _parameters: dict[str, nn.Parameter | None]

    @staticmethod
    def _randlora_removed(module: Any) -> None:
        """Clean up, after ``module`` became plain again. Subclasses override this."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Assign a parameter, or the active adapter's copy of it. If it has an update, raise."""
        state: AdapterState | None = vars(self).get("_randlora")
        if state is not None and not state.reads_base and is_sharded(param):
            bool(self._distribute_module_applied)
        if state is not None and not state.reads_base and param is not self._parameters.get(name):
            update = state.active_update(name)
            # A quantised layer may put its own weight in order while it is called.
            called = thread_id() in state.call_caches
            if update is not None and not (update.spec.unreadable and called):
                raise RuntimeError(
                    f"{name} of a {type(self).__name__} is W0 + ΔW and cannot be assigned, because "
                    "ΔW would be added to the new value too. To replace W0, assign within "
                    "randlora.disabled(model). To continue from W0 + ΔW, call "
                    "randlora.unload(model, merge=True) first"
                )
            name = state.active_copy(name) or name
        super().register_parameter(name, param)  # type: ignore[misc]

    @property
    def _distribute_module_applied(self) -> _Refusal:
        """Torch reads this first of all when it distributes a module by tensor parallelism."""
        return _Refusal(
            f"a {type(self).__name__} cannot be distributed by tensor parallelism, because it is "
            "adapted; leave it out of the plan"
        )

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Assign a buffer, or the active adapter's copy of it."""
        state = state_of(self)
        key: str | None = name
        if not state.reads_base and any(name in copies for copies in state.copies.values()):
            key = buffer_write_key(self, name, tensor)
        if key is not None:
            super().register_buffer(key, tensor, persistent)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        state = state_of(self)
        for adapter in () if state.reads_base else state.adapter_names:
            if name in state.updates.get(adapter, {}) or name in state.copies.get(adapter, {}):
                raise RuntimeError(  # parametrizing a tensor deletes it, too
                    f"{name} of a {type(self).__name__} cannot be deleted or parametrized, because "
                    f"adapter {adapter!r} adapts it; do it before randlora.inject, or call "
                    "randlora.unload first"
                )
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = _weight_placements(self)
        super()._apply(fn, recurse)  # type: ignore[misc]
        after = _weight_placements(self)
        for update, old, new in zip(state_of(self).all_updates(), before, after, strict=True):
            if old != new:
                update.forget_bases()
                update.draw_bases(self)  # type: ignore[arg-type]
        state_of(self).one_token = None
        refresh_merged_weights(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for update in state_of(self).all_updates():
            update.draw_bases(self)  # type: ignore[arg-type]
        refresh_merged_weights(self)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *reports: list[str]
    ) -> None:
        missing, _, errors = reports
        state, errors_before = state_of(self), len(errors)
        unchanged_copies = {
            (adapter, name, key)
            for adapter, copies in state.copies.items()
            for name, key in copies.items()
            if tensors_equal(tensor_of(self, name), tensor_of(self, key))
        }
        with base_tensors(state):
            super()._load_from_state_dict(  # type: ignore[misc]
                state_dict, prefix, metadata, strict, *reports
            )
        for adapter in state.adapter_names:
            keys = [prefix + key for key in state.keys_of(adapter)]
            saved_with = metadata.get("randlora", ())
            if adapter not in saved_with and not any(key in state_dict for key in keys):
                # The checkpoint is of the plain model, or of one without this adapter. So no key of
                # the adapter is missing, and it keeps its values. But copies that were equal to
                # their originals get the loaded values too.
                missing[:] = [key for key in missing if key not in keys]
                for owner, name, key in unchanged_copies:
                    loaded = prefix + name in state_dict and len(errors) == errors_before
                    if owner == adapter and loaded:
                        reset_copy(self, name, key)
        refresh_merged_weights(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        state = state_of(self)
        with base_tensors(state):  # some modules read attributes to save them
            super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and state.adapter_names:
            # If keys of these adapters are lost, loading reports them as missing.
            metadata["randlora"] = state.adapter_names


class _Refusal(NamedTuple):
    """Raises an error when its truth is asked for. Reading it, as a debugger does, is safe."""

    reason: str

    def __bool__(self) -> bool:
        raise RuntimeError(self.reason)


def _weight_placements(module: Any) -> list[Any]:
    """Return device and dtype of each adapted weight; those of ``Λ`` if it is unreadable."""
    placements = []
    for update in state_of(module).all_updates():
        name = update.parameter_names[0] if update.spec.unreadable else update.spec.parameter
        weight = module._parameters.get(name)
        placements.append(None if weight is None else (weight.device, weight.dtype))
    return placements


def plain_class(module: AdaptedModule) -> type[nn.Module] | None:
    """Return the class that a module had before it was adapted.

    None means that it was never plain: its class is the user's own subclass of ``RandLoRALinear``.
    """
    cls: Any = classes_in_front(module)[-1]
    return cls._randlora_base if "_randlora_base" in vars(cls) else None


def classes_in_front(module: Any) -> list[type]:
    """Return the classes that torch put in front of a module's own class, then that class.

    FSDP does so, and ``torch.nn.utils.parametrize``, for a tensor that is not adapted.
    """
    found: list[type] = [type(module)]
    while _is_in_front(found[-1]):
        found.append(found[-1].__bases__[-1])
    return found


def _is_in_front(cls: type) -> bool:
    parametrized = cls.__module__ == parametrize.__name__ and "_randlora_base" not in vars(cls)
    return parametrized or is_fsdp_class(cls)


def change_class(module: Any, new: type) -> None:
    """Change the own class of a module, and keep the classes in front of it."""
    *front, own = classes_in_front(module)
    for cls in reversed(front):
        bases = (*cls.__bases__[:-1], new)
        contents = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        own, new = cls, type(cls.__name__.replace(own.__name__, new.__name__), bases, contents)
    object.__setattr__(module, "__class__", new)


def reset(module: Any, draw: Callable[[], None]) -> None:
    """Initialise the base weights of a module by ``draw``, and reset all its adapters."""
    # The module's __init__ calls this, too, before there is a state.
    state: AdapterState = vars(module).get("_randlora") or AdapterState()
    with base_tensors(state):
        draw()
    for update in state.all_updates():
        update.reset(*update.parameters(module))
    for copies in state.copies.values():
        for name, key in copies.items():
            reset_copy(module, name, key)
    refresh_merged_weights(module)


def install(
    module: Any,
    adapter: str,
    updates: Mapping[WeightUpdate, tuple[nn.Parameter, ...]],
    copies: Mapping[str, tuple[str, Tensor]],
    *,
    fully_trained: bool,
) -> None:
    """Add an adapter to a module: its updates with their trained tensors, and its copies.

    ``copies`` maps the name of an original to the key and the tensor of its copy. The caller
    changes the module's class to an adapted one.
    """
    state: AdapterState = vars(module).setdefault("_randlora", AdapterState())
    for update, parameters in updates.items():
        state.updates.setdefault(adapter, {})[update.spec.parameter] = update
        for key, parameter in zip(update.parameter_names, parameters, strict=True):
            module._parameters[key] = parameter
    for original, (key, copied) in copies.items():
        state.copies.setdefault(adapter, {})[original] = key
        registry = module._parameters if isinstance(copied, nn.Parameter) else module._buffers
        registry[key] = copied
    if fully_trained:
        state.fully_trained.add(adapter)


def uninstall(module: Any, adapter: str) -> None:
    """Remove one adapter. A module without any other adapter becomes plain again."""
    if {*module._randlora.adapter_names} <= {adapter} and plain_class(module) is not None:
        remove(module)
    else:
        _delete_adapter(module, adapter)


def _delete_adapter(module: Any, adapter: str) -> None:
    state: AdapterState = module._randlora
    for key in state.keys_of(adapter):
        if parametrize.is_parametrized(module, key):
            parametrize.remove_parametrizations(module, key)
        for registry in (module._parameters, module._buffers):
            registry.pop(key, None)
    state.one_token = None
    state.updates.pop(adapter, None)
    state.copies.pop(adapter, None)
    state.fully_trained.discard(adapter)


def remove(module: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Make an adapted module plain again, with new values for the named parameters and buffers.

    A parameter among the values is registered as it is. Any other value for a parameter becomes a
    new parameter with the old ``requires_grad``.
    """
    plain, state = plain_class(module), module._randlora
    assert plain is not None
    for name, tensor in (tensors or {}).items():
        base = module._parameters.get(name)
        if base is None:
            module._buffers[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            module._parameters[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=base.requires_grad)
    for adapter in state.adapter_names:
        _delete_adapter(module, adapter)
    removed = type(module)._randlora_removed
    del vars(module)["_randlora"]
    change_class(module, plain)
    removed(module)
