"""``inject``: index the model, choose weights, check the arguments, prepare, install."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from randlora.bases.bank import BasisBank
from randlora.bases.peft_rule import PEFT_KINDS, PeftBank
from randlora.bases.streams import KINDS
from randlora.core.checks import as_positive_int
from randlora.model.choosing import TargetWeight, chosen_weights
from randlora.model.index import NEW_TASK, ModelIndex, ModelT
from randlora.model.installing import install, prepare, untrainable
from randlora.model.patterns import Pattern, Target, beneath, matches, selected
from randlora.modules.state import state_of
from randlora.modules.weight_update import (
    DEFAULT,
    Settings,
    WeightSpec,
    check_adapter_name,
    weight_name,
)


def inject(
    model: ModelT,
    rank: int | Mapping[Pattern, int] = 8,
    *,
    target_modules: Target | None = None,
    exclude_modules: Target | None = None,
    target_parameters: Pattern | Iterable[Pattern] | None = None,
    basis: str | BasisBank = "isometric",
    alpha: float | None = None,
    dropout: float = 0.0,
    num_bases: int | None = None,
    train_a: bool = False,
    seed: int = 0,
    modules_to_save: Target | None = None,
    adapter: str = DEFAULT,
) -> ModelT:
    """Adapt the layers of ``model`` in place with RandLoRA, freeze the rest and return it.

    Right after the call the model computes bit for bit what it did with frozen weights. The names
    in its ``state_dict`` stay; new ones are added for the adapter. Only the adapter is trained:
    ``Λ``, ``Γ`` and with ``train_a`` ``A`` of each adapted weight, and ``modules_to_save``. An
    error leaves the model as it was.

    **An adapter is everything that its training changes**: ``Λ``, ``Γ``, a trained ``A``, the
    ``modules_to_save``, and buffers that training moves, such as the statistics of a BatchNorm.
    Each adapter has its own copies of the parameters in ``modules_to_save`` and of such buffers.
    ``model.head.weight`` is then the copy of the active adapter, and the original keeps its name in
    the ``state_dict``. Switching, disabling, saving, loading and unloading an adapter apply to all
    of these.

    **Patterns.** A string of word characters, hyphens and dots is a name. It matches every module
    whose dotted name ends in it, component by component: ``"attn"`` matches ``blocks.0.attn`` and
    not ``blocks.0.cross_attn``. Any other string, and a compiled pattern, is a regular expression
    that must match the full dotted name. A pattern also selects what lies beneath a module that it
    matches.

    Args:
        model: any module. A module that has several names is adapted once, by any of its names.
        rank: ``r``, the rank of one basis; or a mapping from patterns to ranks, in which the first
            pattern that matches a layer decides. A layer with ``p = min(out, in)`` below the rank
            gets ``p``.
        target_modules: which layers to adapt: patterns, or a predicate ``(name, module) -> bool``
            that is called for each supported layer except embeddings. By default every supported
            layer except embeddings and the output head. The output head is what
            ``model.get_output_embeddings()`` returns, a layer that shares its weight with an
            embedding, and the last layer if it has a usual name (``head``, ``lm_head``,
            ``classifier``, ``fc``, ``score``, …). An embedding is adapted only if a pattern matches
            the embedding itself.
        exclude_modules: which of these layers to leave out: patterns or a predicate.
        target_parameters: patterns for the dotted names of further parameters, which a module uses
            itself: matrices ``out × in``, or stacks of them such as ``experts × out × in``.
        basis: the kind of the bases, or a :class:`BasisBank`. For the kind ``very_sparse`` the
            sparsity is ``√q`` of the largest supported layer except the head, so that it does not
            depend on the targets. The kinds ``peft``, ``peft_sparse`` and ``peft_very_sparse``
            exchange adapters with PEFT (:mod:`randlora.peft`): their bases depend on the targets,
            all layers have one rank, which is not lowered, and ``Λ`` starts at 0.
        alpha: makes ``scaling`` ``alpha / rank``; by default it depends on the sizes of each layer,
            see :class:`RandLoRALinear`. For a rank that was lowered, ``rank`` is the one asked for.
        dropout: probability, in ``[0, 1)``, of zeroing an input of the update in training. It draws
            from torch's generator, so other dropout in the model then draws different numbers.
        num_bases: ``n``, by default ``ceil(p / r)``, which gives full rank. A larger value is
            lowered to that.
        train_a: whether each update gets an ``A`` of its own, which is trained, see
            :class:`RandLoRALinear`. PEFT cannot load such adapters.
        seed: the seed of the bases, if ``basis`` is a kind.
        modules_to_save: which modules to train in full: patterns or a predicate. They are not
            adapted. If this is None and the output head is frozen although its name is that of a
            new task (``classifier``, ``score``, …), there is a warning; ``[]`` avoids it.
        adapter: the name of the adapter. A model may have several adapters. The first is active
            until :func:`set_adapter` changes that. If the model has a bank with the same recipe,
            the new adapter shares it.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument has the wrong type, or a name matches a module that is not
            supported.
        ValueError: if a value is out of range, a pattern matches nothing, no layer is left to
            adapt, a layer is lazy or on the meta device, or the model already has an adapter of
            this name.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> model = inject(model, rank=4)
        >>> sum(p.numel() for p in adapter_parameters(model))
        2176
    """
    index = ModelIndex(model)
    check_adapter_name(adapter)
    banks = _check_model(index, adapter)
    saved = _saved_modules(index, modules_to_save)
    targets = chosen_weights(index, target_modules, exclude_modules, target_parameters, saved)
    bank = _bank(index, targets, basis, seed, rank, banks)
    given: Any = {"alpha": alpha, "dropout": dropout, "train_a": train_a}
    settings = _settings(index, targets, bank, rank, num_bases, **given)
    if modules_to_save is None:
        _warn_of_frozen_heads(index, targets)
    updates = {target: (settings[target], bank) for target in targets}
    install(index, adapter, prepare(index, adapter, updates, saved))
    return model


def _check_model(index: ModelIndex, adapter: str) -> list[BasisBank]:
    """The banks of the model's other adapters, after checking that it can take one more."""
    banks: list[BasisBank] = []
    for module, names in index.names.items():
        state = state_of(module)
        if adapter in state.adapter_names:
            raise ValueError(
                f"model must not be adapted under the name {adapter!r} yet, but its layer "
                f"{names[0]!r} is; to add an adapter, give it another name"
            )
        banks += [update.bank for update in state.all_updates()]
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(
                f"model must have no lazy layers, but {names[0]!r}, a {type(module).__name__}, "
                "has no sizes before it is run; run the model once"
            )
    return banks


