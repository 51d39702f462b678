"""``RandLoRALinear``: an ``nn.Linear`` whose weight carries a full-rank update."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from randlora._checks import as_positive_int
from randlora.adapted import Adapted, adapted_class, delta, effective, install, reset
from randlora.adapters import DEFAULT, Adapter, Settings, Site, unsupported
from randlora.bases import BasisBank
from randlora.functional import check_input, randlora_linear, work_of
from randlora.kernel import autocast_dtype
from randlora.operators import Operator
from randlora.planning import AUTOMATIC, Choice, Plan, choose
from randlora.symbolic import node

__all__ = ["RandLoRALinear", "linear_site", "taken"]


class RandLoRALinear(Adapted, nn.Linear):
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

    While :attr:`merged` the layer computes with one weight, formed once, see
    :func:`randlora.merge`.

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

    _randlora_base = nn.Linear
    choice: Choice = AUTOMATIC

    randlora_lambda: nn.Parameter
    randlora_gamma: nn.Parameter

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
        site = linear_site(self)
        settings = Settings.of(site, rank=rank, alpha=alpha, dropout=dropout, num_bases=num_bases)
        self._adapt(Adapter(DEFAULT, site, settings, _check_bank(bank)))

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
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, Adapted):
            raise TypeError(f"linear cannot be adapted: {type(linear).__name__} is adapted already")
        site = linear_site(linear)
        if (reason := unsupported(linear, site) or taken(linear)) is not None:
            raise TypeError(f"linear cannot be adapted: {reason}")
        if "forward" in vars(linear):
            raise TypeError("linear cannot be adapted in a copy: its forward is bound to it")
        settings = Settings.of(site, rank=rank, alpha=alpha, dropout=dropout, num_bases=num_bases)
        bank = _check_bank(bank)
        copied: Any = copy.copy(linear)
        for name, value in vars(linear).items():
            # The registries of parameters, buffers, hooks: shared contents, containers of our own.
            if isinstance(value, dict | set):
                object.__setattr__(copied, name, value.copy())
        vars(copied).pop("_compiled_call_impl", None)  # it would go on calling the original
        copied.__class__ = adapted_class(type(linear), cls, frozenset(["weight"]))
        copied._adapt(Adapter(DEFAULT, site, settings, bank))
        return copied  # type: ignore[no-any-return]

    def _adapt(self, adapter: Adapter) -> None:
        adapter.bank.reserve(*adapter.sizes)
        made = adapter.make_parameters(self.base_weight.device)
        self.requires_grad_(False)
        install(self, DEFAULT, {adapter: made}, {}, in_full=False)
        adapter.draw_bases(self)

    @staticmethod
    def _randlora_removed(module: Any) -> None:
        vars(module).pop("choice", None)

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
        return effective(self, "weight")

    @property
    def adapter(self) -> Adapter:
        """The active update.

        Raises:
            RuntimeError: if the active adapter of the model leaves this layer alone.
        """
        state = self._randlora
        if "weight" not in state.current:
            raise RuntimeError(
                f"the active adapter, {state.active!r}, has no update for this layer; "
                f"it has those of {', '.join(map(repr, state.adapters))}"
            )
        return state.current["weight"]

    @property
    def rank(self) -> int:
        """``r``, the rank of one basis."""
        return self.adapter.settings.rank

    @property
    def num_bases(self) -> int:
        """``n``: the rank of ``ΔW`` is at most ``n r``."""
        return self.adapter.settings.num_bases

    @property
    def scaling(self) -> float:
        """The factor of the update, ``alpha / rank``."""
        return self.adapter.settings.scaling

    @property
    def dropout(self) -> float:
        """The probability of zeroing an input of the update while training."""
        return self.adapter.settings.dropout

    @property
    def bank(self) -> BasisBank:
        """The bank with the bases of the update."""
        return self.adapter.bank

    @property
    def merged(self) -> bool:
        """Whether the layer computes with one weight, see :func:`randlora.merge`."""
        return self._randlora.merged

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The update ``ΔW``, shape ``(out, in)``, differentiable in ``Λ`` and ``Γ``.

        It is computed in the dtype of the weight, or in ``dtype`` if given: a rank is to be judged
        in float64.
        """
        return delta(self, self.adapter, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x (W0 + ΔW)ᵀ + bias``, shape ``(..., out)``, for ``x`` of shape ``(..., in)``.

        Raises:
            TypeError: if ``x`` is not in the dtype of the weight and autocast is off.
            ValueError: if the last dimension of ``x`` is not ``in_features``.
        """
        if isinstance(input, Proxy):
            return node(self, (input,), {})
        weight, bias = self.base_weight, self.bias
        state = self._randlora
        adapter = state.adapter("weight")
        if state.merged or adapter is None or getattr(input, "is_nested", False):
            return F.linear(input, self.weight, bias)
        dtype = autocast_dtype(weight.device)
        if dtype is None or weight.dtype == torch.float64:  # which autocast leaves alone
            dtype = weight.dtype
        elif isinstance(input, Tensor) and input.is_floating_point():
            input = input.to(dtype)
        check_input(input, self.in_features, dtype)
        update = *adapter.parameters(self), *adapter.operands(weight.device, dtype)
        settings = adapter.settings
        keywords: Any = {
            "scaling": settings.scaling,
            "choice": self.choice,
            "token": state.token,
        }
        if self.training and settings.dropout:
            dropped = F.dropout(input, settings.dropout)
            frozen = F.linear(input, weight, bias)
            return frozen + randlora_linear(dropped, None, None, *update, **keywords)
        return randlora_linear(input, weight, bias, *update, **keywords)

    def plan(self, tokens: int, *, needs_input: bool = True) -> Plan:
        """What a training step with so many tokens would do, see :mod:`randlora.planning`.

        Without autocast and dropout, that is, and with the base weight frozen.

        Args:
            tokens: the product of the leading dimensions of the input.
            needs_input: whether the input requires a gradient.
        """
        a, b = self.operands(self.base_weight.dtype)
        wide = self.out_features < self.in_features
        work = work_of(as_positive_int("tokens", tokens), a, b, wide, needs_input=needs_input)
        return choose(work, self.choice)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Operator]:
        """``A`` and ``B`` of this layer from the bank, to compute with in ``dtype``."""
        return self.adapter.operands(self.base_weight.device, dtype)

    def reset_parameters(self) -> None:
        """Draw the base weight and bias anew, and set every update back to its start."""
        reset(self, super().reset_parameters)

    def extra_repr(self) -> str:
        """Add what is particular to the update to the line of ``nn.Linear``."""
        adapter = self._randlora.current.get("weight")
        if adapter is None:
            return super().extra_repr()
        settings = adapter.settings
        dropout = f", dropout={settings.dropout:g}" if settings.dropout else ""
        return (
            f"{super().extra_repr()}, rank={settings.rank}, num_bases={settings.num_bases}, "
            f"scaling={settings.scaling:g}{dropout}"
        )


def linear_site(linear: nn.Linear) -> Site:
    """The weight of a linear layer."""
    return Site("weight", linear.out_features, linear.in_features)


def taken(linear: nn.Module) -> str | None:
    """Why a linear layer's own attributes leave no room for those of :class:`RandLoRALinear`."""
    ours = {*vars(RandLoRALinear), *vars(Adapted)} - {*dir(nn.Linear), "weight"}
    for name in sorted(ours):
        if hasattr(linear, name):
            return f"{type(linear).__name__} has an attribute {name!r} of its own"
    return None


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
