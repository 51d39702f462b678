"""The table of module classes that can be adapted, and :func:`register`, which extends it.

The entry of a class is a :class:`Handler`, or a text that says why the class cannot be adapted. It
is looked up along the method resolution order, so a subclass has the entry of its nearest base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora.modules.adapted import AdaptedModule
from randlora.modules.embedding import RandLoRAEmbedding
from randlora.modules.linear import RandLoRALinear, attribute_conflict, linear_spec
from randlora.modules.recurrent import AdaptedRNN
from randlora.modules.sharding import is_quantised
from randlora.modules.unreadable import UnreadableLinear
from randlora.modules.weight_update import WeightSpec, why_unsupported

# Takes a module and returns its weights, or the reason why it has none that can be adapted.
FindSpecs = Callable[[Any], list[WeightSpec] | str]


class Handler(NamedTuple):
    """How modules of a class are adapted."""

    mixin: type[AdaptedModule]  # a base of the adapted class, beside the module's own class
    specs: FindSpecs
    default: bool = True  # False: `inject` adapts only modules that a pattern matches directly


def _named_specs(*names: str, transposed: bool = False) -> FindSpecs:
    """Return a function that gives the specs of the named parameters that a module has."""

    def specs(module: nn.Module) -> list[WeightSpec] | str:
        weights = [(name, module._parameters.get(name)) for name in names]
        found = [_matrix_spec(name, w, transposed) for name, w in weights if w is not None]
        missing = f"it has no parameter {' or '.join(map(repr, names))}"
        return found or f"{type(module).__name__} computes its weights, or has none: {missing}"

    return specs


def _matrix_spec(name: str, weight: Tensor, transposed: bool = False) -> WeightSpec:
    """Return the spec of a parameter as one matrix: dimensions after the first are flattened."""
    if nn.parameter.is_lazy(weight) or not weight.ndim:
        return WeightSpec(name, 0, 0)
    rows, columns = weight.shape[0], weight.numel() // max(weight.shape[0], 1)
    return WeightSpec(name, columns, rows, True) if transposed else WeightSpec(name, rows, columns)


def _linear_specs(module: nn.Linear) -> list[WeightSpec] | str:
    reason = None if isinstance(module, AdaptedModule) else attribute_conflict(module)
    sizes = module.out_features, module.in_features
    return reason or _size_mismatch(module, sizes) or [linear_spec(module)]


def _size_mismatch(module: nn.Module, sizes: tuple[int, int]) -> str | None:
    """Return the reason if the weight of a module does not have the sizes it states, or None."""
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or weight.shape == sizes:
        return None
    kind, shape = type(module).__name__, tuple(weight.shape)
    return f"{kind} has a weight of shape {shape}, but its attributes say {sizes}"


def _embedding_specs(module: nn.Embedding) -> list[WeightSpec] | str:
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            return f"{type(module).__name__} has {option}, which changes its weight or its gradient"
    sizes = module.num_embeddings, module.embedding_dim
    reason = _size_mismatch(module, sizes)
    return reason or [WeightSpec("weight", *sizes, frozen_row=module.padding_idx)]


def _recurrent_specs(module: nn.RNNBase) -> list[WeightSpec] | str:
    return _named_specs(*(name for name in module._flat_weights_names if "weight" in name))(module)


def _unreadable_specs(module: Any) -> list[WeightSpec] | str:
    out, in_ = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not (isinstance(out, int) and isinstance(in_, int) and min(out, in_) > 0):
        return (
            f"{type(module).__name__} must have in_features and out_features that are integers "
            f"above 0, but has {in_!r} and {out!r}"
        )
    if "forward" in vars(module):
        return f"{type(module).__name__} has a forward that is bound to the instance"
    return [WeightSpec("weight", out, in_, unreadable=True)]


_UNREADABLE_HANDLER = Handler(UnreadableLinear, _unreadable_specs)
_ATTENTION = "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"

# A key is a class, or the full name of a class that is not imported here. A text is the reason
# why modules of the class cannot be adapted; messages put the name of the class before it.
_TABLE: dict[type | str, Handler | str] = {
    nn.Linear: Handler(RandLoRALinear, _linear_specs),
    nn.MultiheadAttention: Handler(AdaptedModule, _named_specs(*_ATTENTION)),
    nn.modules.conv._ConvNd: Handler(AdaptedModule, _named_specs("weight")),
    nn.RNNBase: Handler(AdaptedRNN, _recurrent_specs),
    nn.RNNCellBase: Handler(AdaptedModule, _named_specs("weight_ih", "weight_hh")),
    nn.Embedding: Handler(RandLoRAEmbedding, _embedding_specs, default=False),
    "transformers.pytorch_utils.Conv1D": Handler(
        AdaptedModule, _named_specs("weight", transposed=True)
    ),
    "torch.ao.nn.quantized.dynamic.modules.linear.Linear": _UNREADABLE_HANDLER,
    # It may pack its weight into floating numbers, for FSDP.
    "bitsandbytes.nn.modules.Linear4bit": _UNREADABLE_HANDLER,
    nn.Bilinear: "is bilinear in two inputs: its weight is not a matrix",
    nn.EmbeddingBag: "adds up rows of its weight, which is not supported",
    torch.jit.ScriptModule: "is compiled by TorchScript, which reads its weights outside of Python",
}


def register(cls: type[nn.Module], *parameters: str, transposed: bool = False) -> None:
    """Make :func:`inject` adapt modules of a class of your own, and of its subclasses.

    Reading one of ``parameters`` then gives ``W0 + ΔW``. If no parameters are named, the class must
    be a linear layer with ``in_features`` and ``out_features`` that is called with one input and
    has an unreadable (quantised) weight. Then ``x ΔWᵀ`` is added to the output of the layer, and
    the layer cannot be merged.

    Args:
        cls: the class.
        parameters: the names of its weights. Each is read as a matrix ``out × in``: its first
            dimension, and all others flattened.
        transposed: whether the weights are stored as ``in × out``.

    Raises:
        TypeError: if an argument is of the wrong type.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(8, 6))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> register(Scale, "kernel", transposed=True)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of nn.Module, got {cls!r}")
    for name in parameters:
        if not isinstance(name, str):
            kind = type(name).__name__
            raise TypeError(f"parameters must be strings, got {name!r} of type {kind}")
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed must be True or False, got {transposed!r}")
    specs = _named_specs(*parameters, transposed=transposed)
    _TABLE[cls] = Handler(AdaptedModule, specs) if parameters else _UNREADABLE_HANDLER


