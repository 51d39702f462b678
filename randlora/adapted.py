"""What makes a module of any class an adapted one: updates of its weights, whoever reads these.

An adapted module keeps its identity, parameters and hooks; its class becomes a subclass of what it
was, in which the name of each adapted weight is a property: the effective weight, ``W0 + ΔW``.
``W0`` keeps its place among the parameters. So code that reads a module's weight instead of calling
the module (attention, fused encoder layers) meets the update, and a ``state_dict`` keeps its keys.

A module may carry several updates of a weight, by name, of which one is active.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randlora.adapters import DEFAULT, Adapter
from randlora.bases import Store
from randlora.functional import delta_weight, effective_weight
from randlora.operators import DenseOperator, Operator
from randlora.symbolic import node

__all__ = [
    "Adaptation",
    "Adapted",
    "adapted_class",
    "adapted_modules",
    "delta",
    "effective",
    "fold",
    "install",
    "plain_class",
    "remove",
    "reset",
    "uninstall",
    "weighted",
]


class Adaptation:
    """The state of an adapted module: its updates, and which of them counts."""

    def __init__(self) -> None:
        self.adapters: dict[str, dict[str, Adapter]] = {}  # by name, then by parameter
        self.active = DEFAULT
        self.enabled = True
        self.merged = False
        # Effective weights: merged ones by parameter, with what they were formed of, and those of
        # the calls under way, by thread.
        self.folded: dict[str, tuple[list[Any], Tensor]] = {}
        self.held: dict[int, _Held] = {}

    def adapter(self, parameter: str) -> Adapter | None:
        """The active update of a weight; None while there is none, or none is to count."""
        return self.current.get(parameter) if self.enabled else None

    @property
    def current(self) -> dict[str, Adapter]:
        """The active updates by parameter, enabled or not."""
        return self.adapters.get(self.active, {})

    def all(self) -> Iterator[Adapter]:
        """Every update of every weight."""
        for adapters in self.adapters.values():
            yield from adapters.values()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "folded": {}, "held": {}}


class _Held:
    """The effective weights of one call: by parameter, and by what is recorded of its use."""

    def __init__(self) -> None:
        self.hooks = _hooks()
        self.weights: dict[tuple[str, bool, bool], Tensor] = {}


def _hooks() -> Any:
    """What autograd calls with the tensors it saves: it tells a checkpointed part of a call."""
    if torch.compiler.is_compiling():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _inference() -> bool:
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Adapted:
    """What every adapted module is, beside what it was.

    All that it adds lies in the attribute ``_randlora`` and in parameters whose names end in
    ``randlora_lambda`` and ``randlora_gamma``: the attributes of a module are its author's.
    """

    _randlora_base: ClassVar[type[nn.Module]]
    _randlora: Adaptation
    _parameters: dict[str, nn.Parameter | None]

    @staticmethod
    def _randlora_removed(module: Any) -> None:
        """Do what is left to do once ``module`` is of its own class again."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        state = self._randlora
        before = _places(self)
        super()._apply(fn, recurse)  # type: ignore[misc]
        state.folded.clear()
        for adapter, place in zip(state.all(), _places(self), strict=True):
            if place != before.pop(0):
                adapter.forget_bases()
                adapter.draw_bases(self)  # type: ignore[arg-type]
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for adapter in self._randlora.all():
            adapter.draw_bases(self)  # type: ignore[arg-type]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, metadata, strict, missing, *rest
        )
        for name, adapters in self._randlora.adapters.items():
            keys = [prefix + key for adapter in adapters.values() for key in adapter.names]
            if name not in metadata.get("randlora", ()) and not any(k in state_dict for k in keys):
                # A checkpoint of the plain model, or one without this adapter.
                missing[:] = [key for key in missing if key not in keys]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:  # so that keys that got lost are missed
            metadata["randlora"] = list(self._randlora.adapters)


