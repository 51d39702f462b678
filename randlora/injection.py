"""``inject``: the only code that changes other people's models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from randlora._checks import as_positive_int, as_scaling
from randlora.adapted import Adapted, adapted_class, adapted_modules, install
from randlora.adapters import (
    DEFAULT,
    Adapter,
    Settings,
    Site,
    check_adapter_name,
    weight_name,
)
from randlora.bases import BasisBank
from randlora.handlers import handler_of
from randlora.patterns import Names, Pattern, Target, beneath, matches, selected
from randlora.peft_bases import PEFT_KINDS, PeftBank
from randlora.streams import KINDS
from randlora.targets import (
    SAVED,
    Place,
    check_targets,
    chosen_weights,
    device_of,
    further_parameters,
    names_of,
    output_heads,
    parameter_names,
    supported_layers,
)

__all__ = ["adapt", "adapter_parameters", "inject", "train", "untrainable"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def inject(
    model: ModelT,
    rank: int | Mapping[Pattern, int] = 6,
    *,
    target_modules: Target | None = None,
    exclude_modules: Target | None = None,
    target_parameters: Pattern | Iterable[Pattern] | None = None,
    basis: str | BasisBank = "dense",
    alpha: float | None = None,
    dropout: float = 0.0,
    num_bases: int | None = None,
    seed: int = 0,
    modules_to_save: Target | None = None,
    adapter: str = DEFAULT,
) -> ModelT:
    """Adapt the layers of ``model`` in place with RandLoRA, freeze the rest and return it.

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
            that is asked about each supported layer but embeddings, which are adapted only where a
            pattern matches themselves. By default every supported layer but embeddings and the
            output head: what ``model.get_output_embeddings()`` returns, what shares its weight with
            an embedding, and the last layer where it goes by a usual name (``head``, ``lm_head``,
            ``classifier``, ``fc``, ``score``, …).
        exclude_modules: which of these to leave out, in the same form.
        target_parameters: patterns for further parameters, by their own dotted names, that a
            module holds and uses by itself: matrices ``out × in``, or stacks of them such as the
            ``experts × out × in`` of a mixture of experts.
        basis: the kind of the bases, or a :class:`BasisBank` of your own. A ``very_sparse`` bank
            that is made here has ``s = √q`` of the largest layer that could be a default target, so
            that it does not depend on what is adapted. The kinds ``peft``, ``peft_sparse`` and
            ``peft_very_sparse`` are PEFT's own (:mod:`randlora.peft`): these depend on the set of
            targets, take one rank for all and do not lower it, and start from ``Λ = 0``.
        alpha: ``scaling`` is ``alpha / rank``; by default ``alpha = rank``, see
            :class:`RandLoRALinear`. A lowered rank does not change the scaling.
        dropout: probability, in ``[0, 1)``, of zeroing an input of an update while training.
        num_bases: ``n``, by default ``ceil(p / r)`` for full rank; lowered to that where larger.
        seed: of the bases; goes with a ``basis`` that is a kind.
        modules_to_save: which modules to train in full, in the same form; these are not adapted.
        adapter: a name for what is added. A model may have several adapters, of which one is
            active: the first, until :func:`set_adapter` says otherwise. A bank of the same recipe
            that the model has already is used again.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument is of the wrong type, or a name matches a module that is not
            supported.
        ValueError: if a value is out of range, a pattern matches nothing, no layer is left to
            adapt, a layer is lazy or on the meta device, or the model has an adapter of this name
            already.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> model = inject(model, rank=4)
        >>> sum(p.numel() for p in adapter_parameters(model))
        2176
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_adapter_name(adapter)
    names = names_of(model)
    banks: list[BasisBank] = []
    for module, aliases in names.items():
        if isinstance(module, Adapted):
            if adapter in module._randlora.adapters:
                raise ValueError(
                    f"model must not be adapted under the name {adapter!r} yet, but its layer "
                    f"{aliases[0]!r} is; to add an adapter, give it another name"
                )
            banks += [other.bank for other in module._randlora.all()]

        if any(nn.parameter.is_lazy(p) for p in module._parameters.values() if p is not None):
            raise ValueError(
                f"model must have all its sizes, but {aliases[0]!r}, a {type(module).__name__}, "
                "has none before it is run; run the model once"
            )

    supported = supported_layers(names)
    heads = output_heads(model, names, supported)
    saved = selected("modules_to_save", modules_to_save, names)
    for module in saved:
        if isinstance(module, Adapted):
            raise ValueError(
                f"modules_to_save must not be adapted, but {names[module][0]!r} is already"
            )
        if reason := untrainable(module):
            raise TypeError(
                f"modules_to_save must be trainable, but {names[module][0]!r} has {reason}"
            )
    saved |= {module for module in names if SAVED in vars(module)}  # by an adapter before
    targets = chosen_weights(names, supported, heads, target_modules, exclude_modules, saved)
    targets += further_parameters(names, targets, target_parameters, exclude_modules, saved)
    check_targets(names, supported, heads, targets)
    usual = [site for m, sites in supported.items() if m not in heads for site in sites]
    bank = _bank(basis, seed, rank, usual, [target.site for target in targets], banks)
    settings = _settings(names, targets, rank, alpha, dropout, num_bases, bank.lowers_rank)

    updates = {target: (settings[target], bank) for target in targets}
    return adapt(model, adapter, updates, saved)


