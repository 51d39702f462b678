"""``RandLoRALinear``: an ``nn.Linear`` with a frozen weight and a trained full-rank update."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from randlora.bases.bank import BasisBank
from randlora.core.checks import as_positive_int
from randlora.core.kernel import autocast_dtype_of
from randlora.core.operators import Operator
from randlora.core.planning import AUTOMATIC, Choice, Plan, choose
from randlora.functional import check_input, check_shapes, checked_linear, work_of
from randlora.modules.adapted import AdaptedModule, install, reset
from randlora.modules.classes import adapted_class
from randlora.modules.effective import (
    active_tensor,
    delta_of,
    frozen_weight,
    read_merged_weight,
)
from randlora.modules.fx import call_node
from randlora.modules.one_token import prepare
from randlora.modules.sharding import is_sharded
from randlora.modules.weight_update import (
    DEFAULT,
    Settings,
    WeightSpec,
    WeightUpdate,
    why_unsupported,
)


class RandLoRALinear(AdaptedModule, nn.Linear):
    r"""A linear layer with a frozen weight and a trained update of full rank.

    .. math:: y = x\,(W_0 + \Delta W)^\top + b, \qquad
              \Delta W = s \sum_{j=1}^{n} B_j \Lambda_j A \Gamma_j

    (paper, equation 4); if ``out < in``, the sum is transposed. With ``p = min(out, in)``,
    ``q = max(out, in)`` and ``n = ceil(p / r)``, only ``Λ`` (``randlora_lambda``, shape ``(n, r)``)
    and ``Γ`` (``randlora_gamma``, shape ``(n, p)``) are trained, unless ``train_a``. These are
    ``n (r + p)`` numbers, fewer for a larger rank. They are created in float32 whatever the dtype
    of the weight; only ``layer.to(dtype)`` changes that.

    **Initialisation.** ``Γ = 0`` and ``Λ = 1``, so ``ΔW = 0`` exactly, and the first optimiser step
    can make ``ΔW`` full rank if the batch has at least ``p`` tokens (proofs: ``docs/theorem.md``).

    **Learning rate.** Start with AdamW at 1e-3. The default scaling, ``100 / √(n · out · in)``,
    gives the first step about one size for every width and rank (``docs/rates.md``).

    **Speed and memory.** In each call a cost model orders the products, see ``docs/speed.md``.
    :attr:`choice` fixes parts of this plan, for one layer if set on a layer, for all if set on the
    class. With ``Choice(keep_weight=None)`` the planner may keep ``W0 + ΔW`` from forward to
    backward, which takes memory and saves time.

    **Weights.** :attr:`weight` is the effective weight, so code that reads it instead of calling
    the layer (as attention layers do) uses the update. :attr:`base_weight` is the frozen weight. It
    keeps the name ``weight`` in ``state_dict`` and ``named_parameters``, so checkpoints of plain
    models load.

    Args:
        in_features: the size of the last dimension of the input.
        out_features: the size of the last dimension of the output.
        bias: whether there is a bias. It is frozen like the weight.
        device: the device of the parameters.
        dtype: the dtype of the weight and the bias.
        rank: ``r``, the rank of one basis, from 1 to ``p``.
        bank: the :class:`BasisBank` with the bases; by default an ``isometric`` bank, which is
            shared by all layers that are created without one.
        alpha: makes ``scaling`` ``alpha / rank``; by default it is ``100 / √(n · out · in)``, 0.009
            for 1024 x 1024 at rank 8. So unlike in LoRA, ``alpha = rank`` is a large value.
        dropout: the probability, in ``[0, 1)``, of zeroing an input of the update in training. The
            frozen weight gets the input without dropout. Code that reads :attr:`weight` (a subclass
            with its own forward, an attention layer) gets no dropout.
        num_bases: ``n``, by default ``ceil(p / r)``, which gives full rank. With fewer, the rank of
            ``ΔW`` is at most ``num_bases · r`` (RandLoRA-b in table 2 of the paper).
        train_a: whether the layer has an ``A`` of its own (``randlora_a``, shape ``(r, p)``), which
            is trained. These are ``r p`` numbers more. It starts as 1/8 of the shared one, and the
            default scaling is 8 times as large. If you give ``alpha``, make it 8 times as large.

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
    randlora_a: nn.Parameter  # only with `train_a`

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
        train_a: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        given: Any = {"alpha": alpha, "dropout": dropout, "num_bases": num_bases}
        self._adapt(_new_update(self, bank, rank=rank, train_a=train_a, **given))

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
        train_a: bool = False,
    ) -> RandLoRALinear:
        """Return an adapted layer that shares the parameters of ``linear``, and freeze these.

        ``linear`` itself keeps its class and its output. The result is an instance of that class
        too; if that class has its own forward, the result keeps that forward. The
        other arguments are those of :class:`RandLoRALinear`.

        Raises:
            TypeError: if ``linear`` is not a plain ``nn.Linear``, its weight is not float64,
                float32, bfloat16 or float16, it has an attribute that the adapted class needs, or
                an argument is of the wrong type.
            ValueError: if an argument is out of range.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, AdaptedModule):
            raise TypeError(f"linear cannot be adapted: {type(linear).__name__} is adapted already")
        if is_sharded(linear.bias) or is_sharded(linear._parameters.get("weight")):
            raise TypeError(
                "linear cannot be adapted: it is distributed, and FSDP would not gather the "
                "weights of a copy; call randlora.inject, or adapt the layer before fully_shard"
            )
        if (
            reason := why_unsupported(linear, linear_spec(linear)) or attribute_conflict(linear)
        ) is not None:
            raise TypeError(f"linear cannot be adapted: {reason}")
        if "forward" in vars(linear):
            raise TypeError(
                "linear cannot be adapted, because its forward is bound to it (an attribute of the "
                "instance): a copy would call the original"
            )
        given: Any = {"alpha": alpha, "dropout": dropout, "num_bases": num_bases}
        update = _new_update(linear, bank, rank=rank, train_a=train_a, **given)
        for name in update.parameter_names:
            if hasattr(linear, name):
                raise TypeError(f"linear has an attribute {name!r}, which the update would need")
        copied: Any = copy.copy(linear)
        for name, value in vars(linear).items():
            # Parameters, buffers and hooks are shared; the containers that register them are not.
            if isinstance(value, dict | set):
                object.__setattr__(copied, name, value.copy())
        vars(copied).pop("_compiled_call_impl", None)  # it calls the original
        copied.__class__ = adapted_class(type(linear), cls, frozenset(["weight"]))
        copied._adapt(update)
        return copied  # type: ignore[no-any-return]

    def _adapt(self, update: WeightUpdate) -> None:
        update.bank.reserve(*update.sizes)
        parameters = update.make_parameters(self.base_weight.device)
        self.requires_grad_(False)
        install(self, DEFAULT, {update: parameters}, {}, fully_trained=False)
        update.draw_bases(self)

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
        """The effective weight ``W0 + ΔW``, shape ``(out, in)``, differentiable in what is trained.

        Each read computes it again, unless the layer is :attr:`merged`.
        """
        return active_tensor(self, "weight")

    @property
    def weight_update(self) -> WeightUpdate:
        """The active adapter's update; a ``RuntimeError`` if it has none for this layer."""
        state = self._randlora
        if "weight" not in state.active_updates:
            raise RuntimeError(
                f"the active adapter, {state.active!r}, has no update for this layer; "
                f"it has those of {', '.join(map(repr, state.updates))}"
            )
        return state.active_updates["weight"]

    @property
    def rank(self) -> int:
        """``r``, the rank of one basis."""
        return self.weight_update.settings.rank

    @property
    def num_bases(self) -> int:
        """``n``, the number of bases: the rank of ``ΔW`` is at most ``min(p, n r)``."""
        return self.weight_update.settings.num_bases

    @property
    def scaling(self) -> float:
        """The factor of ``ΔW``."""
        return self.weight_update.settings.scaling

    @property
    def dropout(self) -> float:
        """The probability of zeroing an input of the update in training."""
        return self.weight_update.settings.dropout

    @property
    def train_a(self) -> bool:
        """Whether the layer has an ``A`` of its own, ``randlora_a``, which is trained."""
        return self.weight_update.settings.train_a

    @property
    def bank(self) -> BasisBank:
        """The bank with the bases of the update."""
        return self.weight_update.bank

    @property
    def merged(self) -> bool:
        """Whether the layer computes with a merged weight, see :func:`randlora.merge`."""
        return self._randlora.merged

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``ΔW``, shape ``(out, in)``, differentiable in what is trained.

        It is computed in ``dtype``, by default that of the weight. To judge a rank, use float64.
        """
        return delta_of(self, self.weight_update, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x (W0 + ΔW)ᵀ + bias``, shape ``(..., out)``, for ``x`` of shape ``(..., in)``.

        Raises:
            TypeError: if ``x`` is not in the dtype of the weight and autocast is off.
            ValueError: if the last dimension of ``x`` is not ``in_features``.
        """
        if isinstance(input, Proxy):
            return call_node(self, (input,), {})
        state = self._randlora
        if "weight" in state.merged_weights and not state.reads_base and state.is_enabled():
            return F.linear(input, read_merged_weight(self, "weight"), self.bias)
        recorded = torch.is_grad_enabled()
        # Compiled code would depend on the prepared call.
        one = None if recorded or torch.compiler.is_compiling() else state.one_token
        if one is not None and state.is_enabled():
            y: Tensor | None = one.call(self, input)
            if y is not None:
                return y
        update = state.active_update("weight")
        if update is None or getattr(input, "is_nested", False):
            return F.linear(input, self.weight, self.bias)
        weight, bias = frozen_weight(self, "weight"), self.bias
        dtype = autocast_dtype_of(weight)
        if dtype is None:
            dtype = weight.dtype
        elif isinstance(input, Tensor) and input.is_floating_point():
            input = input.to(dtype)
        check_input(input, self.in_features, dtype)
        if not recorded and not torch.compiler.is_compiling():
            one = prepare(self, update, input, weight)
            if one is not None and one is not state.one_token:
                state.one_token = one
                if (y := one.call(self, input)) is not None:
                    return y
        factors = update.factors(self, weight.device, dtype)
        check_shapes(*factors[:4])
        token = state.checkpoint_token if recorded else 0
        settings = update.settings
        rest = settings.scaling, _choice_of(self), token
        if self.training and settings.dropout:
            dropped = F.dropout(input, settings.dropout)
            frozen = F.linear(input, weight, bias)
            return frozen + checked_linear(dropped, None, None, *factors, *rest)
        return checked_linear(input, weight, bias, *factors, *rest)

    def plan(self, tokens: int, *, needs_input: bool = True) -> Plan:
        """Return the plan of a training step without autocast and dropout.

        Args:
            tokens: the number of tokens ``T``, the product of the leading dimensions of the input.
            needs_input: whether the input requires a gradient.
        """
        a, b = self.operands(self.base_weight.dtype)
        wide = self.out_features < self.in_features
        work = work_of(
            as_positive_int("tokens", tokens),
            a,
            b,
            wide,
            self.base_weight.dtype,
            needs_input=needs_input,
        )
        return choose(work, _choice_of(self))

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Operator]:
        """Return ``A``, shape ``(r, p)``, and ``B``, an operator of shape ``(q, n r)``."""
        return self.weight_update.operands(self.base_weight.device, dtype)

    def reset_parameters(self) -> None:
        """Initialise the base weight and the bias again, and set all adapters to ``ΔW = 0``."""
        reset(self, super().reset_parameters)

    def extra_repr(self) -> str:
        """Return the text of ``nn.Linear`` with the settings of the active update added."""
        update = self._randlora.active_updates.get("weight")
        if update is None:
            return super().extra_repr()
        settings = update.settings
        dropout = f", dropout={settings.dropout:g}" if settings.dropout else ""
        return (
            f"{super().extra_repr()}, rank={settings.rank}, num_bases={settings.num_bases}, "
            f"scaling={settings.scaling:g}{dropout}{', train_a=True' * settings.train_a}"
        )