def handler_of(module: nn.Module) -> Handler | str:
    """Return the handler of a module, or the reason why it cannot be adapted."""
    entry = _table_entry(module) or "is not of a class that can be adapted; see randlora.register"
    if isinstance(entry, str):
        return f"{type(module).__name__} {entry}"
    unreadable = entry.mixin is RandLoRALinear and _is_unreadable(module)
    return _UNREADABLE_HANDLER if unreadable else entry


def is_unreadable(handler: Handler | str) -> bool:
    """Whether a handler is that of linear layers with an unreadable weight."""
    return handler is _UNREADABLE_HANDLER


def _table_entry(module: nn.Module) -> Handler | str | None:
    """Return the entry of the first class in the MRO of a module that has one, or None."""
    for cls in type(module).__mro__:
        entry = _TABLE.get(cls) or _TABLE.get(f"{cls.__module__}.{cls.__qualname__}")
        if entry is not None:
            return entry
    return None


def _is_unreadable(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is quantised: not floating, or a tensor subclass."""
    weight = linear._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return False
    # A complex weight is readable, but `why_unsupported` refuses it.
    readable = weight.is_floating_point() or weight.is_complex()
    return not readable or is_quantised(weight)


def weight_specs(module: nn.Module) -> list[WeightSpec] | str:
    """Return the weights of a module that can be adapted, or the reason why there are none."""
    handler = handler_of(module)
    specs = handler if isinstance(handler, str) else handler.specs(module)
    if isinstance(specs, str):
        return specs
    reasons = [why_unsupported(module, spec) for spec in specs]
    usable = [spec for spec, reason in zip(specs, reasons, strict=True) if reason is None]
    return usable or str(reasons[0])


def parameter_spec(module: nn.Module, name: str) -> WeightSpec | str:
    """Return the spec of a parameter that the user named, or the reason why it has none.

    It is one of the weights that the handler finds, or any other matrix or stack of matrices.
    """
    specs = weight_specs(module)
    if isinstance(specs, str) and _table_entry(module) is not None:
        return specs
    for spec in specs if isinstance(specs, list) else []:
        if spec.parameter == name:
            return spec
    kind, weight = type(module).__name__, module._parameters.get(name)
    if weight is None or nn.parameter.is_lazy(weight) or weight.ndim not in (2, 3):
        return f"{name} of {kind} is neither a matrix nor a stack of matrices"
    spec = _matrix_spec(name, weight)
    if weight.ndim == 3:
        spec = WeightSpec(name, weight.shape[1], weight.shape[2], stack=weight.shape[0])
    return why_unsupported(module, spec) or spec
