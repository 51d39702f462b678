"""``inject``: the only code that changes other people's models."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias, TypeGuard, TypeVar

from torch import nn

from randlora._checks import as_positive_int, as_scaling
from randlora.bases import KINDS, BasisBank
from randlora.layers import Adaptation, RandLoRALinear, Settings, unsupported

__all__ = ["SAVED", "adapter_parameters", "inject"]

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Pattern: TypeAlias = str | re.Pattern[str]
Target: TypeAlias = Pattern | Iterable[Pattern] | Predicate
_Names: TypeAlias = dict[nn.Module, list[str]]
ModelT = TypeVar("ModelT", bound=nn.Module)

_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")
_HEADS = {"classifier", "embed_out", "fc", "head", "heads", "lm_head", "logits", "score"}
SAVED = "randlora_saved"  # set on the modules that `modules_to_save` named


def inject(
    model: ModelT,
    rank: int | Mapping[Pattern, int] = 6,
    *,
    target_modules: Target | None = None,
    exclude_modules: Target | None = None,
    basis: str | BasisBank = "dense",
    alpha: float | None = None,
    dropout: float = 0.0,
    num_bases: int | None = None,
    seed: int = 0,
    modules_to_save: Target | None = None,
) -> ModelT:
    """Adapt the linear layers of ``model`` in place with RandLoRA, freeze the rest and return it.

    At once after the call the output of the model is bit for bit what it was, and all names in its
    ``state_dict`` are what they were, beside the new ``randlora_lambda`` and ``randlora_gamma``.
    Only these, and the parameters of ``modules_to_save``, require gradients. An error leaves the
    model as it was.

    **Patterns.** A string of word characters, hyphens and dots is a name, and matches the modules
    whose dotted names end in it, component by component: ``"attn"`` matches ``blocks.0.attn`` and
    not ``blocks.0.cross_attn``. Any other string, or a compiled pattern, is a regular expression
    for the full dotted name. What lies beneath a module that matches is selected with it.

    Args:
        model: any module. A module with several names is adapted once, by any of its names.
        rank: ``r``, the rank of one basis; or a mapping from patterns to ranks, of which the first
            that matches a layer counts. A layer with a smaller ``p = min(out, in)`` gets ``p``.
        target_modules: which layers to adapt: patterns, or a predicate ``(name, module) -> bool``
            that is asked about each supported layer. By default every supported layer but the
            output head: what ``model.get_output_embeddings()`` returns, what shares its weight with
            an embedding, and the last layer where it goes by a usual name (``head``, ``lm_head``,
            ``classifier``, ``fc``, ``score``, …).
        exclude_modules: which of these to leave out, in the same form.
        basis: the kind of the bases, or a :class:`BasisBank` of your own. A ``very_sparse`` bank
            that is made here has ``s = √q`` of the largest layer that could be a default target, so
            that it does not depend on what is adapted.
        alpha: ``scaling`` is ``alpha / rank``; by default ``alpha = rank``, see
            :class:`RandLoRALinear`. A lowered rank does not change the scaling.
        dropout: probability, in ``[0, 1)``, of zeroing an input of an update while training.
        num_bases: ``n``, by default ``ceil(p / r)`` for full rank; lowered to that where larger.
        seed: of the bases; goes with a ``basis`` that is a kind.
        modules_to_save: which modules to train in full, in the same form; these are not adapted.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument is of the wrong type, or a name matches a module that is not
            supported.
        ValueError: if a value is out of range, a pattern matches nothing, no layer is left to
            adapt, a layer is on the meta device, or the model is adapted already.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> model = inject(model, rank=4)
        >>> sum(p.numel() for p in adapter_parameters(model))
        2176
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    names = _names(model)
    for module, aliases in names.items():
        if isinstance(module, RandLoRALinear):
            raise ValueError(
                f"model must be plain, but its layer {aliases[0]!r} is adapted already"
            )

    supported = [m for m in names if isinstance(m, nn.Linear) and unsupported(m) is None]
    heads = _output_heads(model, names, supported)
    saved = _covered("modules_to_save", modules_to_save, names)
    for module in saved:
        for name, parameter in module.named_parameters(recurse=False):
            trainable = parameter.is_floating_point() or parameter.is_complex()
            if not trainable or parameter.is_inference():
                what = "an inference tensor" if trainable else parameter.dtype
                raise TypeError(
                    f"modules_to_save must be trainable, but {names[module][0]!r} has {name!r}, "
                    f"{what}"
                )
    targets = _targets(names, supported, heads, target_modules, exclude_modules, saved)
    settings = _settings(names, targets, rank, alpha, dropout, num_bases)
    bank = _bank(basis, seed, [m for m in supported if m not in heads] or targets)

    adaptations = [Adaptation(layer, settings[layer], bank) for layer in targets]
    for adaptation in adaptations:  # all have reserved their sizes
        adaptation.draw_bases()

    # All that can fail is done.
    model.requires_grad_(False)
    for adaptation in adaptations:
        adaptation.apply()
    for module in saved:
        module.requires_grad_(True)
        setattr(module, SAVED, True)
    return model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: ``Λ`` and ``Γ`` of each adapted layer, then the ``modules_to_save``.

    Each parameter comes once, in the order of ``model.modules()``; for the optimiser.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    adapters: dict[nn.Parameter, None] = {}
    saved: dict[nn.Parameter, None] = {}
    for module in model.modules():
        if isinstance(module, RandLoRALinear):
            adapters |= dict.fromkeys((module.randlora_lambda, module.randlora_gamma))
        if getattr(module, SAVED, False):
            saved |= dict.fromkeys(module.parameters())
    if not adapters:
        raise ValueError("model must be adapted, but it has no RandLoRALinear; see randlora.inject")
    return list(adapters | saved)