def _places(module: Any) -> list[Any]:
    """Where, and in which dtype, each adapted weight is; of an opaque one, where its update is."""
    places = []
    for adapter in module._randlora.all():
        name = adapter.names[0] if adapter.site.opaque else adapter.site.parameter
        weight = module._parameters.get(name)
        places.append(None if weight is None else (weight.device, weight.dtype))
    return places


# --- reading an adapted weight -------------------------------------------------------------------


def effective(module: Any, parameter: str) -> Tensor:
    """``W0 + ΔW`` of an adapted weight, in the shape of the parameter, differentiable.

    ``W0`` itself while there is no update that counts.
    """
    base: nn.Parameter | None = module._parameters.get(parameter)
    if base is None:
        raise AttributeError(f"{type(module).__name__} has no {parameter} yet")
    state: Adaptation | None = vars(module).get("_randlora")
    adapter = None if state is None else state.adapter(parameter)
    if state is None or adapter is None:
        return base
    try:
        if state.merged:
            return _merged(module, parameter)
        held = state.held.get(_thread())
        if held is None or held.hooks != _hooks():
            # A part of a call that is checkpointed is run again when the call is over.
            return _compute(module, adapter)
        key = parameter, torch.is_grad_enabled(), _inference()
        if key not in held.weights:
            held.weights[key] = _compute(module, adapter)
        return held.weights[key]
    except AttributeError as error:
        # Python would go on to Module.__getattr__, which finds the parameter: the base one.
        raise RuntimeError(f"the effective weight could not be computed: {error}") from error


def _compute(module: nn.Module, adapter: Adapter) -> Tensor:
    site, (lam, gamma) = adapter.site, adapter.parameters(module)
    base = module._parameters[site.parameter]
    assert base is not None
    a, b = adapter.operands(base.device, base.dtype)
    matrix = site.matrix(base)
    keywords: Any = {"scaling": adapter.settings.scaling, "wide": site.wide}
    if site.stack:
        each = zip(matrix.unbind(), lam.unbind(), gamma.unbind(), strict=True)
        w = torch.stack([effective_weight(w0, la, ga, a, b, **keywords) for w0, la, ga in each])
    else:
        w = effective_weight(matrix, lam, gamma, a, b, **keywords)
    if site.kept is not None:
        kept = torch.arange(len(w), device=w.device) == site.kept
        w = torch.where(kept.unsqueeze(1), matrix, w)
    return _laid_out(w.view(base.shape), base)


