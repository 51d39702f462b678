"""Which modules and parameters a name, a regular expression or a predicate means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeGuard

from torch import nn

__all__ = [
    "NAME",
    "Names",
    "Parameter",
    "Pattern",
    "Predicate",
    "Target",
    "beneath",
    "is_predicate",
    "matches",
    "modules_by_name",
    "selected",
    "walk",
]

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Pattern: TypeAlias = str | re.Pattern[str]
Target: TypeAlias = Pattern | Iterable[Pattern] | Predicate
Parameter: TypeAlias = tuple[nn.Module, str]
Names: TypeAlias = Mapping[Any, list[str]]  # of modules, or of parameters
NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")


def selected(argument: str, target: Target | None, names: Names) -> set[nn.Module]:
    """The modules of any type that ``target`` selects, with all beneath them."""
    if target is None:
        return set()
    if is_predicate(target):
        chosen = {m for m, aliases in names.items() if any(target(name, m) for name in aliases)}
    else:
        chosen = set().union(*matches(argument, target, names).values())
    return beneath(chosen)


def is_predicate(target: Any) -> TypeGuard[Predicate]:
    """Whether ``target`` is a predicate, and no pattern."""
    return callable(target) and not isinstance(target, type | nn.Module)


def beneath(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules and all that lie within them."""
    return {inner for module in modules for inner in module.modules()}


def matches(argument: str, target: Any, names: Mapping[Any, list[str]]) -> dict[Pattern, set[Any]]:
    """What each pattern matches; a pattern that matches nothing is an error."""
    if isinstance(target, str | re.Pattern):
        target = [target]
    if not isinstance(target, Iterable):
        raise TypeError(
            f"{argument} must be a name, a regular expression, a list of these or a predicate, got "
            f"{target!r} of type {type(target).__name__}"
        )
    hits: dict[Pattern, set[Any]] = {}
    for pattern in target:
        fits = _compile(argument, pattern).fullmatch
        hits[pattern] = {m for m, aliases in names.items() if any(map(fits, aliases))}
        if not hits[pattern]:  # a name may hold any letters: taken to the letter it may be one
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
    """The regular expression for the full dotted name that a pattern stands for."""
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


# --- names without wrappers -----------------------------------------------------------------------

# Modules that do nothing but hold one, by class, with the name it has there: names go without it.
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
}


def _wrapped(module: nn.Module) -> str | None:
    """The name in a wrapper of the module that it holds; None for a module that is none."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def modules_by_name(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()``, with the names that there would be without wrappers."""
    walked = walk(model, remove_duplicate=remove_duplicate)
    return ((name, module) for name, _, module in walked)


def walk(
    model: nn.Module, *, remove_duplicate: bool = False
) -> Iterator[tuple[str, str, nn.Module]]:
    """Modules that are no wrappers: names without wrappers, names with them, and the modules."""
    seen: set[nn.Module] = set()

    def beneath(module: nn.Module, name: str, full: str) -> Iterator[tuple[str, str, nn.Module]]:
        while (inner := _wrapped(module)) is not None:
            full = f"{full}.{inner}" if full else inner
            module = module._modules[inner]  # type: ignore[assignment]
        if remove_duplicate and module in seen:
            return
        seen.add(module)
        yield name, full, module
        for part, child in module._modules.items():
            if child is not None:
                names = (f"{path}.{part}" if path else part for path in (name, full))
                yield from beneath(child, *names)

    return beneath(model, "", "")