def adapt(
    model: ModelT,
    adapter: str,
    updates: Mapping[Place, tuple[Settings, BasisBank]],
    saved: Iterable[nn.Module],
    *,
    freeze: bool = True,
) -> ModelT:
    """Give a model an adapter of one more name, or raise and leave it as it was."""
    names, active = names_of(model), adapter
    for module in names:
        if isinstance(module, Adapted):
            active = module._randlora.active
    made: dict[nn.Module, dict[Adapter, tuple[nn.Parameter, nn.Parameter]]] = {}
    for (module, site), (settings, bank) in updates.items():
        update = Adapter(adapter, site, settings, bank)
        for name in update.names:
            if hasattr(module, name):
                raise TypeError(
                    f"{names[module][0]!r} has an attribute {name!r}, which adapter {adapter!r} "
                    "would need"
                )
        bank.reserve(*update.sizes)
        made.setdefault(module, {})[update] = update.make_parameters(device_of(module))
    classes = {module: _class(module, ours) for module, ours in made.items()}
    for module, ours in made.items():  # all have reserved their sizes
        for update in ours:
            update.draw_bases(module)

    # All that can fail is done.
    if freeze:
        model.requires_grad_(False)
    for module, ours in made.items():
        install(module, adapter, ours)
        module._randlora.active = active  # type: ignore[union-attr]
        object.__setattr__(module, "__class__", classes[module])
    for module in saved:
        vars(module)[SAVED] = True
    train(model)
    return model


def untrainable(module: nn.Module) -> str | None:
    """Which parameter of a module, not of those beneath, cannot be trained in full; or None."""
    for name, parameter in module.named_parameters(recurse=False):
        trainable = parameter.is_floating_point() or parameter.is_complex()
        if not trainable or parameter.is_inference():
            return f"{name!r}, {'an inference tensor' if trainable else parameter.dtype}"
    return None


def train(model: nn.Module) -> None:
    """Have what is to be trained, and no other adapter, require gradients."""
    for module in adapted_modules(model).values():
        state = module._randlora
        for name, adapters in state.adapters.items():
            for adapter in adapters.values():
                for parameter in adapter.parameters(module):
                    parameter.requires_grad_(name == state.active)
    for module in model.modules():
        if SAVED in vars(module):
            for parameter in module.parameters():
                parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: ``Λ`` and ``Γ`` of the active adapter, then the ``modules_to_save``.

    Each parameter comes once, in the order of ``model.modules()``; for the optimiser.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    trained: dict[nn.Parameter, None] = {}
    for module in adapted_modules(model).values():
        for adapter in module._randlora.current.values():
            trained |= dict.fromkeys(adapter.parameters(module))
    for module in model.modules():
        if SAVED in vars(module):
            trained |= dict.fromkeys(module.parameters())
    return list(trained)


