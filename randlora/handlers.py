"""Which weights of which modules can be adapted, and how: a table, and what the table needs.

A handler says where the weights of a module are, as matrices, and what comes to the module's class
when they are adapted. It is looked up along the classes of a module, so a subclass has that of the
class it derives from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from randlora.adapted import Adapted, bare, effective, reset
from randlora.adapters import Site, unsupported
from randlora.functional import effective_weight, known, randlora_linear
from randlora.kernel import autocast_dtype
from randlora.layers import RandLoRALinear, linear_site, taken
from randlora.symbolic import node

__all__ = [
    "AdaptedRNN",
    "Handler",
    "handler_of",
    "is_opaque",
    "parameter_site",
    "register",
    "sites_of",
]


# --- modules that need more than weights to be read ----------------------------------------------


class RandLoRAEmbedding(Adapted, nn.Embedding):
    """An ``nn.Embedding`` that forms the rows looked up, and no others.

    The row of ``padding_idx`` takes no update, as it takes no gradient.
    """

    _randlora_base = nn.Embedding

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The effective weight, ``(num_embeddings, embedding_dim)``."""
        return effective(self, "weight")

    def reset_parameters(self) -> None:
        """Draw the base weight anew, and set every update back to its start."""
        reset(self, super().reset_parameters)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ``W0 + ΔW``, shape ``(..., embedding_dim)``."""
        if isinstance(input, Proxy):
            return node(self, (input,), {})
        state = self._randlora
        adapter = state.adapter("weight")
        if adapter is None:
            return super().forward(input)
        indices, count = input.dtype in (torch.int32, torch.int64), input.numel()
        # In a graph for any batch too: compilers alone look after conditions on sizes.
        any_batch = not (known(count) or torch.compiler.is_dynamo_compiling())
        if state.merged or not indices or any_batch or not 0 < count < self.num_embeddings:
            return F.embedding(input, self.weight, self.padding_idx)  # ΔW knows no sparse gradients
        base: Tensor | None = self._parameters["weight"]
        lam: Tensor
        gamma: Tensor
        lam, gamma = adapter.parameters(self)
        assert base is not None
        a, b = adapter.operands(base.device, base.dtype)
        rows, wide = input.flatten(), adapter.site.wide
        frozen = F.embedding(rows, base)  # which knows what is out of range
        if wide:  # the vocabulary is the smaller side, that of A and Γ
            a, gamma = a[:, rows], gamma[:, rows]
        else:
            b = b.rows(rows, base.dtype)
        scaling = adapter.settings.scaling
        keywords: Any = {"scaling": scaling, "wide": wide, "token": state.token}
        w = effective_weight(frozen, lam, gamma, a, b, **keywords)
        if self.padding_idx is not None:
            w = torch.where((rows == self.padding_idx).unsqueeze(1), frozen, w)
        return w.view(*input.shape, -1)


class AdaptedRNN(Adapted):
    """A recurrent layer, whose forward takes its weights from a list."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        pass  # it is made anew whenever it is read

    def _init_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Do nothing: the weights are formed anew for each call, and cannot be one for cuDNN."""

    @staticmethod
    def _randlora_removed(module: Any) -> None:
        module._init_flat_weights()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # It makes a list of the weights, which is not to be formed, and not made here.
        with bare(state["_randlora"]):
            super().__setstate__(state)


class AdaptedOpaque(Adapted):
    """A linear layer whose weight cannot be read: it is called as it is, and the update added."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer returns, and ``x ΔWᵀ`` in its dtype."""
        module: Any = self
        if isinstance(input, Proxy):
            return node(module, (input,), {})
        forward = super().forward  # type: ignore[misc]
        adapter = self._randlora.adapter("weight")
        if adapter is None:
            return forward(input)  # type: ignore[no-any-return]
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        if needs_gradient and hasattr(module, "_packed_params"):
            y = _Packed.apply(input, module, forward)  # type: ignore[no-untyped-call]
        else:
            y = forward(input)
            if needs_gradient and not y.requires_grad:
                kind = module._randlora_base.__name__
                raise RuntimeError(
                    f"{kind} gives no gradient to its input, so that what comes before it cannot "
                    "be trained through it"
                )
        dtype, settings = autocast_dtype(input.device), adapter.settings
        x = input if dtype is None else input.to(dtype)
        x = F.dropout(x, settings.dropout, module.training)
        a, b = adapter.operands(x.device, x.dtype)
        lam, gamma = adapter.parameters(module)
        keywords: Any = {"scaling": settings.scaling, "token": module._randlora.token}
        update = randlora_linear(x, None, None, lam, gamma, a, b, **keywords)
        return y + update.to(y.dtype)  # type: ignore[no-any-return]


