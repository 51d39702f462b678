"""The state of an adapted module: its updates, its copies, and which adapter is active.

A module can have several adapters, of which one is active. In a module, an adapter has updates of
weights, and copies: its own versions of parameters that it trains in full and of buffers that
change in training. The originals stay registered under their own names, as the base weights do.

:class:`AdapterState` is the attribute ``_randlora`` of an adapted module. It holds no trained
tensors: these are parameters and buffers of the module, which the state knows by their keys.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randlora.modules.disabling import (
    DisabledScope,
    ThreadScopes,
    backward_task_id,
    innermost_scope,
)
from randlora.modules.sharding import like, whole
from randlora.modules.weight_update import DEFAULT, WeightUpdate


class AdapterState:
    """The adapters of one module, and what its computations depend on."""

    def __init__(self) -> None:
        self.updates: dict[str, dict[str, WeightUpdate]] = {}  # by adapter, then by parameter
        self.copies: dict[str, dict[str, str]] = {}  # keys of copies, by adapter, then original
        self.fully_trained: set[str] = set()  # adapters that train the whole module
        self.active = DEFAULT  # the active adapter, which need not have anything in this module
        self.merged = False  # whether the module computes with merged weights
        # By parameter: names and tensors of what W0 + ΔW was computed from, and W0 + ΔW.
        self.merged_weights: dict[str, tuple[tuple[str, ...], tuple[Tensor, ...], Tensor]] = {}
        self.one_token: Any = None  # a linear layer's prepared call, see `modules.one_token`
        self.call_caches: dict[int, CallCache] = {}  # of each thread that is in a call
        self.reads_base = False  # whether names mean the originals, see `base_tensors`
        self.disabled_scopes: list[DisabledScope] = []
        self.thread_scopes = ThreadScopes()
        # The adapters that calls used since the last `activate`. None stands for a disabled call.
        self.forward_adapters: set[str | None] = set()
        self.earlier_forward_adapters: set[str | None] = set()  # the same, before that `activate`

    def active_update(self, parameter: str) -> WeightUpdate | None:
        """Return the active adapter's update of a parameter; None if disabled or there is none."""
        return self.active_updates.get(parameter) if self.is_enabled() else None

    def active_copy(self, name: str) -> str | None:
        """Return the key of the active adapter's copy; None if disabled or there is none."""
        key = self.copies.get(self.active, {}).get(name)
        return key if key is not None and self.is_enabled() else None

    def is_enabled(self) -> bool:
        """Whether the active adapter is used here: no disabled scope is open in this context."""
        scope = innermost_scope(self) if self.disabled_scopes else None  # mostly without a call
        if not torch.compiler.is_compiling():
            self._check_recomputed(scope)
        return scope is None

    def _check_recomputed(self, scope: DisabledScope | None) -> None:
        """Raise if backward recomputes a forward with an adapter that no forward used.

        For a re-entrant checkpoint this is the only possible check. Other checkpoints also compare
        the tensors that autograd saves, see :attr:`checkpoint_token`.
        """
        adapter, task = None if scope else self.active, backward_task_id()
        known = self.forward_adapters or self.earlier_forward_adapters
        if task == -1:
            self.forward_adapters.add(adapter)
        elif scope is not None and scope.backward_task == task:
            pass  # a hook entered the scope within this backward
        elif known and adapter not in self.forward_adapters:
            names = " or ".join(sorted(map(_describe_adapter, known)))
            raise RuntimeError(
                f"a checkpointed forward ran with {names}, but backward recomputes it with "
                f"{_describe_adapter(adapter)}; keep the same active adapter, and stay inside or "
                "outside of randlora.disabled, until backward is done"
            )

    @property
    def checkpoint_token(self) -> int:
        """A number for the active adapter; 0 if it has nothing here, and in compiled code.

        Autograd functions save a tensor with this number in its shape. A checkpoint compares the
        shapes of saved tensors, so it notices when it recomputes with another adapter.
        """
        if torch.compiler.is_compiling():
            return 0
        return self.adapter_names.index(self.active) + 1 if self.active in self.adapter_names else 0

    def activate(self, adapter: str) -> None:
        """Make ``adapter`` the active one."""
        if adapter != self.active:
            self.active = adapter
            self.earlier_forward_adapters |= self.forward_adapters
            self.forward_adapters = set()

    @property
    def active_updates(self) -> dict[str, WeightUpdate]:
        """The updates of the active adapter by parameter, also while disabled."""
        return self.updates.get(self.active, {})

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that have an update or a copy here."""
        return list(dict.fromkeys((*self.updates, *self.copies)))

    def all_updates(self) -> Iterator[WeightUpdate]:
        """Return the updates of all adapters."""
        for updates in self.updates.values():
            yield from updates.values()

    def keys_of(self, adapter: str) -> list[str]:
        """Return the keys of one adapter's tensors in the module: of updates, then copies."""
        updates = self.updates.get(adapter, {}).values()
        parameters = [name for update in updates for name in update.parameter_names]
        return [*parameters, *self.copies.get(adapter, {}).values()]

    def __getstate__(self) -> dict[str, Any]:
        names = "updates", "copies", "fully_trained", "active", "merged"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        AdapterState.__init__(self)
        vars(self).update(state)


