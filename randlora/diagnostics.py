"""Read-only views of an adapted model: what is trained, and of which rank the updates are."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora.adapted import adapted_modules, delta
from randlora.adapters import Adapter, weight_name
from randlora.bases import BasisBank
from randlora.layers import RandLoRALinear
from randlora.patterns import Target, selected
from randlora.planning import Plan
from randlora.targets import left_out, names_of, stacks

__all__ = [
    "LayerRank",
    "LayerSummary",
    "RankReport",
    "Summary",
    "progress",
    "rank_report",
    "spectrum",
    "summary",
    "table",
]


_STACK = "a stack of matrices,"  # why a parameter is left out


@dataclass(frozen=True)
class LayerSummary:
    """One adapted weight: its name, its sizes as a matrix and what of its update is trained.

    A weight called ``weight`` goes by the name of its module. ``stack`` is how many matrices of the
    size it holds, 0 where it is one. ``asked_rank`` is larger than ``rank`` where ``inject``
    lowered it to ``min(out, in)``. ``plan`` is what a training step would do with the tokens asked
    about; None for weights that are formed whenever they are read.
    """

    name: str
    adapter: str
    stack: int
    out_features: int
    in_features: int
    rank: int
    asked_rank: int
    num_bases: int
    scaling: float
    trained: int
    plan: Plan | None


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found; a table when printed.

    ``adapters`` are the names of all, the active one first. ``left_out`` has the layers that could
    be adapted and are not, with the reason, and so the parameters that are stacks of matrices.
    """

    layers: tuple[LayerSummary, ...]
    adapters: tuple[str, ...]
    left_out: dict[str, str]
    banks: tuple[BasisBank, ...]
    bank_bytes: int
    trained: int
    total: int

    @property
    def percentage(self) -> float:
        """Trained parameters per hundred of all."""
        return 100 * self.trained / self.total

    def __str__(self) -> str:
        planned = any(layer.plan is not None for layer in self.layers)
        rows = [
            (
                layer.name,
                f"{layer.stack} x " * bool(layer.stack)
                + f"{layer.out_features} x {layer.in_features}",
                str(layer.rank) + f" (of {layer.asked_rank})" * (layer.rank < layer.asked_rank),
                str(layer.num_bases),
                f"{layer.scaling:g}",
                f"{layer.trained:,}",
                *([_describe(layer.plan)] if planned else []),
            )
            for layer in self.layers
        ]
        header = ("layer", "out x in", "rank", "bases", "scaling", "trained", "plan")
        lines = [table(header if planned else header[:-1], rows)]
        heads = {name: why for name, why in self.left_out.items() if why.startswith("output head")}
        lines += [f"left out: {name} ({why})" for name, why in heads.items()]
        stacked = {name: why for name, why in self.left_out.items() if why.startswith(_STACK)}
        for name, why in list(stacked.items())[:1]:
            more = f", and {len(stacked) - 1} more such" * (len(stacked) > 1)
            lines.append(f"left out: {name} ({why}){more}")
        if others := len(self.left_out) - len(heads) - len(stacked):
            lines.append(f"left out: {others} more, see left_out")
        active = list(dict.fromkeys(layer.adapter for layer in self.layers)) or self.adapters[:1]
        if rest := [name for name in self.adapters if name not in active]:
            names = ", ".join(map(repr, active))
            lines.append(f"adapter {names}; not active: {', '.join(map(repr, rest))}")
        banks = ", ".join(map(repr, self.banks))
        return "\n".join(lines) + (
            f"\n{banks}: {self.bank_bytes / 2**20:.2f} MiB for {len(self.layers)} layers\n"
            f"trained {self.trained:,} of {self.total:,} parameters ({self.percentage:.2f} %)"
        )


@dataclass(frozen=True)
class LayerRank:
    """The singular values of one ``ΔW``, in float64 and falling, and what they say of its rank.

    ``rank`` counts the values above ``max(out, in) · eps · σ_1``. ``stable_rank`` is
    ``‖ΔW‖_F² / σ_1²``. ``effective_rank`` is the exponential of the entropy of ``σ / Σ σ`` (Roy and
    Vetterli, 2007). ``condition`` is ``σ_1 / σ_p``. All are 0 for ``ΔW = 0``. ``certified`` is
    whether the values are those of the coefficients ``C``, which they are exactly where the columns
    of ``B`` are orthogonal (:mod:`randlora.isometry`): ``ΔW`` was then not formed.
    """

    name: str
    full_rank: int
    rank: int
    stable_rank: float
    effective_rank: float
    condition: float
    certified: bool
    singular_values: Tensor


@dataclass(frozen=True)
class RankReport:
    """What :func:`rank_report` found, layer by layer; a table when printed."""

    layers: tuple[LayerRank, ...]

    def __iter__(self) -> Iterator[LayerRank]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{layer.rank} of {layer.full_rank}",
                f"{layer.stable_rank:.1f}",
                f"{layer.effective_rank:.1f}",
                f"{layer.singular_values[0]:.2e}",
                f"{layer.condition:.1e}",
                "C, exactly" if layer.certified else "ΔW",
            )
            for layer in self.layers
        ]
        header = ("layer", "rank", "stable rank", "effective rank", "largest", "condition", "by")
        return table(header, rows)


