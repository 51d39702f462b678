"""``RandLoRALinear``: an ``nn.Linear`` whose weight carries a full-rank update."""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora._checks import as_positive_int, as_real, as_scaling
from randlora.bases import BasisBank, Store, refuse_to_draw_while_compiling
from randlora.functional import (
    check_input,
    delta_weight,
    effective_weight,
    randlora_linear,
    work_of,
)
from randlora.kernel import autocast_dtype
from randlora.operators import DenseOperator, Operator
from randlora.planning import AUTOMATIC, Choice, Plan, choose

__all__ = [
    "Adaptation",
    "RandLoRALinear",
    "Settings",
    "adapted_layers",
    "plain_class",
    "remove",
    "unsupported",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PARAMETERS = ("randlora_lambda", "randlora_gamma")
_STATE = ("rank", "num_bases", "scaling", "dropout", "asked_rank", "bank", "_stores", "_folded")


class RandLoRALinear(nn.Linear):
    r"""A linear map with a frozen weight and a trained update of full rank.

    .. math:: y = x\,(W_0 + \Delta W)^\top + b, \qquad
              \Delta W = \frac{\alpha}{r} \sum_{j=1}^{n} B_j \Lambda_j A \Gamma_j

    (paper, equation 4), transposed where ``out < in``. With ``p = min(out, in)``, ``q = max(out,
    in)`` and ``n = ceil(p / r)``, only ``randlora_lambda`` ``(n, r)`` and ``randlora_gamma``
    ``(n, p)`` are trained: ``n (r + p)`` numbers, fewer as the rank grows. They are made in
    float32 whatever the dtype of the weight, and change it only with ``layer.to(dtype)``.

    It starts from ``Γ = 0`` and ``Λ = 1/√(n r)``, so ``ΔW = 0`` exactly, and one optimiser step
    makes it full rank: with a constant ``Γ`` instead, the rank of ``ΔW`` would be ``r`` until ``Γ``
    is no longer constant. The paper scales ``ΔW`` by ``10 / r`` for CLIP (table 8) and by
    ``2 / √n`` for language models (table 9), to hold the norm of a sum of random matrices as ``r``
    or ``n`` vary. Here the initial ``Λ`` does that: the variance of an entry of ``ΔW`` is that of
    ``Γ``, for every size and rank, so ``alpha`` defaults to ``rank`` and ``scaling`` to 1.

    How the products are bracketed is planned for each call from the sizes and what ``B`` costs to
    apply. :attr:`choice` fixes what is not to be planned: on a layer for that layer, on the class
    for all. ``Choice(keep_weight=None)`` trades memory for speed: it lets the planner keep ``W0 +
    ΔW`` from forward to backward where forming it again would cost time.

    While :attr:`merged` the layer computes with one weight, formed once; while not :attr:`enabled`,
    with the frozen one. :func:`randlora.merge` and :func:`randlora.disabled` set them for a model.

    :attr:`weight` is the effective weight, so code that reads it instead of calling the module (as
    attention layers do) sees the update. :attr:`base_weight` is the frozen one, which keeps the
    name ``weight`` in ``state_dict`` and ``named_parameters``: checkpoints of plain models load.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias; frozen like the weight.
        device: where the parameters are.
        dtype: of the weight and the bias.
        rank: ``r``, the rank of one basis, from 1 to ``p``.
        bank: the :class:`BasisBank` with the bases; by default one ``dense`` bank that all layers
            made without one share.
        alpha: ``scaling`` is ``alpha / rank``; by default ``alpha = rank``.
        dropout: probability, in ``[0, 1)``, of zeroing an input of the update while training. The
            update then has an input of its own; whoever reads :attr:`weight`, a subclass with its
            own forward or an attention layer, sees no dropout.
        num_bases: ``n``, by default the ``ceil(p / r)`` that full rank takes. Fewer limit the rank
            to ``num_bases · r`` (RandLoRA-b of the paper's table 2).

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if ``rank``, ``alpha``, ``dropout`` or ``num_bases`` is out of range.

    Example:
        >>> layer = RandLoRALinear(768, 3072, rank=6)
        >>> layer(torch.randn(2, 50, 768)).shape
        torch.Size([2, 50, 3072])
        >>> layer.num_bases
        128
    """

    base_class: ClassVar[type[nn.Linear]] = nn.Linear
    choice: Choice = AUTOMATIC
    enabled: bool = True
    merged: bool = False

    randlora_lambda: nn.Parameter
    randlora_gamma: nn.Parameter
    rank: int
    num_bases: int
    scaling: float
    dropout: float
    asked_rank: int
    bank: BasisBank
    _stores: dict[tuple[torch.device, torch.dtype], Store]
    _folded: tuple[list[tuple[int, int]], Tensor] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
        bank: BasisBank | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        num_bases: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        settings = Settings.of(self, rank=rank, alpha=alpha, dropout=dropout, num_bases=num_bases)
        Adaptation(self, settings, _check_bank(bank)).apply()
        self.draw_bases()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int,
        bank: BasisBank | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        num_bases: int | None = None,
    ) -> RandLoRALinear:
        """Return an adapted layer that shares the parameters of ``linear``, which it freezes.

        ``linear`` stays a layer of its own class and computes what it did. The result is an
        instance of its class too, and keeps its forward where the class has one of its own.

        Args and errors are those of the class; ``linear`` must be an ``nn.Linear`` with a floating
        weight that is not adapted already, else ``TypeError``.
        """
        if (reason := unsupported(linear)) is not None:
            raise TypeError(f"linear cannot be adapted: {reason}")
        if "forward" in vars(linear):
            raise TypeError("linear cannot be adapted in a copy: its forward is bound to it")
        settings = Settings.of(linear, rank=rank, alpha=alpha, dropout=dropout, num_bases=num_bases)
        bank = _check_bank(bank)
        copied = copy.copy(linear)
        for name, value in vars(linear).items():
            # The registries of parameters, buffers, hooks: shared contents, containers of our own.
            if isinstance(value, dict | set):
                object.__setattr__(copied, name, value.copy())
        vars(copied).pop("_compiled_call_impl", None)  # it would go on calling the original
        layer = Adaptation(copied, settings, bank).apply()
        layer.draw_bases()
        return layer

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight ``W0``, shape ``(out, in)``."""
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        return weight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The effective weight ``W0 + ΔW``, ``(out, in)``, differentiable in ``Λ`` and ``Γ``."""
        base = self.base_weight
        if "randlora_gamma" not in self._parameters or not self.enabled:
            return base  # nn.Linear.__init__ is still at work, or the update is to be left out
        try:
            if self.merged:
                return self._merged_weight()
            a, b = self.operands(base.dtype)
            lam, gamma = self.randlora_lambda, self.randlora_gamma
            return effective_weight(base, lam, gamma, a, b, scaling=self.scaling)
        except AttributeError as error:
            # Python would go on to Module.__getattr__, which has a "weight": the base one.
            raise RuntimeError(f"the effective weight could not be computed: {error}") from error

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The update ``ΔW``, shape ``(out, in)``, differentiable in ``Λ`` and ``Γ``.

        It is computed in the dtype of the weight, or in ``dtype`` if given: a rank is to be judged
        in float64.
        """
        weight, lam, gamma = self.base_weight, self.randlora_lambda, self.randlora_gamma
        if dtype is None or dtype == weight.dtype:
            a, b = self.operands(weight.dtype)
        else:  # to read, not to train with: the bank need not keep it
            (r, p), (q, m) = self._sizes
            a = self.bank.a(r, p).to(weight.device, dtype)
            b = DenseOperator(self.bank.b(q, m, dtype).to(weight.device))
        return delta_weight(lam, gamma, a, b, scaling=self.scaling, wide=self._wide)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x (W0 + ΔW)ᵀ + bias``, shape ``(..., out)``, for ``x`` of shape ``(..., in)``.

        Raises:
            TypeError: if ``x`` is not in the dtype of the weight and autocast is off.
            ValueError: if the last dimension of ``x`` is not ``in_features``.
        """
        weight, bias = self.base_weight, self.bias
        if self.merged or not self.enabled:
            return F.linear(input, self.weight, bias)
        dtype = autocast_dtype(weight.device)
        if dtype is None or weight.dtype == torch.float64:  # which autocast leaves alone
            dtype = weight.dtype
        elif isinstance(input, Tensor) and input.is_floating_point():
            input = input.to(dtype)
        check_input(input, self.in_features, dtype)
        a, b = self.operands(dtype)
        update = self.randlora_lambda, self.randlora_gamma, a, b
        keywords: Any = {"scaling": self.scaling, "choice": self.choice}
        if self.training and self.dropout:
            dropped = F.dropout(input, self.dropout)
            frozen = F.linear(input, weight, bias)
            return frozen + randlora_linear(dropped, None, None, *update, **keywords)
        return randlora_linear(input, weight, bias, *update, **keywords)

    def fold(self) -> Tensor:
        """``W0 + ΔW`` without a gradient, kept as long as what it is formed of stays the same."""
        made_of = self.base_weight, self.randlora_lambda, self.randlora_gamma
        if self._folded is not None and torch.compiler.is_compiling():
            return self._folded[1]  # a compiled function sees no versions
        versions = [(id(t), 0 if t.is_inference() else t._version) for t in made_of]
        if self._folded is None or self._folded[0] != versions:
            # In this order: leaving inference mode turns gradients on.
            with torch.inference_mode(False), torch.no_grad():
                folded = effective_weight(
                    *made_of, *self.operands(self.base_weight.dtype), scaling=self.scaling
                )
            self._folded = versions, folded
        return self._folded[1]

    def _merged_weight(self) -> Tensor:
        trained = any(getattr(self, name).requires_grad for name in _PARAMETERS)
        if self.training and trained and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} is merged, so its update gets no gradient; "
                "randlora.unmerge the model to train it, or put it in eval mode"
            )
        return self.fold()

    def plan(self, tokens: int, *, needs_input: bool = True) -> Plan:
        """What a training step with so many tokens would do, see :mod:`randlora.planning`.

        Without autocast and dropout, that is, and with the base weight frozen.

        Args:
            tokens: the product of the leading dimensions of the input.
            needs_input: whether the input requires a gradient.
        """
        a, b = self.operands(self.base_weight.dtype)
        tokens = as_positive_int("tokens", tokens)
        return choose(work_of(tokens, a, b, self._wide, needs_input=needs_input), self.choice)

    def reset_parameters(self) -> None:
        """Draw the base weight and bias anew, and set the update back to its start."""
        super().reset_parameters()
        if "randlora_gamma" in self._parameters:
            _reset(self.randlora_lambda, self.randlora_gamma)

    def extra_repr(self) -> str:
        """Add what is particular to the update to the line of ``nn.Linear``."""
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return (
            f"{super().extra_repr()}, rank={self.rank}, num_bases={self.num_bases}, "
            f"scaling={self.scaling:g}{dropout}"
        )

    @property
    def _wide(self) -> bool:
        return self.out_features < self.in_features

    @property
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(r, p)`` of ``A`` and ``(q, m)`` of ``B``."""
        p, q = sorted((self.in_features, self.out_features))
        return (self.rank, p), (q, self.num_bases * self.rank)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Operator]:
        """``A`` and ``B`` of this layer from the bank, to compute with in ``dtype``."""
        key = self.base_weight.device, dtype
        if key not in self._stores:
            refuse_to_draw_while_compiling()
            self._stores[key] = self.bank.store(*key)
        (r, p), (q, m) = self._sizes
        return self._stores[key].operands(r, p, q, m)

    def draw_bases(self) -> None:
        """Have the bank draw what this layer needs, unless the layer is on the meta device."""
        if not self.base_weight.is_meta:
            self.operands(self.base_weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> RandLoRALinear:
        before = self.base_weight.device, self.base_weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._folded = None
        if before != (self.base_weight.device, self.base_weight.dtype):
            self._stores.clear()
            self.draw_bases()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stores": {}, "_folded": None}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.draw_bases()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        keys = [prefix + name for name in _PARAMETERS]
        if not any(key in state_dict for key in keys):
            # A checkpoint of the plain model: it has nothing to say about the update.
            missing_keys[:] = [key for key in missing_keys if key not in keys]


@dataclass(frozen=True)
class Settings:
    """What makes an adapted layer of a linear one, checked once, by :meth:`of`."""

    rank: int
    num_bases: int
    scaling: float
    dropout: float
    asked_rank: int  # what `inject` was asked for, where that was too large for this layer

    @staticmethod
    def of(
        linear: nn.Linear,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        num_bases: int | None = None,
    ) -> Settings:
        """Check the arguments of :class:`RandLoRALinear` for a layer of the sizes of ``linear``."""
        p = min(linear.in_features, linear.out_features)
        rank = as_positive_int("rank", rank)
        if rank > p:
            raise ValueError(
                f"rank must be at most min(in_features, out_features) = {p} for a layer "
                f"{linear.in_features} -> {linear.out_features}, got {rank}"
            )
        full = -(-p // rank)
        num_bases = full if num_bases is None else as_positive_int("num_bases", num_bases)
        if num_bases > full:
            raise ValueError(
                f"num_bases must be at most ceil({p} / {rank}) = {full}, which gives full rank, "
                f"got {num_bases}"
            )
        scaling = 1.0 if alpha is None else as_scaling(alpha, rank)
        dropout = as_real("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout:g}")
        return Settings(rank, num_bases, scaling, dropout, asked_rank=rank)


def unsupported(module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted, or None if it can: an ``nn.Linear`` with a plain weight."""
    kind = type(module).__name__
    if not isinstance(module, nn.Linear):
        return f"{kind} is not an nn.Linear"
    if isinstance(module, RandLoRALinear):
        return f"{kind} is adapted already"
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{kind} computes its weight instead of holding it as a parameter"
    if nn.parameter.is_lazy(weight):
        return f"{kind} has no sizes before it is run once"
    if weight.dtype not in _DTYPES:
        return f"{kind} has a weight of {weight.dtype}, which is not floating"
    if not weight.numel():
        return f"{kind} has an empty weight"
    ours = {*_STATE, *_PARAMETERS, *vars(RandLoRALinear)} - {*dir(nn.Linear), "weight"}
    taken = sorted(name for name in ours if hasattr(module, name))
    if taken:
        return f"{kind} has an attribute {taken[0]!r} of its own"
    return None