class _Packed(torch.autograd.Function):
    """A layer of ``torch.ao``, which has no gradient, with that of the weight it stands for."""

    @staticmethod
    def forward(x: Tensor, layer: Any, forward: Callable[[Tensor], Tensor]) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        return dy @ ctx.layer.weight().dequantize().to(dy.dtype), None, None


# --- the table -----------------------------------------------------------------------------------

Sites = Callable[[Any], list[Site] | str]  # the weights of a module, or why it has none to adapt


class Handler(NamedTuple):
    """How modules of a class are adapted."""

    mixin: type[Adapted]
    sites: Sites
    default: bool = True  # whether `inject` adapts them unasked


def _weights(*names: str, transposed: bool = False) -> Sites:
    """Parameters of these names, behind their first dimension flattened."""

    def sites(module: nn.Module) -> list[Site] | str:
        weights = [(name, module._parameters.get(name)) for name in names]
        return [
            _matrix(name, weight, transposed) for name, weight in weights if weight is not None
        ] or f"{type(module).__name__} computes its weights instead of holding them as parameters"

    return sites


def _matrix(name: str, weight: Tensor, transposed: bool = False) -> Site:
    if nn.parameter.is_lazy(weight) or not weight.ndim:
        return Site(name, 0, 0)
    rows = weight.shape[0]
    columns = weight.numel() // max(rows, 1)
    return Site(name, columns, rows, True) if transposed else Site(name, rows, columns)


def _linear(module: nn.Linear) -> list[Site] | str:
    reason = None if isinstance(module, Adapted) else taken(module)
    sizes = module.out_features, module.in_features
    return reason or _of_size(module, sizes) or [linear_site(module)]


def _of_size(module: nn.Module, sizes: tuple[int, int]) -> str | None:
    """Why the weight of a module is not of the sizes that it says."""
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or weight.shape == sizes:
        return None
    return f"{type(module).__name__} has a weight of {tuple(weight.shape)}, but says {sizes}"


def _embedding(module: nn.Embedding) -> list[Site] | str:
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            return f"{type(module).__name__} has {option}, which changes its weight or gradient"
    rows, columns = module.num_embeddings, module.embedding_dim
    reason = _of_size(module, (rows, columns))
    return reason or [Site("weight", rows, columns, kept=module.padding_idx)]


def _recurrent(module: nn.RNNBase) -> list[Site] | str:
    return _weights(*(name for name in module._flat_weights_names if "weight" in name))(module)


def _opaque(module: Any) -> list[Site] | str:
    out, in_ = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not (isinstance(out, int) and isinstance(in_, int) and min(out, in_) > 0):
        return f"{type(module).__name__} does not say its in_features and out_features"
    if "forward" in vars(module):
        return f"{type(module).__name__} has a forward that is bound to it"
    return [Site("weight", out, in_, opaque=True)]


_OPAQUE = Handler(AdaptedOpaque, _opaque)
_ATTENTION = "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"

