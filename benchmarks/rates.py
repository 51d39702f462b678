"""Which learning rate is best, over tasks, widths, ranks, kinds of bases and methods.

Every run (``tasks.py``) adapts a pre-trained model at one rate, by torch's AdamW, and adds a row to
a CSV file. A row that the file has is not computed again: the same command continues an interrupted
grid.

    python benchmarks/rates.py GRID ... [--seed N ...] [--jobs N] [--device D] [--csv FILE]
    python benchmarks/rates.py [--maps FILE.png] [--curves FILE.png] [--steps] [--csv FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import finetune
import matplotlib as mpl
import numpy as np
import torch
from runs import Row, crossed, perform_all, read
from tasks import STEPS, TASKS, VARIANTS, Run
from torch import Tensor, nn

import randlora

mpl.use("Agg")
import matplotlib.pyplot as plt

# --- the grids -----------------------------------------------------------------------------------


RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LORA_RATES = (3e-4, 1e-3, 2e-3, 3e-3)  # at 3e-3 it learns no random labels
RULES = ("default", "before")
WIDTHS = (64, 128, 256, 512, 1024)
RANKS = (2, 4, 8, 16, 32, 64)
KINDS = ("isometric", "dense", "normal", "binary", "sparse", "very_sparse")
TEXT_RANKS = {"labels": 8, "glosses": 8, "language": 9}  # that divide the width of the model
LORA_RANKS = {"labels": 16, "glosses": 16, "language": 19}  # as many parameters, to 2 %
# A rank with a frozen A, and a larger one with which a trained A needs no more parameters.
A_RANKS = {"labels": (8, 12), "glosses": (8, 12), "language": (9, 12), "digits": (5, 12)}
CURVE = 30  # points of a curve


def grid(name: str, seed: int) -> Iterator[Run]:
    """The runs of a grid, from one seed."""
    small = Run("digits", 128, seed=seed)
    if name == "width":
        yield from crossed(small, width=WIDTHS, variant=RULES, rate=RATES)
    elif name == "rank":
        yield from crossed(small, rank=RANKS, variant=RULES, rate=RATES)
    elif name == "kind":
        yield from crossed(small, method=KINDS, rate=RATES)
    elif name == "text":
        for task, rank in TEXT_RANKS.items():
            one = Run(task, rank=rank, seed=seed)
            yield from crossed(one, rate=RATES[1:4])
            yield from crossed(replace(one, method="lora", rank=LORA_RANKS[task]), rate=LORA_RATES)
            yield from crossed(replace(one, variant="before"), rate=RATES[1:4])
        yield from crossed(Run("labels", method="full", rank=0, seed=seed), rate=RATES[:2])
    elif name == "start":
        variants = [variant for variant in VARIANTS if variant != "before"]
        for one in (small, Run("labels", seed=seed), Run("glosses", seed=seed)):
            yield from crossed(one, variant=variants, rate=RATES[2:4])
    elif name == "train_a":
        for task, ranks in A_RANKS.items():
            for rank, train_a in zip(ranks, (False, True), strict=True):
                one = Run(task, 128 * (task == "digits"), rank=rank, train_a=train_a, seed=seed)
                yield from crossed(one, rate=RATES[2:4])
    elif name == "basis":
        for one in (small, *(Run(task, rank=rank, seed=seed) for task, rank in TEXT_RANKS.items())):
            yield from crossed(one, method=KINDS[:2])


GRIDS = ("width", "rank", "kind", "text", "start", "train_a", "basis")


MEASURED = "trained", "score", "curve"


def perform(run: Run, device: torch.device) -> dict[str, Any]:
    """The row of a run."""
    model, score, curve = TASKS[run.task](run, device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    points = [f"{part.mean():.3f}" for part in np.array_split(curve, CURVE)] if curve else []
    return {
        "trained": trained,
        "score": f"{score:.4f}",
        "curve": " ".join(points),
    }


Table = dict[Run, Row]


# --- report --------------------------------------------------------------------------------------


def means(rows: Table) -> dict[Run, tuple[float, float, int]]:
    """The mean score over seeds, its standard error and the number of seeds, by run of seed 0."""
    scores: dict[Run, list[float]] = {}
    for run, row in rows.items():
        scores.setdefault(replace(run, seed=0), []).append(float(row["score"]))
    return {
        run: (
            statistics.fmean(found),
            statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan,
            len(found),
        )
        for run, found in scores.items()
    }


def table(rows: Table, wanted: Iterable[Run]) -> str:
    """A line for each method, with its scores by rate."""
    found = means(rows)
    lines: dict[Run, dict[float, str]] = {}
    for run in wanted:
        if (one := replace(run, seed=0)) in found:
            mean, error, count = found[one]
            figure = f"{mean:.3f} ± {error:.3f}" if count > 1 else f"{mean:.3f}"
            lines.setdefault(replace(one, rate=0), {})[one.rate] = f"{figure} ({count})"
    rates = sorted({rate for line in lines.values() for rate in line})
    names = [f.name for f in fields(Run) if f.name not in ("rate", "seed")]
    text = [f"| {' | '.join([*names, *map('{:g}'.format, rates)])} |"]
    text.append("|---" * (len(names) + len(rates)) + "|")
    for run, line in lines.items():
        cells = [str(getattr(run, name)) for name in names]
        text.append(f"| {' | '.join([*cells, *(line.get(rate, '') for rate in rates)])} |")
    return "\n".join(text)


def maps(rows: Table, path: Path) -> None:
    """Heat maps: rate by width, rank and kind, before and after, in points below the best rate."""
    found = means(rows)
    panels = [
        ("width", WIDTHS, "width, at rank 8"),
        ("rank", RANKS, "rank, at width 128"),
        ("method", KINDS, "kind, at width 128 and rank 8"),
    ]
    titles = {"before": "scaling 1, Λ = 1/√m at the start (before)", "default": "the defaults"}
    figure, axes = plt.subplots(2, len(panels), figsize=(14, 6.5), layout="constrained")
    for row, (variant, title) in enumerate(titles.items()):
        for panel, (name, values, label) in zip(axes[row], panels, strict=True):
            lines = {}
            for value in values:
                one = replace(Run("digits", 128, variant=variant), **{name: value})
                scores = [found.get(replace(one, rate=rate), (math.nan,))[0] for rate in RATES]
                if not all(map(math.isnan, scores)):
                    lines[str(value)] = 100 * (np.array(scores) - np.nanmax(scores))
            if len(lines) < 2:
                panel.axis("off")
                continue
            below = np.array(list(lines.values()))
            panel.imshow(below, vmin=-10, vmax=0, aspect="auto", cmap="viridis")
            for (y, x), value in np.ndenumerate(below):
                if not math.isnan(value):
                    color = "white" if value < -5 else "black"
                    panel.text(x, y, f"{value:.1f}", ha="center", va="center", color=color)
            panel.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
            panel.set_yticks(range(len(lines)), list(lines))
            panel.set(title=title, xlabel="rate of AdamW", ylabel=label)
    figure.suptitle("Accuracy on digits with permuted pixels, in points below the best rate")
    figure.savefig(path, dpi=100)


def curves(rows: Table, path: Path) -> None:
    """The accuracy while random labels are learned, each method at its best rate."""
    figure, axes = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
    for method, name in {
        "full": "full fine-tuning",
        "isometric": "RandLoRA",
        "lora": "LoRA",
    }.items():
        of_method: dict[float, list[tuple[float, int, np.ndarray]]] = {}
        for run, row in rows.items():
            plain = run.variant == "default" and not run.train_a and row["curve"]
            if (run.task, run.method) == ("labels", method) and plain:
                points = 100 * np.array(row["curve"].split(), float)
                found = float(row["score"]), int(row["trained"]), points
                of_method.setdefault(run.rate, []).append(found)
        if of_method:
            rate = max(of_method, key=lambda rate: statistics.fmean(o[0] for o in of_method[rate]))
            points = np.array([points for _, _, points in of_method[rate]])
            steps = (np.arange(CURVE) + 0.5) * STEPS["labels"] / CURVE
            label = f"{name}, {of_method[rate][0][1]:,} trained"
            (line,) = axes.plot(steps, points.mean(0), label=label)
            axes.fill_between(
                steps, points.min(0), points.max(0), alpha=0.2, color=line.get_color()
            )
    axes.set(xlabel="step", ylabel="training accuracy (%)", ylim=(0, 100))
    axes.set_title("MiniLM learns 2,000 random labels")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# Of a RandLoRA layer: how it is made. PEFT's bases, and scalings of the paper's tables 8 and 9.
FIRST_STEPS: dict[str, dict[str, Any]] = {
    "the default": {},
    "dense": {"basis": "dense"},
    "PEFT's default, rank 32": {"basis": "peft", "rank": 32},
    "10 / r (table 8), rank 6": {"basis": "peft", "rank": 6, "alpha": 10},
    "2 / √n (table 9), rank 6": {"basis": "peft", "rank": 6, "alpha": 12 / math.sqrt(128)},
}


def first_steps(width: int = 768, rate: float = 1e-3) -> Iterator[tuple[str, float]]:
    """The spectral norm of a first step of AdamW, for a square weight and a rank-one gradient."""

    def norm(weight: Callable[[], Tensor], parameters: Iterable[Tensor], rate: float) -> float:
        start = weight().detach()
        optimiser = torch.optim.AdamW(parameters, lr=rate)
        torch.outer(torch.randn(width), torch.randn(width)).mul(weight()).sum().backward()
        optimiser.step()
        return torch.linalg.matrix_norm(weight().detach() - start, 2).item()

    torch.manual_seed(0)
    for name, arguments in FIRST_STEPS.items():
        model = nn.Sequential(nn.Linear(width, width, bias=False))
        randlora.inject(model, target_modules="0", modules_to_save=[], **arguments)
        layer: Any = model[0]
        yield name, norm(lambda of=layer: of.weight, randlora.adapter_parameters(model), rate)
    for rank in (16, 32):
        one = finetune.LoRA(torch.zeros(width, width), rank)
        nn.init.kaiming_uniform_(one.a, math.sqrt(5))  # as in PEFT
        yield f"LoRA, rank {rank}", norm(one.delta, one.parameters(), rate)
    whole = nn.Parameter(torch.zeros(width, width))
    yield f"full fine-tuning, at {rate / 10:g}", norm(lambda: whole + 0, [whole], rate / 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("grids", nargs="*", metavar="GRID", help=", ".join(GRIDS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0], dest="seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--maps", type=Path, help="draw score by rate, and width, rank and kind")
    parser.add_argument("--curves", type=Path, help="draw how random labels are learned")
    parser.add_argument("--steps", action="store_true", help="compute the sizes of first steps")
    options = parser.parse_args()
    for name in options.grids:
        if name not in GRIDS:
            parser.error(f"GRID must be one of {', '.join(GRIDS)}, got {name!r}")
    wanted = dict.fromkeys(
        run for seed in options.seeds for name in options.grids for run in grid(name, seed)
    )
    if wanted:
        rows = perform_all(
            lambda rows: wanted, Run, perform, MEASURED, options.csv, options.jobs, options.device
        )
        print(table(rows, wanted))
    if options.maps:
        maps(read(options.csv, Run), options.maps)
    if options.curves:
        curves(read(options.csv, Run), options.curves)
    if options.steps:
        for name, size in first_steps():
            print(f"{name:<30}{size:.4f}")


if __name__ == "__main__":
    main()