# --- collecting: nothing below changes a model ---------------------------------------------------


def _names(model: nn.Module) -> _Names:
    """Each module once, with every dotted name it can be reached by."""
    names: _Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _output_heads(model: nn.Module, names: _Names, supported: list[nn.Linear]) -> set[nn.Module]:
    """The layers that map to the outputs: as the model says, by a tied weight, or by their name."""
    heads: set[nn.Module] = set()
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        with suppress(AttributeError, NotImplementedError):  # a transformers model without a head
            heads.add(ask())
    embeddings = {id(m.weight) for m in names if isinstance(m, nn.Embedding)}
    heads.update(layer for layer in supported if id(layer.weight) in embeddings)
    if supported:
        parts = [name.split(".") for name in names[supported[-1]]]
        if _HEADS & {end for part in parts for end in (part[0], part[-1])}:
            heads.add(supported[-1])
    return heads & set(supported)


def _targets(
    names: _Names,
    supported: list[nn.Linear],
    heads: set[nn.Module],
    target: Target | None,
    exclude: Target | None,
    saved: set[nn.Module],
) -> list[nn.Linear]:
    """The layers to adapt, in the order of the model."""
    chosen: set[nn.Module]
    if target is None:
        chosen = {m for m in supported if m not in heads}
    elif _is_predicate(target):
        chosen = {m for m in supported if any(target(name, m) for name in names[m])}
    else:
        hits = _hits("target_modules", target, names)
        for pattern, modules in hits.items():
            _refuse_unsupported(pattern, modules, names)
        chosen = _beneath(set().union(*hits.values())) & set(supported)
    chosen -= _covered("exclude_modules", exclude, names) | saved
    targets = [m for m in supported if m in chosen]
    if not targets:
        known = ", ".join(repr(names[m][0]) + " (output head)" * (m in heads) for m in supported)
        raise ValueError(
            "target_modules, less exclude_modules and modules_to_save, must leave a layer to "
            f"adapt, but leave none; layers of the model that can be adapted: {known or 'none'}"
        )
    for layer in targets:
        if layer.weight.is_meta:
            raise ValueError(
                f"model must have real weights, but {names[layer][0]!r} is on the meta device; "
                "materialise the model first"
            )
    return targets


