"""One update ``ΔW`` of one weight: which weight, which settings, and how ``W0 + ΔW`` is computed.

A :class:`WeightUpdate` combines a :class:`WeightSpec` (which parameter, and how it is read as a
matrix), :class:`Settings` (rank, scaling, …) and a basis bank. ``Λ``, ``Γ`` and a trained ``A`` are
parameters of the module; a ``WeightUpdate`` knows only their names, so that the module alone saves
and moves them.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from randlora.bases.bank import BasisBank
from randlora.bases.store import Store
from randlora.core.checks import as_positive_int, as_real, as_scaling
from randlora.core.kernel import autocast_dtype_of
from randlora.core.operators import Operator, tensors_of
from randlora.functional import delta_weight, effective_weight
from randlora.modules.sharding import like

DEFAULT = "default"  # the name of an adapter if none is given
# A trained A starts at this times the shared A, with a scaling that makes up for it, so that AdamW
# moves it by more of its size. Smaller, it learns more at 1e-3 and nothing at 3e-3 (docs/rates.md).
A_START = 2.0**-3
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class WeightSpec:
    """Which parameter of a module is adapted, and how it is read as a matrix ``out × in``."""

    parameter: str  # its name in the module
    out: int  # rows of the matrix
    in_: int  # columns of the matrix
    transposed: bool = False  # whether the parameter is stored as `(in, out)`
    stack: int = 0  # for a stack, the number of matrices along the first dimension
    frozen_row: int | None = None  # the index of a row that gets no update
    # Whether the weight cannot be read as a floating tensor (quantised). The parameter may then be
    # of any kind, or missing, and `x ΔWᵀ` is added to the output of the module instead.
    unreadable: bool = False

    @property
    def p(self) -> int:
        """``min(out, in)``."""
        return min(self.out, self.in_)

    @property
    def q(self) -> int:
        """``max(out, in)``."""
        return max(self.out, self.in_)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading dimensions: ``(stack,)`` for a stack, ``()`` for a single matrix."""
        return (self.stack,) if self.stack else ()

    def __str__(self) -> str:
        return " x ".join(map(str, (*self.stack_shape, self.out, self.in_)))

    @property
    def wide(self) -> bool:
        """Whether ``ΔW``, in the layout in which the parameter is stored, is ``(B C)ᵀ``."""
        return (self.out < self.in_) != self.transposed

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the parameter as a matrix, or stack, in the layout in which it is stored."""
        rows, columns = (self.in_, self.out) if self.transposed else (self.out, self.in_)
        return weight.reshape(*self.stack_shape, rows, columns)


@dataclass(frozen=True)
class Settings:
    """The settings of one update. :meth:`of` creates them from checked arguments."""

    rank: int  # `r`, the rank of one basis
    num_bases: int  # `n`
    scaling: float  # the factor of ΔW
    dropout: float  # the probability of zeroing an input of the update in training
    asked_rank: int  # the rank that `inject` was given; `rank` is lower if it was lowered to p
    train_a: bool = False  # whether the update has an `A` of its own, which is trained

    @staticmethod
    def of(
        spec: WeightSpec,
        bank: BasisBank,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        num_bases: int | None = None,
        train_a: bool = False,
        asked_rank: int | None = None,
    ) -> Settings:
        """Check the arguments of an update of one weight, and fill in the defaults.

        The arguments are those of ``RandLoRALinear``. ``asked_rank`` is the rank before it was
        lowered to ``p``, by default ``rank``; ``alpha`` is divided by it.
        """
        p = spec.p
        rank = as_positive_int("rank", rank)
        if rank > p and bank.lowers_rank:
            raise ValueError(
                f"rank must be at most min(in_features, out_features) = {p} for a layer "
                f"{spec.in_} -> {spec.out}, got {rank}"
            )
        most = -(-p // rank)
        num_bases = most if num_bases is None else as_positive_int("num_bases", num_bases)
        if num_bases > most:
            raise ValueError(
                f"num_bases must be at most ceil({p} / {rank}) = {most}, which gives full rank, "
                f"got {num_bases}"
            )
        asked_rank = rank if asked_rank is None else asked_rank
        if alpha is None:
            start = A_START if train_a is True else 1.0
            scaling = bank.default_scaling(spec.out, spec.in_, num_bases) / start
        else:
            scaling = as_scaling(alpha, asked_rank)
        dropout = as_real("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout:g}")
        if not isinstance(train_a, bool):
            raise TypeError(f"train_a must be True or False, got {train_a!r}")
        return Settings(rank, num_bases, scaling, dropout, asked_rank, train_a)

    def sizes(self, spec: WeightSpec) -> tuple[int, int, int, int]:
        """``(r, p, q, m)``: ``A`` has shape ``(r, p)`` and ``B`` has shape ``(q, m)``."""
        return self.rank, spec.p, spec.q, self.num_bases * self.rank


# One tuple of names for all layers that have the same.
_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {}


class WeightUpdate:
    """The update ``ΔW`` of one weight: everything but its trained tensors.

    These are ``Λ``, ``Γ`` and, with ``train_a``, ``A``. The module holds them.
    """

    def __init__(self, name: str, spec: WeightSpec, settings: Settings, bank: BasisBank) -> None:
        self.spec, self.settings, self.bank = spec, settings, bank
        self.sizes = settings.sizes(spec)
        prefix = "" if name == DEFAULT else f"{name}_"
        prefix += "" if spec.parameter == "weight" else f"{spec.parameter}_"
        # The names of the weight and of the trained tensors. Interned ones are found faster, and so
        # are tuples that layers share.
        names = spec.parameter, *(f"{prefix}randlora_{name}" for name in self._symbols)
        self.names = _NAMES.setdefault(names, tuple(map(sys.intern, names)))
        self.parameter_names = self.names[1:]
        self._stores: dict[tuple[torch.device, torch.dtype], Store] = {}
        # A and B for compiled code.
        self.compiled_operands: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Operator]] = {}
        bank.users.add(self)

    @property
    def _symbols(self) -> tuple[str, ...]:
        return ("lambda", "gamma", "a") if self.settings.train_a else ("lambda", "gamma")

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of ``Λ``, ``(n, r)``, ``Γ``, ``(n, p)``, and a trained ``A``, ``(r, p)``.

        For a stack, ``stack`` comes before each of these.
        """
        stack, (r, p, _, m) = self.spec.stack_shape, self.sizes
        shapes = (m // r, r), (m // r, p), (r, p)
        return tuple((*stack, *shape) for _, shape in zip(self._symbols, shapes, strict=False))

    @property
    def trained(self) -> int:
        """The number of trained values."""
        return sum(math.prod(shape) for shape in self.shapes)

    def parameters(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Return the trained tensors of a module: ``Λ``, ``Γ`` and, with ``train_a``, ``A``."""
        own: Any = module._parameters
        # A parametrized one is not in `_parameters`: reading the attribute computes it.
        return tuple([own[n] if n in own else getattr(module, n) for n in self.parameter_names])

    def make_parameters(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[nn.Parameter, ...]:
        """Return new trained tensors with the values at which ``ΔW = 0``."""
        with torch.inference_mode(False):
            made = [torch.empty(s, device=device, dtype=dtype) for s in self.shapes]
            parameters = tuple(map(nn.Parameter, made))
        self.reset(*parameters)
        return parameters

    @torch.no_grad()
    def reset(self, lam: Tensor, gamma: Tensor, a: Tensor | None = None) -> None:
        """Set the trained tensors in place to their initial values, at which ``ΔW = 0``."""
        r, p, _, m = self.sizes
        for parameter, value in zip((lam, gamma), self.bank.start(m // r, r, p), strict=True):
            parameter.fill_(value)
        if a is not None:
            a.copy_(like(A_START * self.bank.a(r, p), a))

    def factors(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> Factors:
        """Return ``Λ``, ``Γ``, ``A`` and ``B`` of a module, and ``dtype``, to compute in it."""
        return factors_of(self.parameters(module), self.operands(device, dtype))

    def operands(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Operator]:
        """Return the frozen ``A``, shape ``(r, p)``, and the operator ``B``, shape ``(q, m)``."""
        if torch.compiler.is_dynamo_compiling():
            self.bank.fill_compiled_operands(self.sizes, device, dtype)
            return self.compiled_operands[device, dtype]
        return self.store(device, dtype).operands(*self.sizes)

    def fill_compiled_operands(self, device: torch.device, dtype: torch.dtype) -> None:
        """Fill ``compiled_operands``, from which compiled code reads ``A`` and ``B``.

        They belong to this update alone. Dynamo might have seen the bank's stores, which are
        shared, before the bases were drawn.
        """
        if (device, dtype) not in self.compiled_operands:
            a, b = self.operands(device, dtype)
            for tensor in (a, *tensors_of(b)):
                torch._dynamo.mark_static(tensor)
            self.compiled_operands[device, dtype] = a, b

    def store(self, device: torch.device, dtype: torch.dtype) -> Store:
        """Return the bank's store for a device and a dtype."""
        store = self._stores.get((device, dtype))
        if store is None:
            store = self._stores[device, dtype] = self.bank.store(device, dtype)
        return store

    def draw_bases(self, module: nn.Module) -> None:
        """Draw the bases for the device and dtype of the weight, unless it is on ``meta``.

        Under autocast, those for its dtype too, so that no later call has to. Nothing is drawn for
        an unreadable weight: the dtype is that of the input in each call.
        """
        if self.spec.unreadable:
            return
        weight = module._parameters.get(self.spec.parameter)
        if weight is None or weight.is_meta:
            return
        self.operands(weight.device, weight.dtype)
        if (dtype := autocast_dtype_of(weight)) is not None:
            self.operands(weight.device, dtype)

    def forget_bases(self) -> None:
        """Drop the stored bases. Call this when the weight has a new device or dtype."""
        self._stores.clear()
        self.compiled_operands.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stores": {}, "compiled_operands": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.bank.users.add(self)


# ``Λ``, ``Γ``, ``A``, ``B`` and the dtype to compute in, as the functions on tensors take them.
Factors: TypeAlias = tuple[Tensor, Tensor, Tensor, Operator, torch.dtype]


def factors_of(trained: Sequence[Tensor], operands: tuple[Tensor, Operator]) -> Factors:
    """Return the factors, with the trained ``A``, if any, in place of the frozen one.

    The dtype to compute in is that of the frozen one.
    """
    (lam, gamma, *own), (a, b) = trained, operands
    return lam, gamma, own[0] if own else a, b, a.dtype


def add_update(
    weight: Tensor,
    spec: WeightSpec,
    settings: Settings,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    dtype: torch.dtype,
    *,
    token: int = 0,
) -> Tensor:
    """Return ``W0 + ΔW`` in the shape of ``weight``, differentiable in ``W0``, ``Λ``, ``Γ``, ``A``.

    ``weight`` is ``W0``, in the shape of the parameter. The next arguments are as
    :meth:`WeightUpdate.factors` returns them. For ``token``, see
    :func:`randlora.functional.effective_weight`. The frozen row of the result is equal to that of
    ``weight``.
    """
    matrix = spec.matrix(weight)
    keywords: Any = {"scaling": settings.scaling, "wide": spec.wide, "token": token}
    if spec.stack:
        bases = _each(a, spec.stack)
        slices = zip(matrix.unbind(), lam.unbind(), gamma.unbind(), bases, strict=True)
        w = torch.stack(
            [effective_weight(w0, la, ga, one, b, dtype, **keywords) for w0, la, ga, one in slices]
        )
    else:
        w = effective_weight(matrix, lam, gamma, a, b, dtype, **keywords)
    if spec.frozen_row is not None:
        frozen = torch.arange(len(w), device=w.device) == spec.frozen_row
        w = torch.where(frozen.unsqueeze(1), matrix, w)
    return w.view(weight.shape)


def update_matrix(
    spec: WeightSpec,
    settings: Settings,
    lam: Tensor,
    gamma: Tensor,
    a: Tensor,
    b: Operator,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``ΔW``, differentiable in ``Λ``, ``Γ`` and ``A``, which are as in :func:`add_update`.

    The shape is ``(out, in)`` or ``(stack, out, in)``, even if the parameter is stored transposed.
    The frozen row is zero.
    """
    keywords: Any = {"scaling": settings.scaling, "wide": spec.out < spec.in_}
    if spec.stack:
        slices = zip(lam.unbind(), gamma.unbind(), _each(a, spec.stack), strict=True)
        parts = [delta_weight(la, ga, one, b, dtype, **keywords) for la, ga, one in slices]
        return torch.stack(parts)
    delta = delta_weight(lam, gamma, a, b, dtype, **keywords)
    if spec.frozen_row is not None:
        frozen = torch.arange(len(delta), device=delta.device) == spec.frozen_row
        delta = delta.masked_fill(frozen.unsqueeze(1), 0)
    return delta


# shape: a (stack, r, p) or (r, p)
def _each(a: Tensor, stack: int) -> Sequence[Tensor]:
    """The ``A`` of each matrix of a stack. A frozen ``A`` is shared by all."""
    return a.unbind() if a.ndim == 3 else [a] * stack


def why_unsupported(module: nn.Module, spec: WeightSpec) -> str | None:
    """Return the reason why a weight cannot be adapted, or None if it can."""
    kind, name = type(module).__name__, spec.parameter
    weight = module._parameters.get(name)
    if spec.unreadable:
        return None
    if weight is None:
        return f"{kind} computes its {name}, which is not a parameter"
    if nn.parameter.is_lazy(weight):
        return f"{kind} is lazy: its sizes are unknown until it is run once"
    if weight.layout != torch.strided:
        return f"{kind} has a {name} that is not dense"
    if weight.dtype not in _DTYPES:
        needed = "float64, float32, bfloat16 or float16"
        return f"{kind} has a {name} of {weight.dtype}, but must have one of {needed}"
    if not weight.numel():
        return f"{kind} has an empty {name}"
    return None


def weight_name(module: str, parameter: str) -> str:
    """Return the name of an adapted weight for messages: its full name, without ``.weight``."""
    parts = [module] * bool(module) + [parameter] * (parameter != "weight")
    return ".".join(parts) or "the model"


def check_adapter_name(adapter: Any) -> str:
    """Return ``adapter`` if it can be a part of a parameter's name, or raise."""
    if not isinstance(adapter, str):
        raise TypeError(f"adapter must be a name, got {adapter!r} of type {type(adapter).__name__}")
    if not re.fullmatch(r"[A-Za-z]\w*", adapter):
        raise ValueError(
            "adapter must be a name of letters, digits and underscores that starts with a letter, "
            f"got {adapter!r}"
        )
    return adapter