# By class, or by its full name where it is not ours to import; a text says why not.
_TABLE: dict[type | str, Handler | str] = {
    nn.Linear: Handler(RandLoRALinear, _linear),
    nn.MultiheadAttention: Handler(Adapted, _weights(*_ATTENTION)),
    nn.modules.conv._ConvNd: Handler(Adapted, _weights("weight")),
    nn.RNNBase: Handler(AdaptedRNN, _recurrent),
    nn.RNNCellBase: Handler(Adapted, _weights("weight_ih", "weight_hh")),
    nn.Embedding: Handler(RandLoRAEmbedding, _embedding, default=False),
    "transformers.pytorch_utils.Conv1D": Handler(Adapted, _weights("weight", transposed=True)),
    "torch.ao.nn.quantized.dynamic.modules.linear.Linear": _OPAQUE,
    nn.Bilinear: "is bilinear in two inputs: its weight is no matrix",
    nn.EmbeddingBag: "adds up rows of its weight in a way that is not reproduced",
    torch.jit.ScriptModule: "is compiled by TorchScript, which reads its weights past Python",
}


def register(cls: type[nn.Module], *parameters: str, transposed: bool = False) -> None:
    """Have :func:`inject` adapt modules of a class of your own, and of those that derive from it.

    Args:
        cls: the class.
        parameters: the names of its weights. Each is taken as a matrix ``out × in``, flattened
            behind its first dimension, and becomes the effective one wherever it is read. Without
            any the module is a linear layer with ``in_features`` and ``out_features`` whose weight
            is nobody's to read, such as a quantised one: it is called with one input as it is,
            and the update is added to what it returns. It cannot be merged.
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
        raise TypeError(f"cls must be a class of modules, got {cls!r}")
    for name in parameters:
        if not isinstance(name, str):
            raise TypeError(f"parameters must be names, got {name!r} of type {type(name).__name__}")
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed must be True or False, got {transposed!r}")
    sites = _weights(*parameters, transposed=transposed)
    _TABLE[cls] = Handler(Adapted, sites) if parameters else _OPAQUE


def handler_of(module: nn.Module) -> Handler | str:
    """How a module is adapted, or why it cannot be."""
    kind, entry = type(module).__name__, _entry(module)
    if entry is None:
        return f"{kind} is of no class that can be adapted; see randlora.register"
    if isinstance(entry, str):
        return f"{kind} {entry}"
    return _OPAQUE if entry.mixin is RandLoRALinear and _is_unreadable(module) else entry


def is_opaque(handler: Handler | str) -> bool:
    """Whether modules are called as they are, because their weights cannot be read."""
    return handler is _OPAQUE


def _entry(module: nn.Module) -> Handler | str | None:
    for cls in type(module).__mro__:
        entry = _TABLE.get(cls) or _TABLE.get(f"{cls.__module__}.{cls.__qualname__}")
        if entry is not None:
            return entry
    return None


def _is_unreadable(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is not a plain floating tensor."""
    weight = linear._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return False
    plain = weight.is_floating_point() or weight.is_complex()  # which is refused
    return not plain or is_traceable_wrapper_subclass(weight)


def sites_of(module: nn.Module) -> list[Site] | str:
    """The weights of a module that can be adapted, or why there are none."""
    handler = handler_of(module)
    sites = handler if isinstance(handler, str) else handler.sites(module)
    if isinstance(sites, str):
        return sites
    reasons = [unsupported(module, site) for site in sites]
    usable = [site for site, reason in zip(sites, reasons, strict=True) if reason is None]
    return usable or str(reasons[0])


def parameter_site(module: nn.Module, name: str) -> Site | str:
    """A parameter, asked for by name, as a matrix or a stack of them, or why it is none."""
    sites = sites_of(module)
    if isinstance(sites, str) and _entry(module) is not None:
        return sites
    for site in sites if isinstance(sites, list) else []:
        if site.parameter == name:
            return site
    kind, weight = type(module).__name__, module._parameters.get(name)
    if weight is None or nn.parameter.is_lazy(weight) or weight.ndim not in (2, 3):
        return f"{name} of {kind} is neither a matrix nor a stack of matrices"
    site = _matrix(name, weight)
    if weight.ndim == 3:
        site = Site(name, weight.shape[1], weight.shape[2], stack=weight.shape[0])
    return unsupported(module, site) or site
