"""One update of one weight, away from the module: where the weight is, and what was chosen."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora._checks import as_positive_int, as_real, as_scaling
from randlora.bases import BasisBank, Store
from randlora.operators import Operator, tensors_of

__all__ = [
    "DEFAULT",
    "Adapter",
    "Settings",
    "Site",
    "check_adapter_name",
    "unsupported",
    "weight_name",
]

DEFAULT = "default"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Site:
    """A weight that can be adapted: a parameter of a module, as a matrix ``out × in``, or a stack.

    The parameter is reshaped to ``(out, in)``, to ``(in, out)`` where ``transposed``; ``stack`` is
    the number of such matrices along its first dimension, or 0. Row ``kept`` takes no update.
    Where ``opaque``, the parameter may be anything or absent, and the update goes beside it.
    """

    parameter: str
    out: int
    in_: int
    transposed: bool = False
    stack: int = 0
    kept: int | None = None
    opaque: bool = False

    @property
    def p(self) -> int:
        """``min(out, in)``."""
        return min(self.out, self.in_)

    @property
    def q(self) -> int:
        """``max(out, in)``."""
        return max(self.out, self.in_)

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions before those of a matrix: of a stack one, else none."""
        return (self.stack,) if self.stack else ()

    @property
    def wide(self) -> bool:
        """Whether the update of the matrix as it is stored is ``(B C)ᵀ``."""
        return (self.out < self.in_) != self.transposed

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter as ``(out, in)``, ``(in, out)`` where transposed, of each of a stack."""
        rows, columns = (self.in_, self.out) if self.transposed else (self.out, self.in_)
        return weight.reshape(*self.lead, rows, columns)


@dataclass(frozen=True)
class Settings:
    """The choices made for one update, checked once, by :meth:`of`."""

    rank: int
    num_bases: int
    scaling: float
    dropout: float
    asked_rank: int  # what `inject` was asked for, where that was too large for this layer

    @staticmethod
    def of(
        site: Site,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        num_bases: int | None = None,
        any_rank: bool = False,
    ) -> Settings:
        """Check the arguments of :class:`RandLoRALinear` for a weight of the sizes of ``site``.

        A rank above ``p`` is an error unless ``any_rank``.
        """
        p = site.p
        rank = as_positive_int("rank", rank)
        if rank > p and not any_rank:
            raise ValueError(
                f"rank must be at most min(in_features, out_features) = {p} for a layer "
                f"{site.in_} -> {site.out}, got {rank}"
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


class Adapter:
    """One update of one weight: all of it but the trained numbers, which the module holds."""

    def __init__(self, name: str, site: Site, settings: Settings, bank: BasisBank) -> None:
        self.site, self.settings, self.bank = site, settings, bank
        own = "" if name == DEFAULT else f"{name}_"
        of = "" if site.parameter == "weight" else f"{site.parameter}_"
        self.names = f"{own}{of}randlora_lambda", f"{own}{of}randlora_gamma"
        self._stores: dict[tuple[torch.device, torch.dtype], Store] = {}
        self.traced: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Operator]] = {}

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``r, p, q, m``: ``A`` is ``r × p`` and ``B`` is ``q × m``."""
        settings = self.settings
        return settings.rank, self.site.p, self.site.q, settings.num_bases * settings.rank

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of ``Λ``, ``(n, r)``, and of ``Γ``, ``(n, p)``; before these, the size of the stack."""
        lead, n = self.site.lead, self.settings.num_bases
        return (*lead, n, self.settings.rank), (*lead, n, self.site.p)

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(shape) for shape in self.shapes)

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
        """``Λ`` and ``Γ``."""
        lam, gamma = (
            module._parameters.get(name) if name in module._parameters else getattr(module, name)
            for name in self.names  # one may be parametrized
        )
        assert lam is not None
        assert gamma is not None
        return lam, gamma

    def make_parameters(self, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
        """New ``Λ`` and ``Γ``, in float32, at the start: ``ΔW = 0``."""
        with torch.inference_mode(False):
            lam, gamma = (
                nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))
                for shape in self.shapes
            )
        self.reset(lam, gamma)
        return lam, gamma

    @torch.no_grad()
    def reset(self, lam: Tensor, gamma: Tensor) -> None:
        """Set the update back to its start, ``ΔW = 0``: one of the two is zero."""
        for parameter, value in zip(
            (lam, gamma),
            self.bank.start(self.settings.num_bases, self.settings.rank, self.site.p),
            strict=True,
        ):
            parameter.fill_(value)

    def operands(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Operator]:
        """``A`` and ``B`` from the bank, to compute with there and in ``dtype``."""
        if torch.compiler.is_dynamo_compiling():
            _draw(self, device, dtype)
            return self.traced[device, dtype]
        key = device, dtype
        if key not in self._stores:
            self._stores[key] = self.bank.store(*key)
        return self._stores[key].operands(*self.sizes)

    def draw_bases(self, module: nn.Module) -> None:
        """Have the bank draw what the update needs to be read, unless that is on no device."""
        if self.site.opaque:
            return  # its dtype is that of the input
        weight = module._parameters.get(self.site.parameter)
        if weight is not None and not weight.is_meta:
            self.operands(weight.device, weight.dtype)

    def forget_bases(self) -> None:
        """Hold no bases: they are those of another device or dtype."""
        self._stores.clear()
        self.traced.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stores": {}, "traced": {}}


def _draw(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> None:
    """Have ``traced`` hold the operands. A compiler runs this as it traces, and takes it nowhere.

    What it reads next is the adapter's alone: of what is shared it would know an older state.
    """
    if (device, dtype) not in adapter.traced:
        a, b = adapter.operands(device, dtype)
        for tensor in (a, *tensors_of(b)):
            torch._dynamo.mark_static(tensor)
        adapter.traced[device, dtype] = a, b


# As torch.compiler.assume_constant_result does, which imports the compiler.
_draw._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(module: nn.Module, site: Site) -> str | None:
    """Why a weight cannot be adapted, or None if it can."""
    kind, name = type(module).__name__, site.parameter
    weight = module._parameters.get(name)
    if site.opaque:
        return None
    if weight is None:
        return f"{kind} computes its {name} instead of holding it as a parameter"
    if nn.parameter.is_lazy(weight):
        return f"{kind} has no sizes before it is run once"
    if weight.layout != torch.strided:
        return f"{kind} has a {name} that is not dense"
    if weight.dtype not in _DTYPES:
        return f"{kind} has a {name} of {weight.dtype}, which is not floating"
    if not weight.numel():
        return f"{kind} has an empty {name}"
    return None


def weight_name(module: str, parameter: str) -> str:
    """How messages and tables call an adapted weight: ``weight`` by the name of its module."""
    parts = [module] * bool(module) + [parameter] * (parameter != "weight")
    return ".".join(parts) or "the model"


def check_adapter_name(adapter: Any) -> str:
    """``adapter``, if it can be a part of a parameter's name."""
    if not isinstance(adapter, str):
        raise TypeError(f"adapter must be a name, got {adapter!r} of type {type(adapter).__name__}")
    if not re.fullmatch(r"[A-Za-z]\w*", adapter):
        raise ValueError(
            f"adapter must be a name of letters, digits and underscores, got {adapter!r}"
        )
    return adapter