def _settings(
    names: _Names,
    targets: list[nn.Linear],
    rank: int | Mapping[Pattern, int],
    alpha: float | None,
    dropout: float,
    num_bases: int | None,
) -> dict[nn.Linear, Settings]:
    """What each layer becomes; a rank or number of bases too large for some layers is lowered."""
    ranks = _ranks(names, targets, rank)
    sizes = {layer: min(layer.in_features, layer.out_features) for layer in targets}
    for asked in set(ranks.values()):
        largest = max(p for layer, p in sizes.items() if ranks[layer] == asked)
        if asked > largest:
            raise ValueError(
                "rank must be at most the largest min(in_features, out_features) of the layers it "
                f"is for, here {largest}, got {asked}"
            )
    num_bases = None if num_bases is None else as_positive_int("num_bases", num_bases)

    settings = {}
    for layer, p in sizes.items():
        asked, r = ranks[layer], min(ranks[layer], p)
        n = None if num_bases is None else min(num_bases, -(-p // r))
        fitting = Settings.of(layer, rank=r, dropout=dropout, num_bases=n)
        scaling = 1.0 if alpha is None else as_scaling(alpha, asked)
        settings[layer] = replace(fitting, scaling=scaling, asked_rank=asked)
    if num_bases is not None and all(s.num_bases < num_bases for s in settings.values()):
        largest = max(s.num_bases for s in settings.values())
        raise ValueError(
            "num_bases must be at most the largest ceil(p / rank) of the layers, here "
            f"{largest}, got {num_bases}"
        )
    return settings


def _ranks(
    names: _Names, targets: list[nn.Linear], rank: int | Mapping[Pattern, int]
) -> dict[nn.Linear, int]:
    if not isinstance(rank, Mapping):
        return dict.fromkeys(targets, as_positive_int("rank", rank))
    table = {
        pattern: as_positive_int(f"rank[{pattern!r}]", value) for pattern, value in rank.items()
    }
    covered = {pattern: _beneath(hits) for pattern, hits in _hits("rank", table, names).items()}
    for pattern, modules in covered.items():
        if modules.isdisjoint(targets):
            raise ValueError(f"rank has a pattern, {pattern!r}, for no layer that is adapted")
    ranks = {}
    for layer in targets:
        matching = [pattern for pattern, modules in covered.items() if layer in modules]
        if not matching:
            raise ValueError(
                f"rank must have a pattern for every layer to adapt, but {names[layer][0]!r} "
                f"matches none of {', '.join(map(repr, table))}"
            )
        ranks[layer] = table[matching[0]]
    return ranks


def _bank(basis: str | BasisBank, seed: int, layers: list[nn.Linear]) -> BasisBank:
    if isinstance(basis, BasisBank):
        if seed not in (0, basis.seed):
            raise ValueError(f"seed must be that of the bank given as basis, {basis!r}, got {seed}")
        return basis
    if not isinstance(basis, str):
        raise TypeError(f"basis must be a kind or a BasisBank, got {type(basis).__name__}")
    if basis not in KINDS:
        raise ValueError(f"basis must be a BasisBank or one of {', '.join(KINDS)}, got {basis!r}")
    sparsity = None
    if basis == "very_sparse":
        q = max(max(layer.in_features, layer.out_features) for layer in layers)
        sparsity = max(2.0, math.sqrt(q))
    return BasisBank(basis, seed=seed, sparsity=sparsity)


# --- patterns ------------------------------------------------------------------------------------


def _covered(argument: str, target: Target | None, names: _Names) -> set[nn.Module]:
    """The modules of any type that ``target`` selects, with all beneath them."""
    if target is None:
        return set()
    if _is_predicate(target):
        chosen = {m for m, aliases in names.items() if any(target(name, m) for name in aliases)}
    else:
        chosen = set().union(*_hits(argument, target, names).values())
    return _beneath(chosen)


def _is_predicate(target: Any) -> TypeGuard[Predicate]:
    return callable(target) and not isinstance(target, type | nn.Module)


def _beneath(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {inner for module in modules for inner in module.modules()}


def _hits(argument: str, target: Any, names: _Names) -> dict[Pattern, set[nn.Module]]:
    """What each pattern matches; a pattern that matches nothing is an error."""
    if isinstance(target, str | re.Pattern):
        target = [target]
    if not isinstance(target, Iterable):
        raise TypeError(
            f"{argument} must be a name, a regular expression, a list of these or a predicate, got "
            f"{target!r} of type {type(target).__name__}"
        )
    hits: dict[Pattern, set[nn.Module]] = {}
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
            raise ValueError(f"{argument}={pattern!r} matches no module of the model{hint}")
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
    if _NAME.fullmatch(pattern):
        return re.compile(rf"(.+\.)?{re.escape(pattern)}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{argument} must hold names and regular expressions, but {pattern!r} is neither: "
            f"{error}"
        ) from error


def _refuse_unsupported(pattern: Pattern, hits: set[nn.Module], names: _Names) -> None:
    """Raise if a target pattern selects no supported layer, or names an unsupported one itself.

    A container with supported layers beneath it may well hold a parameter of its own, say an
    embedding of positions; a layer of torch's that holds one is a layer.
    """

    def empty(modules: Iterable[nn.Module]) -> bool:
        return all(unsupported(m) is not None for m in _beneath(modules))

    nothing = empty(hits)
    by_name = isinstance(pattern, str) and _NAME.fullmatch(pattern)
    for module in names:
        reason = unsupported(module) if module in hits else None
        layer = any(True for _ in module.parameters(recurse=False)) and (
            empty([module]) or type(module).__module__.startswith("torch.")
        )
        if reason is not None and (nothing or (by_name and layer)):
            raise TypeError(
                f"target_modules={pattern!r} matches {names[module][0]!r}, but {reason}"
            )
