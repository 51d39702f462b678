"""Read-only views of an adapted model: what is trained, and the rank of each update."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.bank import BasisBank
from randlora.core.planning import Plan
from randlora.model.choosing import STACK, left_out
from randlora.model.index import ModelIndex, adapted_modules
from randlora.model.patterns import Target, selected
from randlora.modules.effective import delta_of
from randlora.modules.linear import RandLoRALinear
from randlora.modules.sharding import whole
from randlora.modules.weight_update import WeightUpdate, weight_name


@dataclass(frozen=True)
class LayerSummary:
    """One adapted weight: its name, its sizes as a matrix, and how many numbers are trained."""

    name: str  # of the module, and of the parameter unless that is called `weight`
    adapter: str
    stack: int  # the number of matrices in a stack; 0 for a single matrix
    out_features: int
    in_features: int
    rank: int
    asked_rank: int  # the rank given to `inject`, which lowers it to min(out, in)
    num_bases: int
    scaling: float
    train_a: bool  # whether it has an `A` of its own, which is trained
    trained: int
    plan: Plan | None  # None without `tokens`, and for modules that read W0 + ΔW


@dataclass(frozen=True)
class Summary:
    """The result of :func:`summary`; a table when printed."""

    layers: tuple[LayerSummary, ...]
    adapters: tuple[str, ...]  # all adapters, the active one first
    left_out: dict[str, str]  # by name: why a layer or stack that can be adapted is not
    banks: tuple[BasisBank, ...]
    bank_bytes: int
    trained: int
    total: int

    @property
    def percentage(self) -> float:
        """Trained parameters, in percent of all parameters."""
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
                f"{layer.trained:,}" + " with A" * layer.train_a,
                *([_describe(layer.plan)] if planned else []),
            )
            for layer in self.layers
        ]
        header = ("layer", "out x in", "rank", "bases", "scaling", "trained", "plan")
        lines = [table(header if planned else header[:-1], rows)]
        heads = {name: why for name, why in self.left_out.items() if why.startswith("output head")}
        lines += [f"left out: {name} ({why})" for name, why in heads.items()]
        stacked = {name: why for name, why in self.left_out.items() if why.startswith(STACK)}
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
    """The singular values of one ``ΔW``, and the ranks that follow. All are 0 for ``ΔW = 0``."""

    name: str
    full_rank: int  # p = min(out, in)
    rank: int  # the number of values above max(out, in) · eps · σ_1
    stable_rank: float  # ‖ΔW‖_F² / σ_1²
    effective_rank: float  # exp of the entropy of σ / Σ σ (Roy and Vetterli, 2007)
    condition: float  # σ_1 / σ_p
    certified: bool  # whether the values are those of C, by the theorem on isometric bases
    singular_values: Tensor  # float64, descending


@dataclass(frozen=True)
class RankReport:
    """The result of :func:`rank_report`, layer by layer; a table when printed."""

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
    """Describe the adapters of ``model``: which weights, which settings, how many parameters.

    Args:
        model: an adapted model.
        tokens: the number of tokens of a training step. If given, the summary also says how each
            layer orders its products: whether forward, the gradient of the input and the gradients
            of the parameters go through the ``weight`` or the ``activations``, and which activation
            is saved for backward.

    Returns:
        A table when printed, data when read: a :class:`LayerSummary` for each adapted weight, the
        banks and their bytes, the numbers of trained and of all parameters.

    Raises:
        ValueError: if no layer of ``model`` is adapted.
    """
    modules = adapted_modules(model)
    index, states = ModelIndex(model), [module._randlora for module in modules.values()]
    banks = {id(other.bank): other.bank for state in states for other in state.all_updates()}
    names = [s.active for s in states] + [name for state in states for name in state.adapter_names]
    return Summary(
        layers=tuple(
            LayerSummary(
                name=name,
                adapter=module._randlora.active,
                stack=update.spec.stack,
                out_features=update.spec.out,
                in_features=update.spec.in_,
                rank=update.settings.rank,
                asked_rank=update.settings.asked_rank,
                num_bases=update.settings.num_bases,
                scaling=update.settings.scaling,
                train_a=update.settings.train_a,
                trained=update.trained,
                plan=_plan(module, update, tokens),
            )
            for name, module, update in _active(modules)
        ),
        adapters=tuple(dict.fromkeys(names)),
        left_out=left_out(index),
        banks=tuple(banks.values()),
        bank_bytes=sum(bank.nbytes for bank in banks.values()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
    )


def rank_report(model: nn.Module, target_modules: Target | None = None) -> RankReport:
    """Compute the singular values of every ``ΔW`` of ``model`` in float64, and its ranks.

    Each layer takes a singular value decomposition: seconds for some thousand columns, minutes for
    ten thousand, so select some layers of a large model. With an isometric basis, if the sizes
    factor, the decomposition is that of the coefficients ``C``, which has the exact rank and
    condition number of ``ΔW``; the report says so. On a terminal a bar shows the progress.

    Args:
        model: an adapted model.
        target_modules: which layers, as in :func:`inject`; by default all adapted layers.

    Returns:
        A table when printed, a sequence of :class:`LayerRank` when read.

    Raises:
        TypeError: if ``target_modules`` is of the wrong type.
        ValueError: if no layer of ``model`` is adapted, or no selected layer is.
    """
    found = _active(adapted_modules(model))
    if target_modules is not None:
        chosen = selected("target_modules", target_modules, ModelIndex(model).names)
        found = [one for one in found if one[1] in chosen]
        if not found:
            raise ValueError(
                f"target_modules must match an adapted layer, but {target_modules!r} matches none"
            )
    layers = []
    with progress(sum(update.spec.stack or 1 for _, _, update in found)) as step:
        for name, module, update in found:
            for index in range(update.spec.stack or 1):
                full = name + f"[{index}]" * bool(update.spec.stack)
                layers.append(_layer_rank(full, module, update, index))
                step()
    return RankReport(tuple(layers))


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar, if stderr is a terminal. Yields a function; each call of it is one step."""
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


