"""``inject``: the only code that changes other people's models."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from randlora._checks import as_positive_int, as_scaling
from randlora.adapted import (
    Adapted,
    active_adapter,
    adapted_class,
    adapted_modules,
    can_become,
    install,
    state_of,
    tensor_of,
)
from randlora.adapters import (
    DEFAULT,
    Adapter,
    Settings,
    Site,
    check_adapter_name,
    weight_name,
)
from randlora.bases import BasisBank
from randlora.handlers import AdaptedRNN, handler_of
from randlora.patterns import Names, Pattern, Target, beneath, matches, selected
from randlora.peft_bases import PEFT_KINDS, PeftBank
from randlora.streams import KINDS
from randlora.targets import (
    BESIDES,
    NEW_TASK,
    Place,
    check_targets,
    chosen_weights,
    device_of,
    further_parameters,
    moving_buffers,
    names_of,
    output_heads,
    parameter_names,
    supported_layers,
    tensor_names,
)

__all__ = ["adapt", "adapter_parameters", "add_copies", "inject", "train", "untrainable"]

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

    **An adapter is everything that its training changes.** That is ``Λ`` and ``Γ``, the
    ``modules_to_save``, and buffers that move, such as the statistics of a BatchNorm. Of the latter
    two each adapter has copies of its own, which the modules use in the place of the originals:
    ``model.head.weight`` is the copy, which is trained, and the originals keep their names in the
    ``state_dict``. Whatever switches, disables, saves, loads or unloads an adapter, does so to all
    of it.

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
        dropout: probability, in ``[0, 1)``, of zeroing an input of an update while training. The
            numbers for it are drawn from torch's generator, so a model with dropout of its own
            draws others there than without.
        num_bases: ``n``, by default ``ceil(p / r)`` for full rank; lowered to that where larger.
        seed: of the bases; goes with a ``basis`` that is a kind.
        modules_to_save: which modules to train in full, in the same form; these are not adapted.
            Where it is not given and the output head is left out and frozen, though its name is
            that of a new task's (``classifier``, ``score``, …), there is a warning; ``[]`` says
            that this is meant.
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
            if adapter in module._randlora.names:
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
        if reason := untrainable(module):
            raise TypeError(
                f"modules_to_save must be trainable, but {names[module][0]!r} has {reason}"
            )
    targets = chosen_weights(names, supported, heads, target_modules, exclude_modules, saved)
    targets += further_parameters(names, targets, target_parameters, exclude_modules, saved)
    check_targets(names, supported, heads, targets)
    usual = [site for m, sites in supported.items() if m not in heads for site in sites]
    bank = _bank(basis, seed, rank, usual, [target.site for target in targets], banks)
    settings = _settings(names, targets, rank, alpha, dropout, num_bases, bank.lowers_rank)

    updates = {target: (settings[target], bank) for target in targets}
    if modules_to_save is None:
        adapted = {target.module for target in targets}
        _warn_of_frozen_heads(names, {h: why for h, why in heads.items() if h not in adapted})
    return adapt(model, adapter, updates, saved)


def _warn_of_frozen_heads(names: Names, heads: Mapping[nn.Module, str]) -> None:
    """Warn of the head of a new task, which is mostly drawn at random, and of no use frozen."""
    for head, why in heads.items():
        if why not in NEW_TASK:
            continue
        warnings.warn(
            f"{names[head][0]!r} looks like the output head of a new task, and is frozen as it is; "
            f"modules_to_save={names[head][0]!r} trains it, modules_to_save=[] says that it is to "
            "stay so",
            stacklevel=3,
        )


def adapt(
    model: ModelT,
    adapter: str,
    updates: Mapping[Place, tuple[Settings, BasisBank]],
    saved: Iterable[nn.Module],
    also: Mapping[nn.Module, Iterable[str]] | None = None,
    *,
    freeze: bool = True,
) -> ModelT:
    """Give a model an adapter of one more name, or raise and leave it as it was.

    Args:
        model: to be adapted.
        adapter: the name.
        updates: the weights that get one.
        saved: modules that the adapter trains in full.
        also: further parameters and buffers, by module, of which it has copies.
        freeze: whether nothing but the active adapter is to be trained.
    """
    names = names_of(model)
    before = {names[m][0]: m for m in names if isinstance(m, Adapted)}
    active = active_adapter(before) if before else adapter
    made: dict[nn.Module, dict[Adapter, tuple[nn.Parameter, nn.Parameter]]] = {}
    for (module, site), (settings, bank) in updates.items():
        update = Adapter(adapter, site, settings, bank)
        _refuse_taken(names[module][0], module, adapter, update.names)
        bank.reserve(*update.sizes)
        made.setdefault(module, {})[update] = update.make_parameters(device_of(module))
    saved = set(saved)
    wanted = {}
    for module in names:
        usual = tensor_names(module) if module in saved else moving_buffers(module)
        wanted[module] = list(dict.fromkeys([*usual, *(also or {}).get(module, ())]))
    copies = _copies(names, adapter, wanted)
    changed = {module: made.get(module, {}) for module in (*made, *copies)}
    classes = {m: _class(names[m][0], m, ours, copies.get(m, {})) for m, ours in changed.items()}
    for module, ours in made.items():  # all have reserved their sizes
        for update in ours:
            update.draw_bases(module)

    # All that can fail is done.
    if freeze:
        _freeze(names, active if before else None)
    for module, ours in changed.items():
        install(module, adapter, ours, copies.get(module, {}), in_full=module in saved)
        state_of(module).active = active
        object.__setattr__(module, "__class__", classes[module])
    train(model)
    return model


def add_copies(model: nn.Module, adapter: str, wanted: Mapping[nn.Module, Iterable[str]]) -> None:
    """Give an adapter that is there copies of further parameters and buffers, or raise."""
    names = names_of(model)
    copies = _copies(names, adapter, {m: list(tensors) for m, tensors in wanted.items()})
    classes = {m: _class(names[m][0], m, {}, ours) for m, ours in copies.items()}
    active = active_adapter(adapted_modules(model))
    for module, ours in copies.items():
        for name in ours:
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(False)
        install(module, adapter, {}, ours, in_full=False)
        state_of(module).active = active
        object.__setattr__(module, "__class__", classes[module])
    train(model)


def _copies(
    names: Names, adapter: str, wanted: Mapping[nn.Module, list[str]]
) -> dict[nn.Module, dict[str, tuple[str, Tensor]]]:
    """Copies for one adapter, by module and name: their keys, and the tensors; ties are kept."""
    made: dict[int, Tensor] = {}
    own = "" if adapter == DEFAULT else f"{adapter}_"
    copies: dict[nn.Module, dict[str, tuple[str, Tensor]]] = {}
    for module, tensors in wanted.items():
        for name in tensors:
            tensor = tensor_of(module, name)
            assert tensor is not None
            if id(tensor) not in made:
                with torch.inference_mode(False):
                    copied = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(copied) if is_parameter else copied
            copies.setdefault(module, {})[name] = f"{own}randlora_copy_{name}", made[id(tensor)]
        if module in copies:
            keys = [key for key, _ in copies[module].values()]
            _refuse_taken(names[module][0], module, adapter, keys)
    return copies


def _refuse_taken(name: str, module: nn.Module, adapter: str, keys: Iterable[str]) -> None:
    for key in keys:
        if hasattr(module, key):
            raise TypeError(
                f"{name!r} has an attribute {key!r}, which adapter {adapter!r} would need"
            )


def untrainable(module: nn.Module) -> str | None:
    """What of a module, not of those beneath, cannot be trained in full; or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "code compiled by TorchScript, which reads its parameters past Python"
    for name, parameter in module.named_parameters(recurse=False):
        trainable = parameter.is_floating_point() or parameter.is_complex()
        if not trainable or parameter.is_inference():
            return f"{name!r}, {'an inference tensor' if trainable else parameter.dtype}"
    return None


