"""Find the modules or parameters that a name, a regular expression or a predicate selects."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeGuard

from torch import nn

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Pattern: TypeAlias = str | re.Pattern[str]
Target: TypeAlias = Pattern | Iterable[Pattern] | Predicate
Parameter: TypeAlias = tuple[nn.Module, str]  # a module, and the name of its parameter
Names: TypeAlias = Mapping[Any, list[str]]  # every dotted name of each module or parameter

NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")


def selected(argument: str, target: Target | None, names: Names) -> set[nn.Module]:
    """The modules of any type that ``target`` selects, with all modules beneath them."""
    if target is None:
        return set()
    if is_predicate(target):
        chosen = {m for m, aliases in names.items() if any(target(name, m) for name in aliases)}
    else:
        chosen = set().union(*matches(argument, target, names).values())
    return beneath(chosen)


def is_predicate(target: Any) -> TypeGuard[Predicate]:
    """Whether ``target`` is a predicate and not a pattern."""
    return callable(target) and not isinstance(target, type | nn.Module)


def beneath(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules, and all modules inside them."""
    return {inner for module in modules for inner in module.modules()}


def matches(argument: str, target: Any, names: Mapping[Any, list[str]]) -> dict[Pattern, set[Any]]:
    """What each pattern matches, out of ``names``; a pattern that matches nothing is an error."""
    if isinstance(target, str | re.Pattern):
        target = [target]
    if not isinstance(target, Iterable):
        raise TypeError(
            f"{argument} must be a name, a regular expression, a list of these or a predicate, got "
            f"{target!r} of type {type(target).__name__}"
            + "; for a class: lambda name, module: isinstance(module, …)"
            * isinstance(target, type)
        )
    hits: dict[Pattern, set[Any]] = {}
    for pattern in target:
        fits = _compile(argument, pattern).fullmatch
        hits[pattern] = {m for m, aliases in names.items() if any(map(fits, aliases))}
        if not hits[pattern]:  # it may be a name that contains special characters
            hits[pattern] = {m for m, aliases in names.items() if pattern in aliases}
        if not hits[pattern]:
            full = [name for aliases in names.values() for name in aliases]
            known = sorted({*full, *(name.split(".")[-1] for name in full)})
            close = difflib.get_close_matches(str(pattern), known)
            hint = f"; close to it: {', '.join(map(repr, close))}" if close else ""
            what = "parameter" if argument == "target_parameters" else "module"
            raise ValueError(f"{argument}={pattern!r} matches no {what} of the model{hint}")
    return hits


def _compile(argument: str, pattern: Any) -> re.Pattern[str]:
    """The regular expression that the full dotted name must match."""
    if isinstance(pattern, re.Pattern):
        return pattern
    if not isinstance(pattern, str):
        raise TypeError(
            f"{argument} must hold names and regular expressions, got {pattern!r} of type "
            f"{type(pattern).__name__}"
        )
    if NAME.fullmatch(pattern):
        return re.compile(rf"(.+\.)?{re.escape(pattern)}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{argument} must hold names and regular expressions, but {pattern!r} is neither: "
            f"{error}"
        ) from error
