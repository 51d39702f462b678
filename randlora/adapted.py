"""What makes a module of any class an adapted one: updates of its weights, whoever reads these.

An adapted module keeps its identity, parameters and hooks; its class becomes a subclass of what it
was, in which the name of each adapted weight is a property: the effective weight, ``W0 + ΔW``.
``W0`` keeps its place among the parameters. So code that reads a module's weight instead of calling
the module (attention, fused encoder layers) meets the update, and a ``state_dict`` keeps its keys.

A module may carry several updates of a weight, by name, of which one is active. An adapter may also
have copies of its own of parameters that it trains in full and of buffers that move in training;
their names are properties too. The originals stay where they are, as the frozen weights do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from randlora.adapters import DEFAULT, Adapter
from randlora.bases import Store
from randlora.functional import delta_weight, effective_weight
from randlora.operators import DenseOperator, Operator
from randlora.patterns import modules_by_name
from randlora.suspension import Local, Suspension, backward_task, innermost
from randlora.symbolic import node

__all__ = [
    "Adaptation",
    "Adapted",
    "active_adapter",
    "adapted_class",
    "adapted_modules",
    "bare",
    "can_become",
    "delta",
    "effective",
    "fold",
    "fold_again",
    "form",
    "install",
    "is_same",
    "own_names",
    "plain_class",
    "remove",
    "reset",
    "set_copy",
    "state_of",
    "tensor_of",
    "uninstall",
    "weighted",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Adaptation:
    """The state of an adapted module: its updates, and which of them counts."""

    def __init__(self) -> None:
        self.adapters: dict[str, dict[str, Adapter]] = {}  # by name, then by parameter
        self.copies: dict[str, dict[str, str]] = {}  # by name: tensors, and the keys of the copies
        self.in_full: set[str] = set()  # the adapters that train the whole module
        self.active = DEFAULT
        self.merged = False
        # Effective weights: merged ones by parameter, and those of the calls under way, by thread.
        self.folded: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}  # of what, and what
        self.held: dict[int, _Held] = {}
        self.bare = False  # whether names mean the frozen tensors, to read and to assign
        self.suspensions: list[Suspension] = []  # that hold, in whatever context
        self.local = Local()
        # What calls computed with since the adapter was set, and before: adapters by name.
        self.used: set[str | None] = set()
        self.used_before: set[str | None] = set()

    def adapter(self, parameter: str) -> Adapter | None:
        """The active update of a weight; None while there is none, or none is to count."""
        return self.current.get(parameter) if self.counts() else None

    def copy(self, name: str) -> str | None:
        """The key of the active copy of a tensor; None while there is none, or none is to count."""
        key = self.copies.get(self.active, {}).get(name)
        return key if key is not None and self.counts() else None

    def counts(self) -> bool:
        """Whether the active adapter counts here: in this context no `suspended` holds."""
        suspension = innermost(self)
        if not torch.compiler.is_compiling():
            self._check_recomputed(suspension)
        return suspension is None

    def _check_recomputed(self, suspension: Suspension | None) -> None:
        """Raise where backward runs a forward again, with another adapter than any forward had.

        That is all that can be known of a re-entrant checkpoint. What autograd saves in one that is
        not tells the adapters apart as well, see :attr:`token`.
        """
        adapter, task = None if suspension else self.active, backward_task()
        if task == -1:
            self.used.add(adapter)
        elif suspension is not None and suspension.task == task:
            pass  # entered by a hook, not by who runs a forward again
        elif adapter not in self.used and (self.used or self.used_before):
            names = " or ".join(sorted(map(_counting, self.used or self.used_before)))
            raise RuntimeError(
                f"a checkpointed part is computed again with {_counting(adapter)}, but was computed"
                f" with {names}; call backward before set_adapter, and where disabled as forward"
            )

    @property
    def token(self) -> int:
        """A number of the active adapter, by which a checkpoint tells it from the others."""
        if torch.compiler.is_compiling():
            return 0
        return self.names.index(self.active) + 1 if self.active in self.names else 0

    def activate(self, adapter: str) -> None:
        """Have another adapter count."""
        if adapter != self.active:
            self.active = adapter
            self.used_before |= self.used
            self.used = set()

    @property
    def current(self) -> dict[str, Adapter]:
        """The active updates by parameter, counting or not."""
        return self.adapters.get(self.active, {})

    @property
    def names(self) -> list[str]:
        """The adapters that have an update or a copy here."""
        return list(dict.fromkeys((*self.adapters, *self.copies)))

    def all(self) -> Iterator[Adapter]:
        """Every update of every weight."""
        for adapters in self.adapters.values():
            yield from adapters.values()

    def keys(self, adapter: str) -> list[str]:
        """The names in the module of what is an adapter's: ``Λ``, ``Γ`` and copies."""
        updates = self.adapters.get(adapter, {}).values()
        numbers = [name for update in updates for name in update.names]
        return [*numbers, *self.copies.get(adapter, {}).values()]

    def __getstate__(self) -> dict[str, Any]:
        lost = ("folded", "held", "bare", "suspensions", "local", "used", "used_before")
        return {name: value for name, value in vars(self).items() if name not in lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Adaptation.__init__(self)
        vars(self).update(state)


def _counting(adapter: str | None) -> str:
    return "no adapter" if adapter is None else f"adapter {adapter!r}"


_NOTHING = Adaptation()


# --- the class of adapted modules ----------------------------------------------------------------


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

    All that it adds lies in the attribute ``_randlora``, in parameters whose names end in
    ``randlora_lambda`` and ``randlora_gamma``, and in parameters and buffers with
    ``randlora_copy_`` in their names: the attributes of a module are its author's.
    """

    _randlora_base: ClassVar[type[nn.Module]]
    _randlora: Adaptation
    _parameters: dict[str, nn.Parameter | None]

    @staticmethod
    def _randlora_removed(module: Any) -> None:
        """Do what is left to do once ``module`` is of its own class again."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in any module, but what is computed cannot be assigned.

        Where the active adapter has a copy of its own, that is replaced.

        Raises:
            RuntimeError: if an update of this parameter counts: what is assigned to the effective
                weight was mostly computed from it, and the update would count twice.
        """
        state: Adaptation | None = vars(self).get("_randlora")
        if state is not None and not state.bare and param is not self._parameters.get(name):
            if state.adapter(name) is not None:
                raise RuntimeError(
                    f"{name} of a {type(self).__name__} is W0 + ΔW, and cannot be assigned: the "
                    "update would then be added to it. To replace W0, assign within "
                    "randlora.disabled(model); to go on from W0 + ΔW, randlora.unload(model, "
                    "merge=True) before"
                )
            name = state.copy(name) or name
        super().register_parameter(name, param)  # type: ignore[misc]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in any module; where the active adapter has a copy of its own, that is replaced."""
        state = state_of(self)
        place: str | None = name
        if not state.bare and any(name in copies for copies in state.copies.values()):
            place = _place(self, name, tensor)
        if place is not None:
            super().register_buffer(place, tensor, persistent)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        """As in any module, but what an adapter is made for cannot be deleted, or parametrized.

        Raises:
            RuntimeError: if an adapter has an update or a copy of it.
        """
        state: Adaptation | None = vars(self).get("_randlora")
        if state is not None and not state.bare:
            for adapter in state.names:
                ours = {*state.adapters.get(adapter, {}), *state.copies.get(adapter, {})}
                if name in ours:
                    raise RuntimeError(
                        f"{name} of a {type(self).__name__} cannot be deleted or parametrized, for "
                        f"it is adapted by {adapter!r}; do it before injection, or unload the model"
                    )
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = _places(self)
        super()._apply(fn, recurse)  # type: ignore[misc]
        for adapter, place in zip(state_of(self).all(), _places(self), strict=True):
            if place != before.pop(0):
                adapter.forget_bases()
                adapter.draw_bases(self)  # type: ignore[arg-type]
        fold_again(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for adapter in state_of(self).all():
            adapter.draw_bases(self)  # type: ignore[arg-type]
        fold_again(self)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        state, before = state_of(self), len(errors)
        followers = {
            (name, tensor, key)
            for name, copies in state.copies.items()
            for tensor, key in copies.items()
            if is_same(tensor_of(self, tensor), tensor_of(self, key))
        }
        with bare(state):
            super()._load_from_state_dict(  # type: ignore[misc]
                state_dict, prefix, metadata, strict, missing, unexpected, errors
            )
        for name in state.names:
            keys = [prefix + key for key in state.keys(name)]
            if name not in metadata.get("randlora", ()) and not any(k in state_dict for k in keys):
                # A checkpoint of the plain model, or one without this adapter, which stays what it
                # is: copies that are no other than the originals go on being so.
                missing[:] = [key for key in missing if key not in keys]
                for adapter, tensor, key in followers:
                    if adapter == name and prefix + tensor in state_dict and len(errors) == before:
                        _start_copy(self, tensor, key)
        fold_again(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        state = state_of(self)
        with bare(state):  # a module may write what it reads
            super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and state.names:  # so that keys that got lost are missed
            metadata["randlora"] = state.names


def _places(module: Any) -> list[Any]:
    """Where, and in which dtype, each adapted weight is; of an opaque one, where its update is."""
    places = []
    for adapter in state_of(module).all():
        name = adapter.names[0] if adapter.site.opaque else adapter.site.parameter
        weight = module._parameters.get(name)
        places.append(None if weight is None else (weight.device, weight.dtype))
    return places


# --- reading an adapted weight -------------------------------------------------------------------


def tensor_of(module: Any, name: str) -> Tensor | None:
    """A parameter or buffer of a module as it is held; None where there is none."""
    tensor: Tensor | None = module._parameters.get(name)
    return module._buffers.get(name) if tensor is None else tensor


def effective(module: Any, name: str) -> Tensor:
    """What a parameter or buffer of an adapted module is to whoever reads it.

    That is, with the active adapter counting: its copy, where it has one; where it has an update,
    ``W0 + ΔW`` in the shape of the parameter, differentiable. Else the tensor itself.
    """
    base = tensor_of(module, name)
    if base is None:
        raise AttributeError(f"{type(module).__name__} has no {name} yet")
    state: Adaptation | None = vars(module).get("_randlora")
    if state is None or state.bare:
        return base
    if not state.counts():
        return base if name in module._parameters else _scratch(module, name, base)
    if (key := state.copies.get(state.active, {}).get(name)) is not None:
        return tensor_of(module, key)  # type: ignore[return-value]  # None where it was assigned
    adapter = state.current.get(name)
    if adapter is None:
        return base
    try:
        if state.merged:
            return _merged(module, name)
        held = state.held.get(_thread())
        if held is None or held.hooks != _hooks():
            # A part of a call that is checkpointed is run again when the call is over.
            return _compute(module, adapter)
        key_held = name, torch.is_grad_enabled(), _inference()
        if key_held not in held.weights:
            held.weights[key_held] = _compute(module, adapter)
        return held.weights[key_held]
    except AttributeError as error:
        # Python would go on to Module.__getattr__, which finds the parameter: the base one.
        raise RuntimeError(f"the effective weight could not be computed: {error}") from error


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal, also where they hold no numbers, or no values yet."""
    if one is None or other is None or one.shape != other.shape:
        return one is other
    if one.is_meta or other.is_meta:
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _scratch(module: Any, name: str, base: Tensor) -> Tensor:
    """What a buffer is while no adapter counts: a copy, once training may move it."""
    suspension = innermost(module._randlora)
    if suspension is None or torch.compiler.is_compiling():
        return base.clone() if module.training else base
    key = module._randlora, name
    if module.training and key not in suspension.scratch:
        suspension.scratch[key] = base.clone()
    scratch: Tensor = suspension.scratch.get(key, base)
    return scratch


def set_copy(module: Any, key: str, value: Tensor) -> None:
    """Have a copy have this value: in place, unless it is of another shape, dtype or device."""
    copied = tensor_of(module, key)
    with torch.inference_mode(False), torch.no_grad():
        if (
            copied is not None
            and copied.shape == value.shape
            and copied.dtype == value.dtype
            and copied.is_meta == value.is_meta
        ):
            copied.copy_(value)
        elif key in module._parameters:
            grad = copied is None or copied.requires_grad
            module._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=grad)
        else:
            module._buffers[key] = value.detach().clone()


def _start_copy(module: Any, name: str, key: str) -> None:
    """Have a copy be what it is a copy of."""
    base = tensor_of(module, name)
    if base is not None:
        set_copy(module, key, base)


def _compute(module: Any, adapter: Adapter) -> Tensor:
    site, (lam, gamma) = adapter.site, adapter.parameters(module)
    base: nn.Parameter = module._parameters[site.parameter]
    a, b = adapter.operands(base.device, base.dtype)
    matrix = site.matrix(base)
    token = module._randlora.token
    keywords: Any = {"scaling": adapter.settings.scaling, "wide": site.wide, "token": token}
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


def form(module: Any, parameter: str) -> Tensor:
    """``W0 + ΔW`` of the active update, without a gradient."""
    # In this order: leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        return _compute(module, module._randlora.current[parameter])


def made_of(module: Any, parameter: str) -> tuple[Tensor, ...]:
    """The tensors that an effective weight is formed of."""
    return module._parameters[parameter], *module._randlora.current[parameter].parameters(module)


def fold(module: Any, parameter: str, weight: Tensor) -> None:
    """Have a merged module compute with this weight, until one of our calls says otherwise.

    Or until it is given other tensors, by ``functional_call`` say: these can be told apart. What is
    written into those that it has leaves no trace that could be relied on.
    """
    module._randlora.folded[parameter] = made_of(module, parameter), weight


def fold_again(module: Any) -> None:
    """Form merged weights anew: a compiled function that reads them could not."""
    state = state_of(module)
    state.folded.clear()
    if state.merged:
        for parameter in state.current:
            fold(module, parameter, form(module, parameter))


def _merged(module: Any, parameter: str) -> Tensor:
    state: Adaptation = module._randlora
    trained = any(t.requires_grad for t in state.current[parameter].parameters(module))
    if module.training and trained and torch.is_grad_enabled():
        raise RuntimeError(
            f"{type(module).__name__} is merged, so its update gets no gradient; "
            "randlora.unmerge the model to train it, or put it in eval mode"
        )
    tensors, weight = state.folded[parameter]
    if torch.compiler.is_compiling():
        return weight
    now = made_of(module, parameter)
    same = all(one is other for one, other in zip(tensors, now, strict=True))
    return weight if same else form(module, parameter)


# --- classes -------------------------------------------------------------------------------------


def adapted_class(
    base: type[nn.Module],
    mixin: type[Adapted],
    names: frozenset[str],
    buffers: frozenset[str] = frozenset(),
) -> Any:
    """What a module of class ``base`` becomes when its parameters ``names``, and buffers, are read.

    A mixin that is a module itself stands where the class stood that it adapts: what derives from
    that keeps its forward, and calls that of the mixin by ``super()``.
    """
    if issubclass(base, Adapted):
        if "_randlora_names" not in vars(base) and plain_class_of(base) is None:
            return base  # written for adaptation, with properties of its own
        names |= getattr(base, "_randlora_names", frozenset(["weight"]))
        buffers |= getattr(base, "_randlora_buffers", frozenset())
        base = base._randlora_base
    if vars(mixin).get("_randlora_base") is base and names <= {"weight"} and not buffers:
        return mixin
    known = vars(base).get("_randlora_classes")  # kept on base: all are collected together
    if known is None:
        known = base._randlora_classes = {}  # type: ignore[attr-defined]
    if (mixin, names, buffers) not in known:
        known[mixin, names, buffers] = _make_class(base, mixin, names, buffers)
    return known[mixin, names, buffers]


def can_become(cls: Any, other: type) -> bool:
    """Whether a module of one class can be given the other."""
    try:
        probe: Any = cls.__new__(cls)
        object.__setattr__(probe, "__class__", other)
    except TypeError:
        return False
    return True


class _Made:
    """First of the bases of a class that is made: what its author does with subclasses is not."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        pass


def _make_class(
    base: Any, mixin: type[Adapted], names: frozenset[str], buffers: frozenset[str]
) -> Any:
    adapts: Any = vars(mixin).get("_randlora_base")
    inner = (mixin, base) if adapts is None else (mixin,) if adapts is base else (base, mixin)
    prefix = "RandLoRA" if names else ""  # a module that has but buffers is what it was
    contents = {
        "_randlora_base": base,
        "_randlora_names": names,
        "_randlora_buffers": buffers,
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        **{n: _property(n) for n in sorted(names | buffers) if not hasattr(mixin, n)},
    }
    made: Any = type(f"{prefix}{base.__name__}", (_Made, *inner), dict(contents))
    if not can_become(base, made) and base in inner:
        # Of several bases the first says how objects are laid out, and it is not to be ours.
        first = [c for c in made.__mro__[1:] if not issubclass(c, base) and c in (_Made, *inner)]
        order = [*made.__mro__[1:]]
        meta = type("Ordered", (type(base),), {"mro": lambda cls: [cls, *order]})
        made = meta(f"{prefix}{base.__name__}", (base, *first), dict(contents))
    if adapts is None or base.forward is not adapts.forward:
        made.forward = _once(made, base)
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, name):
            setattr(made, name, _anew(made, name))
    if buffers:
        made.__setattr__ = _assigning(made, buffers)
    return made


def _assigning(made: Any, buffers: frozenset[str]) -> Any:
    """``__setattr__`` of a module that assigns to its buffers: the copy is meant, where it counts.

    Where no adapter counts, what a call in training moves is forgotten.
    """

    def assign(self: Any, name: str, value: Any) -> None:
        state = state_of(self)
        if state.bare or not state.names:
            super(made, self).__setattr__(name, value)
        elif name in buffers:
            if (place := _place(self, name, value)) is not None:
                super(made, self).__setattr__(place, value)
        else:
            # FSDP assigns where a class has a `__setattr__`, and means the tensor of that name.
            sharded = map(is_traceable_wrapper_subclass, (value, self._parameters.get(name)))
            with bare(state) if any(sharded) else nullcontext():
                super(made, self).__setattr__(name, value)

    return assign


def _place(module: Any, name: str, value: Any) -> str | None:
    """Where a value for a buffer goes; None where it was put there, to be forgotten."""
    state: Adaptation = module._randlora
    suspension = innermost(state)
    if suspension is None or not module.training:
        return state.copy(name) or name
    suspension.scratch[state, name] = value
    return None


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
        state, thread = state_of(self), _thread()
        held = state.held
        if thread in held:  # a call within a call
            return super(made, self).forward(*args, **keywords)
        held[thread] = _Held()
        try:
            output = super(made, self).forward(*args, **keywords)
        finally:
            del held[thread]
        if not state.copies or _hooks() is None or any(output is one for one in args):
            return output
        return marked(output, state)

    return forward


def marked(output: Any, state: Adaptation) -> Any:
    """The output of a checkpointed call, with what tells apart the adapters it may be run with.

    What a call with copies saves looks the same whichever these are.
    """
    if isinstance(output, tuple | list):
        rest = [marked(part, state) for part in output]
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    if not isinstance(output, Tensor) or not output.requires_grad or not torch.is_grad_enabled():
        return output
    return _Marked.apply(output, state.token if state.counts() else 0)  # type: ignore[no-untyped-call]


class _Marked(torch.autograd.Function):
    """A tensor as it is, saving nothing but a shape: that recomputation has to be of the same."""

    @staticmethod
    def forward(x: Tensor, token: int) -> Tensor:
        return x.clone()  # a view could not be written in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, token = inputs
        ctx.save_for_backward(x.new_empty((0, token)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018  # which has them compared
        return grads[0], None


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    cls = type(module)
    mixin = next(
        c for c in cls.__mro__ if issubclass(c, Adapted) and "_randlora_names" not in vars(c)
    )
    made = cls._randlora_base, mixin, cls._randlora_names, cls._randlora_buffers
    return _rebuild, made, module.__getstate__()


def _rebuild(
    base: type[nn.Module], mixin: type[Adapted], names: frozenset[str], buffers: frozenset[str]
) -> Any:
    cls = adapted_class(base, mixin, names, buffers)
    return cls.__new__(cls)


def plain_class(module: Adapted) -> type[nn.Module] | None:
    """What an adapted module was before; None where it is of a class written for adaptation."""
    cls = type(module)
    return plain_class_of(cls.__bases__[0] if _in_front(module) else cls)


def plain_class_of(cls: Any) -> type[nn.Module] | None:
    """The same for the class of a module."""
    return cls._randlora_base if "_randlora_base" in vars(cls) else None


def _in_front(module: Any) -> bool:
    """Whether torch put a class in front of ours: a parametrization of some other tensor."""
    return parametrize.is_parametrized(module) and not vars(type(module)).get("_randlora_base")


def reset(module: Any, draw: Callable[[], None]) -> None:
    """Have ``draw`` draw the weights of a module anew, the frozen ones; adapters start anew too."""
    state: Adaptation | None = vars(module).get("_randlora")
    if state is None:  # the module's own __init__ is still at work
        draw()
        return
    with bare(state):
        draw()
    for adapter in state.all():
        adapter.reset(*adapter.parameters(module))
    for copies in state.copies.values():
        for name, key in copies.items():
            _start_copy(module, name, key)
    fold_again(module)


@contextmanager
def bare(state: Adaptation) -> Iterator[None]:
    """Within it the names of a module mean its frozen tensors, to read and to assign."""
    before, state.bare = state.bare, True
    try:
        yield
    finally:
        state.bare = before


def install(
    module: Any,
    name: str,
    adapters: Mapping[Adapter, tuple[nn.Parameter, nn.Parameter]],
    copies: Mapping[str, tuple[str, Tensor]],
    *,
    in_full: bool,
) -> None:
    """Give a module, whose class has become an adapted one, what is an adapter's of one name.

    Args:
        module: the module.
        name: of the adapter.
        adapters: its updates, with their ``Λ`` and ``Γ``.
        copies: of parameters and buffers, by name: the key, and the copy.
        in_full: whether the adapter trains the whole module.
    """
    state: Adaptation = vars(module).setdefault("_randlora", Adaptation())
    for adapter, parameters in adapters.items():
        state.adapters.setdefault(name, {})[adapter.site.parameter] = adapter
        for key, parameter in zip(adapter.names, parameters, strict=True):
            module._parameters[key] = parameter
    for tensor, (key, copied) in copies.items():
        state.copies.setdefault(name, {})[tensor] = key
        registry = module._parameters if isinstance(copied, nn.Parameter) else module._buffers
        registry[key] = copied
    if in_full:
        state.in_full.add(name)


def uninstall(module: Any, name: str) -> None:
    """Take away what is one adapter's; a module left without any becomes what it was."""
    state: Adaptation = module._randlora
    if set(state.names) <= {name} and plain_class(module) is not None:
        remove(module)
        return
    _forget(module, name)


def _forget(module: Any, name: str) -> None:
    state: Adaptation = module._randlora
    for key in state.keys(name):
        if parametrize.is_parametrized(module, key):
            parametrize.remove_parametrizations(module, key)
        for registry in (module._parameters, module._buffers):
            registry.pop(key, None)
    state.adapters.pop(name, None)
    state.copies.pop(name, None)
    state.in_full.discard(name)


def state_of(module: Any) -> Adaptation:
    """The state of a module; an empty one, to read only, where it is not adapted.

    As one is that somebody made of an adapted module's class.
    """
    state: Adaptation = vars(module).get("_randlora", _NOTHING)
    return state


def own_names(module: nn.Module) -> set[str]:
    """The names in a module of what is some adapter's."""
    state = state_of(module)
    return {key for name in state.names for key in state.keys(name)}


# --- models --------------------------------------------------------------------------------------


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The adapted modules of a model by name.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = modules_by_name(model)
    modules = {name: m for name, m in found if isinstance(m, Adapted) and "_randlora" in vars(m)}
    if not modules:
        raise ValueError("model must be adapted, but no layer of it is; see randlora.inject")
    return modules


def active_adapter(modules: Mapping[str, Any]) -> str:
    """The active adapter of adapted modules.

    Raises:
        ValueError: if there are several.
    """
    active = {module._randlora.active: name for name, module in modules.items()}
    if len(active) > 1:
        parts = ", ".join(f"{a!r} (in {name or 'the model'!r})" for a, name in active.items())
        raise ValueError(
            f"model must have one active adapter, but has {parts}; name the adapter that is meant, "
            "or set_adapter one for the whole model"
        )
    (adapter,) = active
    return str(adapter)


def remove(module: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Make an adapted module plain again, with ``tensors`` as new parameters and buffers."""
    plain, front, state = plain_class(module), None, module._randlora
    assert plain is not None
    for name, tensor in (tensors or {}).items():
        base = module._parameters.get(name)
        if base is None:
            module._buffers[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            module._parameters[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=base.requires_grad)
    for name in state.names:
        _forget(module, name)
    if _in_front(module):
        front = type(module)
        own = {k: v for k, v in vars(front).items() if k not in ("__dict__", "__weakref__")}
        plain = type(
            front.__name__.replace(front.__bases__[0].__name__, plain.__name__), (plain,), own
        )
    removed = type(module)._randlora_removed
    del vars(module)["_randlora"]
    object.__setattr__(module, "__class__", plain)
    removed(module)