def train(model: nn.Module) -> None:
    """Have what the active adapter trains, and no other one, require gradients.

    What is frozen so loses its gradient: an optimiser that still has it would move it on.
    """
    for module in adapted_modules(model).values():
        state = module._randlora
        for name in state.names:
            for parameter in _trained(module, name):
                parameter.requires_grad_(name == state.active)
                if name != state.active:
                    parameter.grad = None


def _trained(module: Any, adapter: str) -> list[nn.Parameter]:
    """The parameters of an adapter in a module: ``Λ`` and ``Γ``, then its copies."""
    state = module._randlora
    found = [
        p for update in state.adapters.get(adapter, {}).values() for p in _leaves(module, update)
    ]
    copied = (module._parameters.get(key) for key in state.copies.get(adapter, {}).values())
    return found + [parameter for parameter in copied if parameter is not None]


def _leaves(module: Any, update: Adapter) -> list[nn.Parameter]:
    """``Λ`` and ``Γ``, or what a parametrization computes them from."""
    leaves = []
    for name in update.names:
        if (parameter := module._parameters.get(name)) is not None:
            leaves.append(parameter)
        else:
            leaves += module.parametrizations[name].parameters()
    return leaves


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: ``Λ`` and ``Γ`` of the active adapter, then the ``modules_to_save``.

    Each parameter comes once, in the order of ``model.modules()``; for the optimiser. An optimiser
    knows those of the adapter that was active when it was made: after :func:`set_adapter` or
    :func:`load_adapter` make another.

    Raises:
        ValueError: if no layer of ``model`` is adapted, or parts of it have different active
            adapters.
    """
    modules = adapted_modules(model)
    adapter = active_adapter(modules)
    numbers: dict[nn.Parameter, None] = {}
    copied: dict[nn.Parameter, None] = {}
    for module in modules.values():
        count = sum(len(_leaves(module, u)) for u in module._randlora.current.values())
        found = _trained(module, adapter)
        numbers |= dict.fromkeys(found[:count])
        copied |= dict.fromkeys(found[count:])
    return list(numbers | copied)


def _freeze(names: Names, active: str | None) -> None:
    """Have nothing be trained, and no optimiser move what was, by a gradient that it still has.

    What was trained besides the active adapter, if there is one, is remembered as that: for
    `save_adapter`.
    """
    for module in names:
        state = state_of(module)
        ours = {key: name for name in state.names for key in state.keys(name)}
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            parameter.requires_grad_(False)
            if active is None or ours.get(name) != active:
                parameter.grad = None
            if active is not None and name not in ours and name not in state.copies.get(active, {}):
                module.__dict__.setdefault(BESIDES, {}).setdefault(active, set()).add(name)


def _class(
    called: str,
    module: nn.Module,
    updates: Iterable[Adapter],
    copies: Mapping[str, tuple[str, Tensor]],
) -> Any:
    """What the module's class becomes."""
    names = {update.site.parameter for update in updates if not update.site.opaque}
    names |= {name for name, (_, copied) in copies.items() if isinstance(copied, nn.Parameter)}
    buffers = set(copies) - names
    handler = handler_of(module)
    mixin: type[Adapted] = Adapted
    if (any(updates) or any(state_of(module).all())) and not isinstance(handler, str):
        mixin = handler.mixin
    elif isinstance(module, nn.RNNBase):
        mixin = AdaptedRNN
    made = adapted_class(type(module), mixin, frozenset(names), frozenset(buffers))
    for name in names | buffers:
        if not isinstance(inspect.getattr_static(made, name, None), property):
            raise TypeError(
                f"{name!r} of {called!r} cannot be an adapter's: its class, "
                f"{type(module).__name__}, was made for updates of other parameters"
            )
    if not can_become(type(module), made):
        raise TypeError(
            f"{called!r} cannot be an adapter's: Python cannot change objects of its class, "
            f"{type(module).__name__}"
        )
    return made


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