class Adaptation:
    """What turns a supported ``linear`` into a :class:`RandLoRALinear`, in two steps.

    Making one does all that can fail and changes nothing; :meth:`apply` does the rest. The object
    stays the same, so that every name, hook and reference it has goes on holding; its class becomes
    one that is both a ``RandLoRALinear`` and what it was.
    """

    def __init__(self, linear: nn.Linear, settings: Settings, bank: BasisBank) -> None:
        self.linear = linear
        p, q = sorted((linear.in_features, linear.out_features))
        n, r, device = settings.num_bases, settings.rank, linear.weight.device
        self.cls = _adapted_class(type(linear))
        bank.reserve(r, p, q, n * r)
        with torch.inference_mode(False):
            self.lam, self.gamma = (
                nn.Parameter(torch.empty(n, width, device=device, dtype=torch.float32))
                for width in (r, p)
            )
        _reset(self.lam, self.gamma)
        self.sizes = r, p, q, n * r
        self.state = {**asdict(settings), "bank": bank, "_stores": {}, "_folded": None}

    def draw_bases(self) -> None:
        """Have the bank draw what the layer will need, and hold it for it."""
        weight = self.linear.weight
        if not weight.is_meta:
            store = self.state["bank"].store(weight.device, weight.dtype)
            store.operands(*self.sizes)
            self.state["_stores"] = {(weight.device, weight.dtype): store}

    def apply(self) -> RandLoRALinear:
        """Change the layer, freeze what it had, and return it."""
        linear = self.linear
        linear.requires_grad_(False)
        linear.register_parameter("randlora_lambda", self.lam)
        linear.register_parameter("randlora_gamma", self.gamma)
        vars(linear).update(self.state)
        linear.__class__ = self.cls
        return linear  # type: ignore[return-value]


