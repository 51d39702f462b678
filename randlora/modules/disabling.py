"""Disabled scopes: for a time, modules compute without their adapters.

``randlora.disabled`` enters a :class:`DisabledScope` for the adapter states of a model. A state is
disabled while any of its scopes is open. So scopes may overlap, and may be left in any order and
from any thread.

A scope applies in the context (:mod:`contextvars`) that entered it: other threads go on using the
adapter. Compiled code cannot read context variables, so there a scope applies in the thread that
entered it. Copies and pickles of a state have no scopes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch


class SupportsDisabling(Protocol):
    """An object that can be disabled, such as an ``AdapterState``."""

    disabled_scopes: list[DisabledScope]  # its open scopes, of all contexts and threads
    thread_scopes: ThreadScopes  # its open scopes that the current thread entered


class DisabledScope:
    """One entered :func:`disabled_scope`."""

    def __init__(self, states: Iterable[SupportsDisabling]) -> None:
        self.states = frozenset(states)
        self.is_open = True
        self.backward_task = backward_task_id()  # the backward pass in which it was entered, or -1
        # Buffers that modules in training mode write within the scope. They are dropped at its end.
        self.temporary_buffers: dict[tuple[SupportsDisabling, str], Any] = {}


class ThreadScopes(threading.local):
    """The open scopes of one state that the current thread entered."""

    def __init__(self) -> None:
        self.scopes: list[DisabledScope] = []  # Dynamo guards it, so compiled code sees changes


_CONTEXT_SCOPES: ContextVar[tuple[DisabledScope, ...]] = ContextVar(
    "randlora_disabled_scopes", default=()
)
# For `disabled_scopes`, which threads share. The garbage collector may close an abandoned scope in
# the thread that holds the lock, so the lock is re-entrant. The code that was interrupted may then
# put the closed scope back into a list, so readers look at `is_open`.
_SCOPES_LOCK = threading.RLock()


def backward_task_id() -> int:
    """Return the number of the backward pass that runs in this thread, or -1."""
    return torch._C._current_graph_task_id()


def innermost_scope(state: SupportsDisabling) -> DisabledScope | None:
    """Return the last entered scope that disables a state in this context, or None."""
    if not state.disabled_scopes:
        return None
    if torch.compiler.is_compiling():
        found = [scope for scope in state.thread_scopes.scopes if scope.is_open]
    elif isinstance(threading.current_thread(), threading._DummyThread):
        # Backward may run in a thread without the caller's context: use the scopes of all contexts.
        found = list(_open_scopes(state.disabled_scopes))
    else:
        found = [s for s in _CONTEXT_SCOPES.get() if s.is_open and state in s.states]
    return found[-1] if found else None


@contextmanager
def disabled_scope(states: Iterable[SupportsDisabling]) -> Iterator[None]:
    """Disable adapters within a ``with`` block, in the current context."""
    scope = DisabledScope(states)
    with _SCOPES_LOCK:
        for state in scope.states:
            state.disabled_scopes = [*_open_scopes(state.disabled_scopes), scope]
            state.thread_scopes.scopes = [*_open_scopes(state.thread_scopes.scopes), scope]
    _CONTEXT_SCOPES.set((*_open_scopes(_CONTEXT_SCOPES.get()), scope))
    try:
        yield
    finally:
        scope.is_open = False
        with _SCOPES_LOCK:
            for state in scope.states:
                state.disabled_scopes = list(_open_scopes(state.disabled_scopes))
                state.thread_scopes.scopes = list(_open_scopes(state.thread_scopes.scopes))
        _CONTEXT_SCOPES.set(_open_scopes(_CONTEXT_SCOPES.get()))
        scope.temporary_buffers.clear()


def _open_scopes(scopes: Iterable[DisabledScope]) -> tuple[DisabledScope, ...]:
    return tuple(scope for scope in scopes if scope.is_open)