def summary(model: nn.Module, tokens: int | None = None) -> Summary:
    """Describe what is adapted in ``model`` and what training it takes.

    Args:
        model: an adapted model.
        tokens: also say how a step with so many tokens would bracket its products, for each layer:
            forward, gradient of the input, gradients of the parameters, each through the ``weight``
            or the ``activations``, and which activation is kept.

    Returns:
        A table when printed, data when read: a :class:`LayerSummary` for each adapted layer, the
        banks and their bytes, the numbers of trained and of all parameters.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    found = _active(model)
    states = [module._randlora for module in adapted_modules(model).values()]
    banks = {id(other.bank): other.bank for state in states for other in state.all()}
    names = [s.active for s in states] + [name for state in states for name in state.names]
    left = {
        name: f"{_STACK} {' x '.join(map(str, shape))}, which target_parameters adapts"
        for name, shape in stacks(model).items()
    }
    return Summary(
        layers=tuple(
            LayerSummary(
                name=name,
                adapter=module._randlora.active,
                stack=adapter.site.stack,
                out_features=adapter.site.out,
                in_features=adapter.site.in_,
                rank=adapter.settings.rank,
                asked_rank=adapter.settings.asked_rank,
                num_bases=adapter.settings.num_bases,
                scaling=adapter.settings.scaling,
                trained=adapter.trained,
                plan=None if tokens is None else _plan(module, adapter, tokens),
            )
            for name, module, adapter in found
        ),
        adapters=tuple(dict.fromkeys(names)),
        left_out=left_out(model) | left,
        banks=tuple(banks.values()),
        bank_bytes=sum(bank.nbytes for bank in banks.values()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
    )


def rank_report(model: nn.Module, target_modules: Target | None = None) -> RankReport:
    """Compute the singular values of every ``ΔW`` of ``model`` in float64, and its ranks.

    It takes a singular value decomposition for each layer: seconds for some thousand columns,
    minutes for ten thousand, so of a large model select some. Of an isometric bank's layers it is
    that of the coefficients, with the exact rank and condition number of ``ΔW``, where the sizes
    factor; the report says so. On a terminal a bar shows how far it is.

    Args:
        model: an adapted model.
        target_modules: which of its layers, in the form that :func:`inject` has it; by default all.

    Returns:
        A table when printed, a sequence of :class:`LayerRank` when read.

    Raises:
        TypeError: if ``target_modules`` is of the wrong type.
        ValueError: if no layer of ``model`` is adapted, or none that was selected.
    """
    found = _active(model)
    if target_modules is not None:
        chosen = selected("target_modules", target_modules, names_of(model))
        found = [one for one in found if one[1] in chosen]
        if not found:
            raise ValueError(
                f"target_modules must match an adapted layer, but {target_modules!r} matches none"
            )
    layers = []
    with progress(sum(adapter.site.stack or 1 for _, _, adapter in found)) as step:
        for name, module, adapter in found:
            for index in range(adapter.site.stack or 1):
                full = name + f"[{index}]" * bool(adapter.site.stack)
                layers.append(_layer_rank(full, module, adapter, index))
                step()
    return RankReport(tuple(layers))


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, which is drawn at each call."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            bar = "#" * (30 * done // total)
            print(f"\r[{bar:<30}] {done} of {total}", end="", file=sys.stderr, flush=True)

    yield step
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _active(model: nn.Module) -> list[tuple[str, Any, Adapter]]:
    """The active updates, with the names of their weights and their modules."""
    return [
        (weight_name(name, parameter), module, adapter)
        for name, module in adapted_modules(model).items()
        for parameter, adapter in module._randlora.current.items()
    ]


def _plan(module: nn.Module, adapter: Adapter, tokens: int) -> Plan | None:
    if isinstance(module, RandLoRALinear) and adapter.site.parameter == "weight":
        return module.plan(tokens)
    return None


@torch.no_grad()
def _layer_rank(name: str, module: nn.Module, adapter: Adapter, index: int) -> LayerRank:
    r, p, q, m = adapter.sizes
    certified = adapter.bank.is_isometry(q, m) and adapter.site.kept is None
    if certified:
        lam, gamma = (t.double() for t in adapter.parameters(module))
        if adapter.site.stack:
            lam, gamma = lam[index], gamma[index]
        a = adapter.bank.a(r, p).to(lam)
        c = torch.einsum("jk,kc,jc->jkc", lam, a, gamma).flatten(0, 1)
        sigma = adapter.settings.scaling * math.sqrt(q) * torch.linalg.svdvals(c)
        sigma = torch.cat([sigma, sigma.new_zeros(p - len(sigma))])
    else:
        update = delta(module, adapter, torch.float64)
        sigma = torch.linalg.svdvals(update[index] if adapter.site.stack else update)
    return spectrum(name, sigma, q, certified=certified)


def spectrum(name: str, sigma: Tensor, q: int, *, certified: bool) -> LayerRank:
    """What the singular values of a ``ΔW`` of ``q`` rows say, falling and in float64."""
    p = len(sigma)
    if sigma[0] == 0:
        return LayerRank(name, p, 0, 0.0, 0.0, 0.0, certified, sigma)
    tolerance = q * torch.finfo(sigma.dtype).eps * sigma[0]
    share = sigma / sigma.sum()
    return LayerRank(
        name=name,
        full_rank=p,
        rank=int((sigma > tolerance).sum()),
        stable_rank=float(sigma.square().sum() / sigma[0].square()),
        effective_rank=math.exp(float(torch.special.entr(share).sum())),
        condition=float(sigma[0] / sigma[-1]),
        certified=certified,
        singular_values=sigma,
    )


def _describe(plan: Plan | None) -> str:
    if plan is None:
        return "weight, whenever it is read"
    ways = " ".join((plan.forward, plan.grad_input, plan.grad_parameters))
    return f"{ways}, keeps {plan.keeps}{' and weight' * plan.keep_weight}"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows under a header, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, tuple("-" * width for width in widths), *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)