def adapted_layers(model: nn.Module) -> dict[str, RandLoRALinear]:
    """The adapted layers of a model by name.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RandLoRALinear)}
    if not layers:
        raise ValueError("model must be adapted, but it has no RandLoRALinear; see randlora.inject")
    return layers


def plain_class(layer: RandLoRALinear) -> type[nn.Linear] | None:
    """What an adapted layer was before, or None where it is of a class written for adaptation."""
    cls = type(layer)
    return cls.base_class if cls is RandLoRALinear or "base_class" in vars(cls) else None


def remove(layer: RandLoRALinear, *, merge: bool) -> None:
    """Make an adapted layer plain again, with the update in a new weight or without it."""
    plain = plain_class(layer)
    assert plain is not None
    if merge:
        weight = nn.Parameter(layer.fold(), requires_grad=layer.base_weight.requires_grad)
        layer._parameters["weight"] = weight
    for name in _PARAMETERS:
        del layer._parameters[name]
    for name in (*_STATE, "choice", "enabled", "merged"):
        vars(layer).pop(name, None)
    layer.__class__ = plain  # type: ignore[assignment]


@torch.no_grad()
def _reset(lam: Tensor, gamma: Tensor) -> None:
    lam.fill_(1 / math.sqrt(lam.numel()))
    gamma.zero_()


def _adapted_class(base: type[nn.Linear]) -> type[RandLoRALinear]:
    """The class that a layer of class ``base`` becomes; one for each ``base``, which it keeps."""
    if base is nn.Linear:
        return RandLoRALinear
    if issubclass(base, RandLoRALinear):
        return base
    known = vars(base).get("_randlora_class")  # kept on base: both are collected together
    if known is None:
        own = {} if base.forward is nn.Linear.forward else {"forward": base.forward}
        known = type(
            f"RandLoRA{base.__name__}",
            (RandLoRALinear, base),
            {"base_class": base, "__reduce_ex__": _reduce, "__module__": base.__module__, **own},
        )
        base._randlora_class = known  # type: ignore[attr-defined]
    return known


def _reduce(layer: RandLoRALinear, protocol: int) -> tuple[Any, ...]:
    return _rebuild, (layer.base_class,), layer.__getstate__()


def _rebuild(base: type[nn.Linear]) -> RandLoRALinear:
    cls = _adapted_class(base)
    return cls.__new__(cls)


_default: weakref.ref[BasisBank] | None = None


def _check_bank(bank: BasisBank | None) -> BasisBank:
    """``bank``, or the one that layers made without share; it lives as long as a layer uses it."""
    global _default
    if isinstance(bank, BasisBank):
        return bank
    if bank is not None:
        raise TypeError(f"bank must be a BasisBank, got {type(bank).__name__}")
    bank = _default() if _default is not None else None
    if bank is None:
        bank = BasisBank()
        _default = weakref.ref(bank)
    return bank