def _choice_of(layer: RandLoRALinear) -> Choice:
    """Return the choice of a layer, but a weight that FSDP has gathered is not kept."""
    choice = layer.choice
    if choice.keep_weight is not False and vars(layer).get("_is_fsdp_managed_module"):
        return replace(choice, keep_weight=False)
    return choice


def linear_spec(linear: nn.Linear) -> WeightSpec:
    """Return the spec of the weight of a linear layer."""
    return WeightSpec("weight", linear.out_features, linear.in_features)


def _new_update(linear: nn.Linear, bank: BasisBank | None, **settings: Any) -> WeightUpdate:
    """Return an update of the weight, with the bank or the default one."""
    spec, bank = linear_spec(linear), _bank_or_default(bank)
    return WeightUpdate(DEFAULT, spec, Settings.of(spec, bank, **settings), bank)


def attribute_conflict(linear: nn.Module) -> str | None:
    """Return the reason if a layer has an attribute that :class:`RandLoRALinear` needs, or None."""
    torchs = {*dir(nn.Linear), "weight", "_distribute_module_applied"}
    needed = {*vars(RandLoRALinear), *vars(AdaptedModule)} - torchs
    for name in sorted(needed):
        if hasattr(linear, name):
            what = f"has an attribute {name!r} of its own, which an adapted linear layer needs"
            return f"{type(linear).__name__} {what}"
    return None


_default_bank: weakref.ref[BasisBank] | None = None


def _bank_or_default(bank: BasisBank | None) -> BasisBank:
    """Return ``bank``, or the default bank, which exists as long as some layer uses it."""
    global _default_bank
    if isinstance(bank, BasisBank):
        return bank
    if bank is not None:
        raise TypeError(f"bank must be a BasisBank, got {type(bank).__name__}")
    bank = _default_bank() if _default_bank is not None else None
    if bank is None:
        bank = BasisBank("isometric")
        _default_bank = weakref.ref(bank)
    return bank
