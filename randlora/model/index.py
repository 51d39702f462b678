"""The index of a model: its modules, names, weights and heads, computed once for a whole operation.

Names are those of the model without wrappers. ``torch.compile``, ``DistributedDataParallel`` and
similar wrappers put a prefix before all names; the index removes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn

from randlora.model.patterns import Parameter
from randlora.modules.adapted import AdaptedModule, plain_class
from randlora.modules.sharding import Groups, reshard
from randlora.modules.state import adapter_keys
from randlora.modules.table import handler_of, is_unreadable, weight_specs
from randlora.modules.weight_update import WeightSpec, check_adapter_name

ModelT = TypeVar("ModelT", bound=nn.Module)

# Wrappers that average the gradients of the parameters that they find when they are made.
_SYNCHRONISING = frozenset(
    {
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.distributed._composable.replicate.DDP",
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    }
)

# Wrappers by class, with the name under which each holds the module that it wraps.
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

# Usual names of output heads, and whether such a head belongs to a new task (not a language model).
_HEADS = {
    "classifier": True,
    "embed_out": False,
    "fc": True,
    "head": True,
    "heads": True,
    "lm_head": False,
    "logits": False,
    "score": True,
}
_LAST = "output head: the last layer, called {!r}"
NEW_TASK = {_LAST.format(name) for name, new in _HEADS.items() if new}  # values of `heads`

# An attribute of modules: by adapter, the names of parameters that were trained beside it.
TRAINED_BESIDES = "randlora_besides"


class ModelIndex:
    """What is in a model. Each part is computed once, when it is first read.

    The index describes the model at that time: make a new one after the model was changed.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = model

    @cached_property
    def names(self) -> dict[nn.Module, list[str]]:
        """Each module once, in the order of the model, with every dotted name of it."""
        names: dict[nn.Module, list[str]] = {}
        for name, _, module in walk(self.model):
            names.setdefault(module, []).append(name)
        return names

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by name; a module with several names is there under each."""
        return {name: module for name, _, module in walk(self.model)}

    @cached_property
    def parameters(self) -> dict[Parameter, list[str]]:
        """The model's own parameters, by module and name in the module, with all dotted names."""
        return {
            (module, name): [join(alias, name) for alias in aliases]
            for module, aliases in self.names.items()
            for name, parameter in module._parameters.items()
            if parameter is not None and name not in adapter_keys(module)
        }

    @cached_property
    def specs(self) -> dict[nn.Module, list[WeightSpec] | str]:
        """The weights of each module that can be adapted, or the reason why it has none."""
        return {module: weight_specs(module) for module in self.names}

    @cached_property
    def supported(self) -> dict[nn.Module, list[WeightSpec]]:
        """The modules that `inject` may adapt without being told to, with their weights."""
        supported = {}
        for module, specs in self.specs.items():
            handler = handler_of(module)
            if isinstance(specs, list) and not isinstance(handler, str) and handler.default:
                supported[module] = specs
        return supported

    @cached_property
    def heads(self) -> dict[nn.Module, str]:
        """The layers that compute the output of the model, with the reason why they count as such.

        There are three: the last layer, if it has a usual name; a layer that shares its weight with
        an embedding; what ``get_output_embeddings`` of a transformers model returns.
        """
        heads: dict[nn.Module, str] = {}
        if self.supported:
            last = list(self.supported)[-1]
            parts = [name.split(".") for name in self.names[last]]
            if called := _HEADS.keys() & {end for part in parts for end in (part[0], part[-1])}:
                heads[last] = _LAST.format(min(called))
        embeddings = [m for m in self.names if isinstance(m, nn.Embedding)]
        tied = {id(module._parameters.get("weight")) for module in embeddings}
        for module in self.supported:
            weight = module._parameters.get("weight")
            if weight is not None and id(weight) in tied:
                heads[module] = "output head: its weight is an embedding's too"
        ask = getattr(self.model, "get_output_embeddings", None)
        if callable(ask):
            with suppress(AttributeError, NotImplementedError):  # a model without a head
                head = ask()
                if isinstance(head, nn.Module) and head in self.supported:
                    heads[head] = "output head: the model says so"
        return heads

    @property
    def adapted(self) -> dict[str, Any]:
        """The adapted modules, each by its first name."""
        return {
            names[0]: module
            for module, names in self.names.items()
            if isinstance(module, AdaptedModule) and "_randlora" in vars(module)
        }

    def name(self, module: nn.Module) -> str:
        """The first name of a module."""
        return self.names[module][0]