def _class(module: nn.Module, updates: Iterable[Adapter]) -> Any:
    """What the module's class becomes."""
    names = frozenset(update.site.parameter for update in updates if not update.site.opaque)
    handler = handler_of(module)
    mixin = Adapted if isinstance(handler, str) else handler.mixin
    return adapted_class(type(module), mixin, names)


def _settings(
    names: Names,
    targets: list[Place],
    rank: int | Mapping[Pattern, int],
    alpha: float | None,
    dropout: float,
    num_bases: int | None,
    lowers_rank: bool,
) -> dict[Place, Settings]:
    """What each weight gets; a rank or number of bases too large for some of them is lowered."""
    ranks = _ranks(names, targets, rank)
    for asked in set(ranks.values()):
        largest = max(target.site.p for target in targets if ranks[target] == asked)
        if asked > largest and lowers_rank:
            raise ValueError(
                "rank must be at most the largest min(in_features, out_features) of the layers it "
                f"is for, here {largest}, got {asked}"
            )
    num_bases = None if num_bases is None else as_positive_int("num_bases", num_bases)

    settings = {}
    for target, asked in ranks.items():
        p = target.site.p
        r = min(asked, p) if lowers_rank else asked
        n = None if num_bases is None else min(num_bases, -(-p // r))
        fitting = Settings.of(
            target.site, rank=r, dropout=dropout, num_bases=n, any_rank=not lowers_rank
        )
        scaling = 1.0 if alpha is None else as_scaling(alpha, asked)
        settings[target] = replace(fitting, scaling=scaling, asked_rank=asked)
    if num_bases is not None and all(s.num_bases < num_bases for s in settings.values()):
        largest = max(s.num_bases for s in settings.values())
        raise ValueError(
            "num_bases must be at most the largest ceil(p / rank) of the layers, here "
            f"{largest}, got {num_bases}"
        )
    return settings


def _ranks(
    names: Names, targets: list[Place], rank: int | Mapping[Pattern, int]
) -> dict[Place, int]:
    if not isinstance(rank, Mapping):
        return dict.fromkeys(targets, as_positive_int("rank", rank))
    table = {
        pattern: as_positive_int(f"rank[{pattern!r}]", value) for pattern, value in rank.items()
    }
    hits = matches("rank", table, {**names, **parameter_names(names)})
    covered = {}
    for pattern, found in hits.items():
        modules = beneath(m for m in found if isinstance(m, nn.Module))
        covered[pattern] = {
            t for t in targets if t.module in modules or (t.module, t.site.parameter) in found
        }
        if not covered[pattern]:
            raise ValueError(f"rank has a pattern, {pattern!r}, for no layer that is adapted")
    ranks = {}
    for target in targets:
        matching = [pattern for pattern, found in covered.items() if target in found]
        if not matching:
            name = weight_name(names[target.module][0], target.site.parameter)
            raise ValueError(
                f"rank must have a pattern for every layer to adapt, but {name!r} "
                f"matches none of {', '.join(map(repr, table))}"
            )
        ranks[target] = table[matching[0]]
    return ranks


def _bank(
    basis: str | BasisBank,
    seed: int,
    rank: Any,
    usual: list[Site],
    targets: list[Site],
    known: list[BasisBank],
) -> BasisBank:
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
    if basis in PEFT_KINDS:
        out, in_ = max(site.out for site in targets), max(site.in_ for site in targets)
        rank = as_positive_int("rank", rank)  # of all layers
        bank = PeftBank(basis, rank=rank, smaller=min(out, in_), larger=max(out, in_), seed=seed)
    else:
        sparsity = None
        if basis == "very_sparse":
            sparsity = max(2.0, math.sqrt(max(site.q for site in usual or targets)))
        bank = BasisBank(basis, seed=seed, sparsity=sparsity)
    return next((other for other in known if other.same_recipe(bank)), bank)
