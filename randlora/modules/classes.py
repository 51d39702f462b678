"""The class that an adapted module gets. It is made at run time from the module's own class.

In this class the name of each adapted parameter or buffer is a property, which returns the
effective weight or the active adapter's copy. So code that reads a weight instead of calling the
module (attention, fused encoder layers) uses the adapter too. The forward is wrapped: it has a call
cache, so that it computes each effective weight once.

Such a class cannot be imported, so its instances are pickled with the arguments that recreate it.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from randlora.modules.adapted import AdaptedModule, reset
from randlora.modules.effective import active_tensor, buffer_write_key
from randlora.modules.fx import call_node
from randlora.modules.sharding import is_sharded
from randlora.modules.state import (
    AdapterState,
    CallCache,
    base_tensors,
    saved_tensor_hooks,
    state_of,
    thread_id,
)


def adapted_class(
    base: type[nn.Module],
    mixin: type[AdaptedModule],
    names: frozenset[str],
    buffers: frozenset[str] = frozenset(),
) -> Any:
    """Return a subclass of ``base`` in which parameters ``names`` and ``buffers`` are properties.

    ``base`` may be adapted already; then its properties are kept. Calls with the same arguments
    return the same class. A mixin that is a module class itself (``RandLoRALinear``, for
    ``nn.Linear``) takes the place of the class that it adapts. A subclass of ``nn.Linear`` keeps
    its own forward, and its ``super().forward`` is that of the mixin.
    """
    if issubclass(base, AdaptedModule):
        if "_randlora_base" not in vars(base):
            return base  # a user's subclass of an adapted class
        names |= getattr(base, "_randlora_names", frozenset(["weight"]))
        buffers |= getattr(base, "_randlora_buffers", frozenset())
        base = base._randlora_base
    if vars(mixin).get("_randlora_base") is base and names <= {"weight"} and not buffers:
        return mixin
    # The cache is an attribute of the base, so that both are garbage-collected together.
    classes = vars(base).get("_randlora_classes")
    if classes is None:
        classes = base._randlora_classes = {}  # type: ignore[attr-defined]
    if (mixin, names, buffers) not in classes:
        classes[mixin, names, buffers] = _make_class(base, mixin, names, buffers)
    return classes[mixin, names, buffers]


def can_become(cls: Any, other: type) -> bool:
    """Whether Python allows to change the class of an object from ``cls`` to ``other``."""
    try:
        object.__setattr__(cls.__new__(cls), "__class__", other)
    except TypeError:
        return False
    return True


class _GeneratedClass:
    """Stops ``__init_subclass__`` of the plain class: it is meant for its author's subclasses."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        pass


def _make_class(
    base: Any, mixin: type[AdaptedModule], names: frozenset[str], buffers: frozenset[str]
) -> Any:
    replaced: Any = vars(mixin).get("_randlora_base")  # the module class that the mixin replaces
    bases = (mixin, base) if replaced is None else (mixin,) if replaced is base else (base, mixin)
    prefix = "RandLoRA" if names else ""  # a class with copies of buffers only keeps its name
    contents = {
        "_randlora_base": base,
        "_randlora_names": names,
        "_randlora_buffers": buffers,
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        **{n: _effective_property(n) for n in sorted(names | buffers) if not hasattr(mixin, n)},
    }
    adapted: Any = type(f"{prefix}{base.__name__}", (_GeneratedClass, *bases), dict(contents))
    if not can_become(base, adapted) and base in bases:
        # Python takes the memory layout of objects from the first base, which must then be `base`.
        # The metaclass keeps the method resolution order as if our bases came first.
        order = adapted.__mro__[1:]
        ours = [c for c in order if c in (_GeneratedClass, *bases) and not issubclass(c, base)]
        meta = type("Ordered", (type(base),), {"mro": lambda cls: [cls, *order]})
        adapted = meta(f"{prefix}{base.__name__}", (base, *ours), dict(contents))
    if replaced is None or base.forward is not replaced.forward:
        adapted.forward = _cached_forward(adapted, base)
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(base, name):
            setattr(adapted, name, _reset_method(adapted, name))
    if buffers or base.__setattr__ is not nn.Module.__setattr__:
        adapted.__setattr__ = _setattr_method(adapted, buffers)
    return adapted