def join(path: str, name: str) -> str:
    """The dotted name of the tensor or module ``name`` in the module at ``path``."""
    return f"{path}.{name}" if path else name


def walk(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield ``(name without wrappers, name with wrappers, module)`` for each name of each module.

    Wrappers themselves are left out.
    """

    def beneath(module: nn.Module, name: str, full: str) -> Iterator[tuple[str, str, nn.Module]]:
        while (inner := _wrapped(module)) is not None:
            full = join(full, inner)
            module = module._modules[inner]  # type: ignore[assignment]
        yield name, full, module
        for part, child in module._modules.items():
            if child is not None:
                yield from beneath(child, join(name, part), join(full, part))

    return beneath(model, "", "")


def _wrapped(module: nn.Module) -> str | None:
    """The name under which a wrapper holds its module; None if ``module`` is not a wrapper."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def adapted_modules(model: nn.Module, *, called: bool = False) -> dict[str, Any]:
    """The adapted modules of a model, each by its first name; it is an error if there are none.

    Unless the model may be in a call, parameters that FSDP gathered for one are sharded again, so
    that all are in the same state.
    """
    modules = ModelIndex(model).adapted
    if not called:
        reshard(model)
    if not modules:
        raise ValueError("model must be adapted, but no layer of it is; see randlora.inject")
    return modules


def active_adapter(modules: Mapping[str, Any]) -> str:
    """The adapter that is active in all these modules; it is an error if there are several."""
    active = {module._randlora.active: name for name, module in modules.items()}
    if len(active) > 1:
        parts = ", ".join(f"{a!r} (in {name or 'the model'!r})" for a, name in active.items())
        raise ValueError(
            f"model must have one active adapter, but has {parts}; pass the argument adapter, or "
            "call randlora.set_adapter for the whole model"
        )
    (adapter,) = active
    return str(adapter)


def refuse_wrapped(model: nn.Module, change: str) -> None:
    """Raise if a model is wrapped by code that notes at its start which parameters are trained."""
    for module in model.modules():
        for cls in type(module).__mro__:
            if f"{cls.__module__}.{cls.__qualname__}" in _SYNCHRONISING:
                raise ValueError(
                    f"model must not be inside of {cls.__name__} to {change}: it would not average "
                    "the gradients over the processes; wrap the model afterwards"
                )


def require_groups(model: nn.Module, modules: Mapping[str, Any]) -> None:
    """Raise if some of the adapted modules are sharded, but not by ``fully_shard`` in ``model``."""
    groups = Groups(model)
    for name, module in modules.items():
        groups.require(name, module)


def check_adapter_exists(modules: Mapping[str, Any], adapter: str) -> None:
    """Raise unless ``adapter`` is a name and one of the modules has an adapter of this name."""
    check_adapter_name(adapter)
    known = dict.fromkeys(name for m in modules.values() for name in m._randlora.adapter_names)
    if adapter not in known:
        raise ValueError(f"adapter must be one of {', '.join(map(repr, known))}, got {adapter!r}")


def tensor_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters and persistent buffers, without those of adapters."""
    left_out = adapter_keys(module) | module._non_persistent_buffers_set
    tensors = {**module._parameters, **module._buffers}
    return [name for name, t in tensors.items() if t is not None and name not in left_out]


def moving_buffers(module: nn.Module) -> list[str]:
    """The buffers of a module that training may change, such as the statistics of a BatchNorm.

    These are the persistent buffers that are floating, or hold one number. Larger integer buffers
    are taken to be part of the weights, and so are all buffers of a layer with unreadable weights.
    """
    if isinstance(module, torch.jit.ScriptModule) or is_unreadable(handler_of(module)):
        return []
    if isinstance(module, AdaptedModule) and plain_class(module) is None:
        return []  # a user's subclass of RandLoRALinear: its class cannot be given properties
    buffers = [(name, module._buffers.get(name)) for name in tensor_names(module)]
    return [
        name
        for name, buffer in buffers
        if buffer is not None
        and (buffer.is_floating_point() or buffer.is_complex() or buffer.numel() == 1)
    ]


def device_of(module: nn.Module) -> torch.device:
    """The device of the first parameter or buffer, else the CPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