def _laid_out(weight: Tensor, like: Tensor) -> Tensor:
    """By channels last where ``like`` is: convolutions choose their way by it, to the bit."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            like.ndim == dims
            and not like.is_contiguous()
            and like.is_contiguous(memory_format=layout)
        ):
            return weight.contiguous(memory_format=layout)
    return weight


def delta(module: nn.Module, adapter: Adapter, dtype: torch.dtype | None = None) -> Tensor:
    """``ΔW`` as ``(out, in)``, of a stack ``(stack, out, in)``, differentiable.

    In ``dtype``, by default that of the weight: a rank is to be judged in float64.
    """
    site, (lam, _) = adapter.site, adapter.parameters(module)
    base = None if site.opaque else module._parameters[site.parameter]
    own = lam.dtype if base is None else base.dtype
    if dtype is None or dtype == own:
        a, b = adapter.operands(lam.device, own)
    else:  # to read, not to train with: the bank need not keep it
        r, p, q, m = adapter.sizes
        a = adapter.bank.a(r, p).to(lam.device, dtype)
        b = DenseOperator(adapter.bank.b(q, m, dtype).to(lam.device))
    return _delta(module, adapter, a, b)


def _delta(module: Any, adapter: Adapter, a: Tensor, b: Operator) -> Tensor:
    site, (lam, gamma) = adapter.site, adapter.parameters(module)
    keywords: Any = {"scaling": adapter.settings.scaling, "wide": site.out < site.in_}
    if site.stack:
        each = zip(lam, gamma, strict=True)
        return torch.stack([delta_weight(la, ga, a, b, **keywords) for la, ga in each])
    update = delta_weight(lam, gamma, a, b, **keywords)
    if site.kept is not None:
        kept = torch.arange(len(update), device=update.device) == site.kept
        update = update.masked_fill(kept.unsqueeze(1), 0)
    return update


def weighted(
    module: Any, parameter: str, weights: Mapping[str, float], stores: dict[Any, Store]
) -> Tensor:
    """``W0 + Σ w ΔW`` over adapters by name, without a gradient, summed in float32 at least.

    ``stores`` holds the bases that are drawn for it, for the next weight.
    """
    base = module._parameters[parameter]
    with torch.inference_mode(False), torch.no_grad():
        wider = torch.promote_types(base.dtype, torch.float32)
        total = base.to(wider, copy=True)
        for name, weight in weights.items():
            if (adapter := module._randlora.adapters.get(name, {}).get(parameter)) is None:
                continue
            key = adapter.bank, base.device, wider
            if key not in stores:
                stores[key] = adapter.bank.store(base.device, wider)
            update = _delta(module, adapter, *stores[key].operands(*adapter.sizes))
            update = update.transpose(-1, -2) if adapter.site.transposed else update
            total += weight * update.reshape(base.shape)
        return _laid_out(total.to(base.dtype), base)


def fold(module: Any, parameter: str) -> Tensor:
    """``W0 + ΔW`` without a gradient, kept as long as what it is formed of stays the same."""
    state: Adaptation = module._randlora
    folded = state.folded.get(parameter)
    if folded is not None and torch.compiler.is_compiling():
        return folded[1]  # a compiled function sees no versions
    adapter = state.current[parameter]
    made_of = module._parameters[parameter], *adapter.parameters(module)
    versions: list[Any] = [adapter.settings]
    for tensor in made_of:
        # The tensor itself, held: an id may be given again.
        version = 0 if tensor.is_inference() else tensor._version
        versions += [_Identity(tensor), version, 0 if tensor.is_meta else tensor.data_ptr()]
    if folded is None or folded[0] != versions:
        # In this order: leaving inference mode turns gradients on.
        with torch.inference_mode(False), torch.no_grad():
            folded = versions, _compute(module, adapter)
        state.folded[parameter] = folded
    return folded[1]


@dataclass(frozen=True, eq=False)
class _Identity:
    """A tensor that is equal to itself alone."""

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.tensor is other.tensor


def _merged(module: Any, parameter: str) -> Tensor:
    trained = any(t.requires_grad for t in module._randlora.current[parameter].parameters(module))
    if module.training and trained and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(module).__name__} is merged, so its update gets no gradient; "
            "randlora.unmerge the model to train it, or put it in eval mode"
        )
    return fold(module, parameter)


# --- classes -------------------------------------------------------------------------------------


def adapted_class(base: type[nn.Module], mixin: type[Adapted], names: frozenset[str]) -> Any:
    """What a module of class ``base`` becomes when its weights ``names`` are adapted.

    A mixin that is a module itself stands where the class stood that it adapts: what derives from
    that keeps its forward, and calls that of the mixin by ``super()``.
    """
    if issubclass(base, Adapted):
        if "_randlora_names" not in vars(base):
            return base  # written for adaptation, with properties of its own
        names |= base._randlora_names  # type: ignore[attr-defined]
        base = base._randlora_base
    if vars(mixin).get("_randlora_base") is base:
        return mixin
    known = vars(base).get("_randlora_classes")  # kept on base: all are collected together
    if known is None:
        known = base._randlora_classes = {}  # type: ignore[attr-defined]
    if (mixin, names) not in known:
        known[mixin, names] = _make_class(base, mixin, names)
    return known[mixin, names]


def _make_class(base: Any, mixin: type[Adapted], names: frozenset[str]) -> Any:
    adapts = vars(mixin).get("_randlora_base")
    made: Any = type(
        f"RandLoRA{base.__name__}",
        (mixin, base) if adapts is None else (base, mixin),
        {
            "_randlora_base": base,
            "_randlora_names": names,
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            **{name: _property(name) for name in names if not hasattr(mixin, name)},
        },
    )
    if adapts is None or base.forward is not adapts.forward:
        made.forward = _once(made, base)
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, name):
            setattr(made, name, _anew(made, name))
    return made


def _anew(made: Any, name: str) -> Any:
    """``reset_parameters``, by whichever name, of the frozen weights."""

    def draw(self: Any) -> None:
        reset(self, getattr(super(made, self), name))

    return draw


def _property(name: str) -> property:
    def read(module: Any) -> Tensor:
        return effective(module, name)

    return property(read, doc=f"The effective ``{name}``, differentiable in ``Λ`` and ``Γ``.")


def _once(made: Any, base: Any) -> Any:
    """The forward of ``base``, in which an effective weight read many times is formed once."""

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        if (recorded := node(self, args, keywords)) is not None:
            return recorded
        held, thread = self._randlora.held, _thread()
        if thread in held:  # a call within a call
            return super(made, self).forward(*args, **keywords)
        held[thread] = _Held()
        try:
            return super(made, self).forward(*args, **keywords)
        finally:
            del held[thread]

    return forward


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    cls = type(module)
    mixin = next(
        c for c in cls.__mro__ if issubclass(c, Adapted) and "_randlora_names" not in vars(c)
    )
    return _rebuild, (cls._randlora_base, mixin, cls._randlora_names), module.__getstate__()


def _rebuild(base: type[nn.Module], mixin: type[Adapted], names: frozenset[str]) -> Any:
    cls = adapted_class(base, mixin, names)
    return cls.__new__(cls)


def plain_class(module: Adapted) -> type[nn.Module] | None:
    """What an adapted module was before; None where it is of a class written for adaptation."""
    cls = type(module)
    return cls._randlora_base if "_randlora_base" in vars(cls) else None


def reset(module: Any, draw: Callable[[], None]) -> None:
    """Have ``draw`` draw the weights of a module anew, the frozen ones; updates start anew too."""
    state: Adaptation | None = vars(module).get("_randlora")
    if state is None:  # the module's own __init__ is still at work
        draw()
        return
    enabled, state.enabled = state.enabled, False
    try:
        draw()
    finally:
        state.enabled = enabled
    for adapter in state.all():
        adapter.reset(*adapter.parameters(module))


def install(
    module: Any, name: str, adapters: dict[Adapter, tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Give a module, whose class has become an adapted one, the updates of one more name."""
    state: Adaptation = vars(module).setdefault("_randlora", Adaptation())
    for adapter, parameters in adapters.items():
        state.adapters.setdefault(name, {})[adapter.site.parameter] = adapter
        for key, parameter in zip(adapter.names, parameters, strict=True):
            module._parameters[key] = parameter


def uninstall(module: Any, name: str) -> None:
    """Take the updates of one name away; a module left without any becomes what it was."""
    state: Adaptation = module._randlora
    if set(state.adapters) <= {name} and plain_class(module) is not None:
        remove(module)
        return
    for adapter in state.adapters.pop(name, {}).values():
        for key in adapter.names:
            del module._parameters[key]


# --- models --------------------------------------------------------------------------------------


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The adapted modules of a model by name.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}
    if not modules:
        raise ValueError("model must be adapted, but no layer of it is; see randlora.inject")
    return modules


def remove(module: Any, weights: Mapping[str, Tensor] | None = None) -> None:
    """Make an adapted module plain again, with ``weights`` as new parameters."""
    plain, state = plain_class(module), module._randlora
    assert plain is not None
    for parameter, weight in (weights or {}).items():
        base = module._parameters[parameter]
        module._parameters[parameter] = nn.Parameter(weight, requires_grad=base.requires_grad)
    for adapter in state.all():
        for name in adapter.names:
            del module._parameters[name]
    del vars(module)["_randlora"]
    removed = type(module)._randlora_removed
    object.__setattr__(module, "__class__", plain)
    removed(module)
