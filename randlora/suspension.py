"""For a time, in one context, some states do not count.

A depth, counted by those that hold: whatever order they are left in, and in whichever thread, what
is left holds no more; and no copy of a state carries one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

__all__ = ["Local", "Suspension", "innermost", "suspended"]


class State(Protocol):
    """What can be suspended: it knows the suspensions that hold, all of them and its thread's."""

    suspensions: list[Suspension]
    local: Local


class Suspension:
    """One `suspended` that holds, or held."""

    def __init__(self, states: Iterable[State]) -> None:
        self.states = frozenset(states)
        self.holds = True
        self.task = backward_task()
        self.scratch: dict[tuple[State, str], Any] = {}  # what is to be forgotten with it


class Local(threading.local):
    """The suspensions of one state that one thread entered: what a compiler can guard."""

    def __init__(self) -> None:
        self.suspensions: list[Suspension] = []


SUSPENSIONS: ContextVar[tuple[Suspension, ...]] = ContextVar("randlora_suspensions", default=())
_COUNTING = threading.Lock()


def backward_task() -> int:
    """The number of the backward that is under way in this thread; -1 where there is none."""
    return torch._C._current_graph_task_id()


def innermost(state: State) -> Suspension | None:
    """The last suspension of a state that holds in this context; in compiled code, in this thread.

    Autograd's own threads, of which each device has one, know no context: there it is the last one
    of any.
    """
    if not state.suspensions:
        return None
    if torch.compiler.is_compiling():  # which guards an attribute, by thread, but no context
        found = [suspension for suspension in state.local.suspensions if suspension.holds]
    elif isinstance(threading.current_thread(), threading._DummyThread):
        found = state.suspensions
    else:
        found = [s for s in SUSPENSIONS.get() if s.holds and state in s.states]
    return found[-1] if found else None


@contextmanager
def suspended(states: Iterable[State]) -> Iterator[None]:
    """Within it, in this context, no adapter of these states counts.

    Each entering is undone by its own leaving, whatever the order and the thread of that. Compiled
    code knows threads, and no contexts.
    """
    suspension = Suspension(states)
    with _COUNTING:
        for state in suspension.states:
            state.suspensions = [*state.suspensions, suspension]
    SUSPENSIONS.set((*_holding(SUSPENSIONS.get()), suspension))
    for state in suspension.states:
        state.local.suspensions = [*_holding(state.local.suspensions), suspension]
    try:
        yield
    finally:
        suspension.holds = False
        with _COUNTING:
            for state in suspension.states:
                state.suspensions = list(_holding(state.suspensions))
        SUSPENSIONS.set(_holding(SUSPENSIONS.get()))
        for state in suspension.states:
            state.local.suspensions = list(_holding(state.local.suspensions))
        suspension.scratch.clear()


def _holding(suspensions: Iterable[Suspension]) -> tuple[Suspension, ...]:
    return tuple(suspension for suspension in suspensions if suspension.holds)