def _saved_modules(index: ModelIndex, modules_to_save: Target | None) -> set[nn.Module]:
    """The modules to train in full, after checking that this is possible."""
    saved = selected("modules_to_save", modules_to_save, index.names)
    for module in saved:
        if reason := untrainable(module):
            raise TypeError(
                f"modules_to_save must be trainable, but {index.name(module)!r} has {reason}"
            )
    return saved


def _warn_of_frozen_heads(index: ModelIndex, targets: list[TargetWeight]) -> None:
    """Warn if the head of a new task stays frozen: it is usually random, and useless untrained."""
    adapted = {target.module for target in targets}
    for head, why in index.heads.items():
        if why in NEW_TASK and head not in adapted:
            name = index.name(head)
            warnings.warn(
                f"{name!r} looks like the output head of a new task, and is frozen as it is; "
                f"modules_to_save={name!r} trains it, modules_to_save=[] keeps it frozen without "
                "this warning",
                stacklevel=3,
            )


def _settings(
    index: ModelIndex,
    targets: list[TargetWeight],
    bank: BasisBank,
    rank: int | Mapping[Pattern, int],
    num_bases: int | None,
    **given: Any,
) -> dict[TargetWeight, Settings]:
    """The settings of each update. A rank or number of bases too large for a weight is lowered."""
    ranks = _ranks(index, targets, rank)
    for asked in set(ranks.values()):
        largest = max(target.spec.p for target in targets if ranks[target] == asked)
        if asked > largest and bank.lowers_rank:
            raise ValueError(
                "rank must be at most the largest min(in_features, out_features) of the layers it "
                f"is for, here {largest}, got {asked}"
            )
    num_bases = None if num_bases is None else as_positive_int("num_bases", num_bases)

    settings = {}
    for target, asked in ranks.items():
        p = target.spec.p
        r = min(asked, p) if bank.lowers_rank else asked
        n = None if num_bases is None else min(num_bases, -(-p // r))
        settings[target] = Settings.of(
            target.spec, bank, rank=r, num_bases=n, asked_rank=asked, **given
        )
    if num_bases is not None and all(s.num_bases < num_bases for s in settings.values()):
        largest = max(s.num_bases for s in settings.values())
        raise ValueError(
            "num_bases must be at most the largest ceil(p / rank) of the layers, here "
            f"{largest}, got {num_bases}"
        )
    return settings


def _ranks(
    index: ModelIndex, targets: list[TargetWeight], rank: int | Mapping[Pattern, int]
) -> dict[TargetWeight, int]:
    """The rank that was asked for each target: the first pattern that matches it decides."""
    if not isinstance(rank, Mapping):
        return dict.fromkeys(targets, as_positive_int("rank", rank))
    table = {
        pattern: as_positive_int(f"rank[{pattern!r}]", value) for pattern, value in rank.items()
    }
    ranks: dict[TargetWeight, int] = {}
    for pattern, found in matches("rank", table, {**index.names, **index.parameters}).items():
        modules = beneath(m for m in found if isinstance(m, nn.Module))
        covered = [
            t for t in targets if t.module in modules or (t.module, t.spec.parameter) in found
        ]
        if not covered:
            raise ValueError(f"rank must match adapted layers only, but {pattern!r} matches none")
        for target in covered:
            ranks.setdefault(target, table[pattern])
    for target in targets:
        if target not in ranks:
            name = weight_name(index.name(target.module), target.spec.parameter)
            raise ValueError(
                f"rank must have a pattern for every layer to adapt, but {name!r} "
                f"matches none of {', '.join(map(repr, table))}"
            )
    return {target: ranks[target] for target in targets}


def _bank(
    index: ModelIndex,
    targets: list[TargetWeight],
    basis: str | BasisBank,
    seed: int,
    rank: Any,
    known: list[BasisBank],
) -> BasisBank:
    """The bank given as ``basis``, else the model's bank of this recipe, else a new one."""
    if isinstance(basis, BasisBank):
        if seed not in (0, basis.seed):
            raise ValueError(f"seed must be that of the bank given as basis, {basis!r}, got {seed}")
        return basis
    if not isinstance(basis, str):
        raise TypeError(f"basis must be a kind or a BasisBank, got {type(basis).__name__}")
    if basis not in (*KINDS, *PEFT_KINDS):
        kinds = ", ".join((*KINDS, *PEFT_KINDS))
        raise ValueError(f"basis must be a BasisBank or one of {kinds}, got {basis!r}")
    bank: BasisBank
    specs = [target.spec for target in targets]
    if basis in PEFT_KINDS:
        rank = as_positive_int("rank", rank)  # PEFT has one rank for all layers
        smaller, larger = peft_sizes(specs)
        bank = PeftBank(basis, rank=rank, smaller=smaller, larger=larger, seed=seed)
    else:
        sparsity = None
        if basis == "very_sparse":
            usual = [s for m, own in index.supported.items() if m not in index.heads for s in own]
            sparsity = max(2.0, math.sqrt(max(spec.q for spec in usual or specs)))
        bank = BasisBank(basis, seed=seed, sparsity=sparsity)
    return next((other for other in known if other.same_recipe(bank)), bank)


def peft_sizes(specs: Iterable[WeightSpec]) -> tuple[int, int]:
    """The smaller and the larger side of the bases that PEFT would draw for these weights."""
    sides = [(spec.out, spec.in_) for spec in specs]
    out, in_ = max(out for out, _ in sides), max(in_ for _, in_ in sides)
    return min(out, in_), max(out, in_)