def _active(modules: Mapping[str, Any]) -> list[tuple[str, Any, WeightUpdate]]:
    """The active updates: the name of the weight, the module and the update of each."""
    return [
        (weight_name(name, parameter), module, update)
        for name, module in modules.items()
        for parameter, update in module._randlora.active_updates.items()
    ]


def _plan(module: nn.Module, update: WeightUpdate, tokens: int | None) -> Plan | None:
    if tokens is None or update.spec.parameter != "weight":
        return None
    return module.plan(tokens) if isinstance(module, RandLoRALinear) else None


@torch.no_grad()
def _layer_rank(name: str, module: nn.Module, update: WeightUpdate, index: int) -> LayerRank:
    r, p, q, m = update.sizes
    certified = update.bank.is_isometry(q, m) and update.spec.frozen_row is None
    if certified:
        trained = [whole(t).double() for t in update.parameters(module)]
        lam, gamma, *own = [t[index] for t in trained] if update.spec.stack else trained
        a = own[0] if own else update.bank.a(r, p).to(lam)
        c = torch.einsum("jk,kc,jc->jkc", lam, a, gamma).flatten(0, 1)
        sigma = update.settings.scaling * math.sqrt(q) * torch.linalg.svdvals(c)
        sigma = torch.cat([sigma, sigma.new_zeros(p - len(sigma))])
    else:
        delta = delta_of(module, update, torch.float64)
        sigma = torch.linalg.svdvals(delta[index] if update.spec.stack else delta)
    return spectrum(name, sigma, q, certified=certified)


def spectrum(name: str, sigma: Tensor, q: int, *, certified: bool) -> LayerRank:
    """The ranks of a ``ΔW`` with ``q`` rows, from its singular values, descending, in float64."""
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
    """Rows under a header; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, tuple("-" * width for width in widths), *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)