def _setattr_method(adapted: Any, buffers: frozenset[str]) -> Any:
    """Return a ``__setattr__`` that assigns buffers as :func:`buffer_write_key` says.

    FSDP assigns sharded and gathered parameters by it, if a class has a ``__setattr__`` of its own,
    and means the original tensor.
    """

    def assign(self: Any, name: str, value: Any) -> None:
        state = state_of(self)
        if state.reads_base or not state.adapter_names:
            super(adapted, self).__setattr__(name, value)
        elif name in buffers:
            if (key := buffer_write_key(self, name, value)) is not None:
                super(adapted, self).__setattr__(key, value)
        else:
            sharded = any(map(is_sharded, (value, self._parameters.get(name))))
            with base_tensors(state) if sharded else nullcontext():
                super(adapted, self).__setattr__(name, value)

    return assign


def _reset_method(adapted: Any, name: str) -> Any:
    def reset_parameters(self: Any) -> None:
        reset(self, getattr(super(adapted, self), name))

    return reset_parameters


def _effective_property(name: str) -> property:
    doc = f"The effective ``{name}``, differentiable in ``Λ`` and ``Γ``."
    return property(lambda module: active_tensor(module, name), doc=doc)


def _cached_forward(adapted: Any, base: Any) -> Any:
    """Return the forward of ``base`` with a call cache."""

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        if (recorded := call_node(self, args, keywords)) is not None:
            return recorded
        state, thread = state_of(self), thread_id()
        caches = state.call_caches
        if thread in caches:  # a call within a call
            return super(adapted, self).forward(*args, **keywords)
        caches[thread] = CallCache()
        try:
            output = super(adapted, self).forward(*args, **keywords)
        finally:
            del caches[thread]
        # An output that is one of the inputs must stay the same object.
        if not state.copies or saved_tensor_hooks() is None or any(output is one for one in args):
            return output
        return with_checkpoint_token(output, state)

    return forward


def with_checkpoint_token(output: Any, state: AdapterState) -> Any:
    """Return the output of a checkpointed call, and have autograd save the checkpoint token.

    A call that uses copies saves tensors of the same shapes for every active adapter. Without the
    token, a checkpoint could not notice that it recomputes with another adapter.
    """
    if isinstance(output, tuple | list):
        rest = [with_checkpoint_token(part, state) for part in output]
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    if not isinstance(output, Tensor) or not output.requires_grad or not torch.is_grad_enabled():
        return output
    return _SaveToken.apply(output, state.checkpoint_token if state.is_enabled() else 0)  # type: ignore[no-untyped-call]


class _SaveToken(torch.autograd.Function):
    """The identity. It saves an empty tensor with the token in its shape, for checkpoints."""

    @staticmethod
    def forward(x: Tensor, token: int) -> Tensor:
        return x.clone()  # not a view, which could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, token = inputs
        ctx.save_for_backward(x.new_empty((0, token)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018  # a checkpoint compares them when they are read
        return grads[0], None


def _reduce(module: Any, protocol: int) -> tuple[Any, ...]:
    cls = type(module)
    mixin = next(
        c for c in cls.__mro__ if issubclass(c, AdaptedModule) and "_randlora_names" not in vars(c)
    )
    arguments = cls._randlora_base, mixin, cls._randlora_names, cls._randlora_buffers
    return _rebuild, arguments, module.__getstate__()


def _rebuild(*arguments: Any) -> Any:
    cls = adapted_class(*arguments)
    return cls.__new__(cls)