def _describe_adapter(adapter: str | None) -> str:
    return "no adapter" if adapter is None else f"adapter {adapter!r}"


_EMPTY_STATE = AdapterState()  # for plain modules, and for an adapted module that has no state yet


class CallCache:
    """The effective weights computed during one call of a module."""

    def __init__(self) -> None:
        self.hooks = saved_tensor_hooks()  # the cache is used only under these
        # By the name of the parameter, and whether gradients and inference mode are on.
        self.weights: dict[tuple[str, bool, bool], Tensor] = {}


def saved_tensor_hooks() -> Any:
    """Return the hooks that get the tensors autograd saves, or None; a checkpoint has its own."""
    if torch.compiler.is_compiling():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def thread_id() -> int:
    """Return the identifier of the current thread; 0 in compiled code."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


@contextmanager
def base_tensors(state: AdapterState) -> Iterator[None]:
    """Within this context, reading or assigning a name of the module means its original tensor."""
    before, state.reads_base = state.reads_base, True
    try:
        yield
    finally:
        state.reads_base = before


def state_of(module: Any) -> AdapterState:
    """Return the state of a module; an empty one, for reading only, if it has none."""
    return vars(module).get("_randlora", _EMPTY_STATE)  # type: ignore[no-any-return]


def adapter_keys(module: nn.Module) -> set[str]:
    """Return the keys of all tensors in a module that belong to adapters."""
    state = state_of(module)
    return {key for name in state.adapter_names for key in state.keys_of(name)}


def tensor_of(module: Any, name: str) -> Tensor | None:
    """Return the tensor registered as ``name`` itself, not the one that the attribute gives."""
    tensor: Tensor | None = module._parameters.get(name)
    return module._buffers.get(name) if tensor is None else tensor


def tensors_equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same shape and values, or both are None.

    NaN equals NaN. If one is on the ``meta`` device, only the shapes are compared.
    """
    if one is None or other is None or one.shape != other.shape:
        return one is other
    if one.is_meta or other.is_meta:
        return True
    one, other = whole(one), whole(other)
    return bool(((one == other) | ((one != one) & (other != other))).all())


def set_copy(module: Any, key: str, value: Tensor) -> None:
    """Set the copy under ``key`` to ``value``.

    In place if shape, dtype and ``is_meta`` are the same; else the copy becomes a new tensor.
    """
    copied, attributes = tensor_of(module, key), ("shape", "dtype", "is_meta")
    with torch.inference_mode(False), torch.no_grad():
        if copied is not None and all(getattr(copied, a) == getattr(value, a) for a in attributes):
            copied.copy_(like(value, copied))
        elif key in module._parameters:
            trained = copied is None or copied.requires_grad
            module._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=trained)
        else:
            module._buffers[key] = value.detach().clone()


def reset_copy(module: Any, name: str, key: str) -> None:
    """Set the copy under ``key`` to the value of its original, called ``name``."""
    if (base := tensor_of(module, name)) is not None:
        set_copy(module, key, base)
