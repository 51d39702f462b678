"""Every table and figure of this folder's README, from the CSV files.

    python benchmarks/evidence/report.py [--check]

writes the tables between the marks of the README, and the figures beside it. With ``--check`` it
writes nothing, and fails if a table is not what the files give.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import bases
import devices
import fits
import forgetting
import heads
import landscape
import longer
import matplotlib as mpl
import methods
import numpy as np
import parameters
import rank
import seconds
import shots
import variants
from common import HERE, TASKS, before, found, point, read, results
from protocol import PILOTS, Found, Run, Table, difference, interval, kept_at

mpl.use("Agg")
import matplotlib.pyplot as plt

README = HERE / "README.md"
TITLES = {name: method.title for name, method in methods.METHODS.items()}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return "Not run yet."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def points_of(question: object, task: str) -> list[Run]:
    return [one for one in question.points() if one.task == task]


def score(got: Found, column: str = "test") -> str:
    mean, half = interval(list(got.values(column).values()))
    return f"{mean:.3f} ± {half:.3f}"


def signed(one: Found, other: Found, column: str = "test") -> str:
    return bold(*difference(one, other, column))


def bold(mean: float, half: float) -> str:
    """A difference with its 95 % interval, bold if the interval excludes 0."""
    if not math.isfinite(mean):
        return "–"
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def less(one: Found | None, other: Found | None, column: str = "test") -> str:
    return "" if one is None or other is None or one is other else signed(one, other, column)


def trained(got: Found) -> int:
    return int(next(iter(got.rows.values()))["trained"])


# --- tables --------------------------------------------------------------------------------------


def parameter_table(rows: Table, task: str) -> str:
    """All methods on a task, the best first, beside LoRA and RandLoRA of the task's count."""
    gots = [got for one in points_of(parameters, task) if (got := found(rows, one))]
    lora, ours = (
        next((got for got in gots if got.point == point(task, name)), None)
        for name in ("lora", "isometric")
    )
    lines = [
        (
            *(TITLES[got.point.method], f"{trained(got):,}", f"{got.rate:g}", score(got)),
            f"{min(got.values().values()):.3f}",
            *(less(got, lora), less(got, ours), f"{got.mean('kept'):.3f}"),
        )
        for got in sorted(gots, key=lambda got: -got.mean())
    ]
    start = [rows.get(run) for run in before(task)]
    if all(start):
        got = Found(start[0], 0.0, dict(enumerate(start)))
        lines.append(("before", "", "", score(got), "", "", "", f"{got.mean('kept'):.3f}"))
    count = f"{trained(lora):,}" if lora else ""
    head = "method", "trained", "rate", "test", "worst seed"
    return markdown((*head, f"less LoRA, {count}", "less isometric", "kept"), lines)


def budget_table(rows: Table) -> str:
    """At each count, and in more steps: RandLoRA and full fine-tuning less LoRA."""
    lines = []
    for task in TASKS:
        for steps in (0, longer.TIMES * TASKS[task].steps):
            for count in parameters.counts(task):
                lora, ours, dense, full = (
                    found(rows, replace(point(task, method, count), steps=steps))
                    for method in ("lora", "isometric", "dense", "full")
                )
                if lora and ours:
                    lines.append(
                        (
                            *(TASKS[task].title, str(steps or TASKS[task].steps)),
                            f"{trained(lora):,}",
                            *(score(lora), *(less(got, lora) for got in (ours, dense, full))),
                            less(ours, lora, "kept"),
                        )
                    )
    head = "task", "steps", "LoRA trains", "LoRA", "isometric less LoRA", "uniform less LoRA"
    return markdown((*head, "full fine-tuning less LoRA", "kept: isometric less LoRA"), lines)


def question_table(question: object, names: Sequence[str], rows: Table, base: str) -> str:
    """Methods by tasks, and in each task the difference from one of them."""
    tasks = list(dict.fromkeys(one.task for one in question.points()))
    cells: dict[str, list[str]] = {name: [] for name in names}
    for task in tasks:
        gots = {one.method: found(rows, one) for one in points_of(question, task)}
        for name in names:
            got, other = gots.get(name), gots.get(base)
            text = score(got) if got else ""
            if got and other and name != base:
                text += f" ({signed(got, other)})"
            cells[name].append(text)
    head = "", *(TASKS[task].title for task in tasks)
    return markdown(head, [(TITLES[name], *cells[name]) for name in names])


def steps_table(rows: Table) -> str:
    """Keys and values: after how many steps a batch is known, before its own step."""
    task, lines = "recall", []
    for one in points_of(parameters, task):
        if got := found(rows, one):
            curves = np.array([row["curve"].split() for row in got.rows.values()], float)
            cells = []
            for share in (0.5, 0.9):
                first = ((curves >= share).argmax(1) + 1) * TASKS[task].steps // curves.shape[1]
                reached = bool((curves.max(1) >= share).all())
                cells.append(f"{np.median(first):.0f} ({min(first)}-{max(first)})" * reached)
            lines.append((TITLES[one.method], f"{trained(got):,}", score(got), *cells))
    return markdown(("method", "trained", "at the end", "to 50 %", "to 90 %"), lines)


def device_table(rows: Table) -> str:
    """Rows of ``results.csv`` from one device beside those of the same runs from another."""
    again = {run: row for run, row in read(devices.DEVICES, Run).items() if run in rows}
    pairs: dict[tuple[str, str, str], list[float]] = {}
    for run, row in again.items():
        score = "validation" if run.seed in PILOTS else "test"
        apart = abs(float(row[score]) - float(rows[run][score]))
        pairs.setdefault((run.task, rows[run]["device"], row["device"]), []).append(apart)
    lines = []
    for (task, *names), apart in pairs.items():
        both = [g for name in devices.NAMES if (g := found(rows, point(task, name)))]
        other = [replace(g, rows={r.seed: again.get(r) for r in g.runs()}) for g in both]
        gained = [
            signed(ours, lora)
            for lora, ours in (each for each in (both, other) if len(each) == 2)
            if all((*lora.rows.values(), *ours.rows.values()))
        ]
        same, mean, most = apart.count(0), statistics.fmean(apart), max(apart)
        lines.append(
            (
                TASKS[task].title,
                ", ".join(names),
                f"{len(apart)}",
                f"{same}",
                f"{mean:.3f}",
                f"{most:.3f}",
                ", ".join(gained),
            )
        )
    head = "task", "devices", "runs on both", "the same score", "mean apart", "most"
    return markdown((*head, "isometric less LoRA on each"), lines)


def fit_table() -> str:
    """The share of the energy that each form reaches at the count of LoRA 16, and its own count."""
    found_rows = [row for row in read_csv(fits.FITS) if row["lora"] == "16"]
    lines = []
    for target in dict.fromkeys(row["target"] for row in found_rows):
        of_target = {row["form"]: row for row in found_rows if row["target"] == target}
        first = next(iter(of_target.values()))
        shares = (
            f"{float(of_target[form]['share']):.3f} ({int(of_target[form]['count']):,})"
            if form in of_target
            else ""
            for form in fits.FORMS
        )
        lines.append((target, f"{first['out']} × {first['in']}", *shares))
    return markdown(("target", "size", *(TITLES[form] for form in fits.FORMS)), lines)


def seconds_table(rows: Table) -> str:
    """The medians of a step over the rounds, of full fine-tuning's, and the scores."""
    times: dict[tuple[str, str], list[float]] = {}
    for row in read_csv(seconds.TIMES):
        times.setdefault((row["task"], row["method"]), []).append(float(row["seconds"]))
    medians = {key: statistics.median(values) for key, values in times.items()}
    tasks = list(dict.fromkeys(task for task, _ in medians))
    lines = []
    for name in dict.fromkeys(name for _, name in medians):
        cells = []
        for task in tasks:
            got = found(rows, point(task, name))
            ratio = f"{medians[task, name] / medians[task, 'full']:.2f}"
            cells += [ratio, f"{got.mean():.3f}" if got else ""]
        lines.append((TITLES[name], *cells))
    head = [one for task in tasks for one in (f"{TASKS[task].title}: step", "score")]
    return markdown(("method", *head), lines)


def check_counts() -> None:
    """Exit unless every point trains as much as LoRA of a rank that is compared, to a twentieth."""
    for question in (parameters, rank, bases, variants):
        for one in question.points():
            if methods.METHODS[one.method].fixed is None:
                shapes = TASKS[one.task].shapes
                count = methods.total(one.method, shapes, one.size)
                others = [methods.total("lora", shapes, r) for r in parameters.counts(one.task)]
                if all(abs(count / other - 1) > 0.05 for other in others):
                    raise SystemExit(f"{one} trains {count:,}, LoRA {others}")


def check_rates(rows: Table) -> None:
    """Exit if a model was looked at that was adapted at another rate than the one now chosen."""
    wanted = {(row["task"], row["method"], row["rate"]) for row in read_csv(landscape.CKA)}
    wanted = {one for one in wanted if one[1] != "start"}
    titles = {task.title: name for name, task in TASKS.items()}
    for row in read_csv(fits.FITS):
        if row["rate"]:
            wanted.add((titles[row["target"].split(":")[0]], "full", row["rate"]))
    for task, method, rate in sorted(wanted):
        got = found(rows, point(task, method))
        if got is None or f"{got.rate:g}" != rate:
            raise SystemExit(f"cka.csv, plane.csv or fits.csv: {task}, {method} is of rate {rate}")


def alignment_table() -> str:
    """Per task and method: CKA with the fine-tuned model, and the size of what changed."""
    lines, found_rows = [], read_csv(landscape.CKA)
    for task in dict.fromkeys(row["task"] for row in found_rows):
        seeds = list(dict.fromkeys(row["seed"] for row in found_rows if row["task"] == task))
        of_lora: list[float] = []
        for way in ("start", "lora", "isometric", "full"):
            means = {  # over the layers, of each seed
                name: [
                    statistics.fmean(
                        float(row[name])
                        for row in found_rows
                        if (row["task"], row["method"], row["seed"]) == (task, way, seed)
                    )
                    for seed in seeds
                ]
                for name in ("cka", "spectral", "frobenius")
            }
            text = f"{statistics.fmean(means['cka']):.3f}"
            if way == "lora":
                of_lora = means["cka"]
            if way == "isometric":
                apart = [one - other for one, other in zip(means["cka"], of_lora, strict=True)]
                mean, half = interval(apart) if len(apart) > 1 else (apart[0], None)
                text += f" ({mean:+.3f}" + (")" if half is None else f" ± {half:.3f})")
            sizes = (f"{statistics.fmean(means[name]):.2f}" for name in ("spectral", "frobenius"))
            title = {"start": "before", **TITLES}[way]
            lines.append((TASKS[task].title, f"{len(seeds)}", title, text, *sizes))
    head = "task", "seeds", "model", "CKA (less LoRA)", "ΔW, spectral", "ΔW, Frobenius"
    return markdown(head, lines)


def shots_table(rows: Table) -> str:
    names, lines = shots.NAMES, []
    for count in shots.SHOTS:
        gots = {name: found(rows, shots.case(name, count)) for name in names}
        if all(gots.values()):
            lines.append(
                (
                    count or "all",
                    *(score(gots[name]) for name in names),
                    signed(gots["isometric"], gots["lora"]),
                )
            )
    head = "examples of a class", *(TITLES[name] for name in names), "RandLoRA less LoRA"
    return markdown(head, lines)


def heads_table(rows: Table) -> str:
    """With a rate of the head's own, less LoRA, and less what one rate for all gives."""
    lines = []
    for task, names in heads.NAMES.items():
        owns = {name: found(rows, point(task, name, head=heads.HEAD)) for name in names}
        for name, own in owns.items():
            if own and (one := found(rows, point(task, name))):
                lines.append(
                    (
                        *(TASKS[task].title, TITLES[name], f"{own.rate:g} ({one.rate:g})"),
                        *(score(own), less(own, owns["lora"]), less(own, owns["isometric"])),
                        *(signed(own, one), f"{own.mean('kept'):.3f}", signed(own, one, "kept")),
                    )
                )
    head = "task", "method", "rate (one rate)", "test", "less LoRA", "less isometric"
    return markdown((*head, "less one rate", "kept", "kept, less one rate"), lines)


def head_rates_table(rows: Table) -> str:
    """The mean on validation of the seeds that choose, at several rates of the head."""
    lines = []
    for task in heads.NAMES:
        for name in heads.VARIED:
            one = found(rows, point(task, name))
            own = found(rows, point(task, name, head=heads.HEAD))
            if one and own:
                at = [replace(own.point, rate=own.rate, head=head) for head in heads.HEADS]
                at.insert(0, replace(one.point, rate=one.rate))
                of_seeds = [[rows.get(replace(run, seed=seed)) for seed in PILOTS] for run in at]
                cells = (
                    f"{statistics.fmean(float(row['validation']) for row in pair):.3f}"
                    if all(pair)
                    else ""
                    for pair in of_seeds
                )
                lines.append((TASKS[task].title, TITLES[name], f"{own.rate:g}", *cells))
    head = "task", "method", "rate of the rest", "one rate", *(f"head {h:g}" for h in heads.HEADS)
    return markdown(head, lines)


def at_each_rate(rows: Table, one: Run) -> dict[float, Found]:
    """What the reported seeds gave, for the rates at which all of them were run."""
    seeds, at_rate = TASKS[one.task].seeds, {}
    for rate in forgetting.RATES:
        of_seeds = {seed: rows.get(replace(one, rate=rate, seed=seed)) for seed in seeds}
        if all(of_seeds.values()):
            at_rate[rate] = Found(one, rate, of_seeds)
    return at_rate


def forgetting_table(rows: Table) -> str:
    """At the best rate on validation; and less LoRA, at the accuracies of LoRA at some rates."""
    lines = []
    for task in dict.fromkeys(one.task for one in forgetting.points()):
        at = {one.method: at_each_rate(rows, one) for one in points_of(forgetting, task)}
        if any(len(at_rate) < len(forgetting.RATES) for at_rate in at.values()):
            continue
        for name, at_rate in at.items():
            best = max(at_rate.values(), key=lambda got: got.mean("validation"))
            cells = []
            for rate in forgetting.COMPARED:
                lora = at["lora"][rate]
                apart = [
                    kept_at(float(row["test"]), at_rate.values(), seed) - float(row["kept"])
                    for seed, row in lora.rows.items()
                ]
                cells.append("" if name == "lora" else bold(*interval(apart)))
            lines.append(
                (
                    *(TASKS[task].title, TITLES[name], f"{best.rate:g}", score(best)),
                    *(score(best, "kept"), *cells),
                )
            )
    head = "task", "method", "best rate", "test", "kept"
    at_lora = (f"kept, less LoRA at {rate:g}" for rate in forgetting.COMPARED)
    return markdown((*head, *at_lora), lines)


TABLES: dict[str, Callable[[Table], str]] = {
    **{f"parameters: {task}": lambda rows, t=task: parameter_table(rows, t) for task in TASKS},
    "budgets": budget_table,
    "devices": device_table,
    "steps": steps_table,
    "rank": lambda rows: question_table(rank, rank.METHODS, rows, "lora"),
    "bases": lambda rows: question_table(bases, bases.KINDS, rows, "dense"),
    "variants": lambda rows: question_table(variants, variants.FORMS, rows, "isometric"),
    "fits": lambda rows: fit_table(),
    "alignment": lambda rows: alignment_table(),
    "seconds": seconds_table,
    "forgetting": forgetting_table,
    "shots": shots_table,
    "heads": heads_table,
    "head rates": head_rates_table,
}


def filled(text: str) -> str:
    """The README with each table between its marks, ``<!-- name -->`` and ``<!-- end -->``."""
    rows = results()

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{TABLES[match[1]](rows)}\n\n<!-- end -->"

    return re.sub(r"<!-- (?!end)([^>]+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


# --- figures -------------------------------------------------------------------------------------

LINES = {"lora": ("C1", "o"), "isometric": ("C0", "s")}
COLORS = {"head": "C7", "lora": "C1", "isometric": "C0", "full": "C2", "start": "C7"}


def parameter_figure(rows: Table, path: Path) -> None:
    """Score over trained parameters, a panel for each task."""
    shown = {
        task: [g for one in points_of(parameters, task) if (g := found(rows, one))]
        for task in TASKS
    }
    shown = {
        task: gots
        for task, gots in shown.items()
        if len({got.point.size for got in gots if got.point.method == "isometric"}) > 1
    }
    if not shown:
        return
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines), layout="constrained", squeeze=False
    )
    names = list(methods.METHODS)
    for panel, (task, gots) in zip(axes.flat, shown.items(), strict=False):
        for method, (color, marker) in LINES.items():
            of_method = sorted(
                (g for g in gots if g.point.method == method), key=lambda g: trained(g)
            )
            if of_method:
                found_scores = np.array([interval(list(g.values().values())) for g in of_method])
                panel.errorbar(
                    [trained(g) for g in of_method],
                    *found_scores.T,
                    color=color,
                    marker=marker,
                    capsize=3,
                    label=TITLES[method],
                )
        for got in gots:
            if got.point.method not in LINES:
                place = names.index(got.point.method)
                panel.plot(
                    trained(got),
                    got.mean(),
                    linestyle="",
                    marker="v^<>dPX*phD"[place % 11],
                    color=mpl.colormaps["tab20"](place % 20),
                    label=TITLES[got.point.method],
                )
        panel.set(xscale="log", title=TASKS[task].title, xlabel="trained parameters")
        panel.set_ylabel("minus the loss" if task == "language" else "accuracy")
        panel.xaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    for panel in axes.flat[len(shown) :]:
        panel.axis("off")
    drawn = [panel.get_legend_handles_labels() for panel in axes.flat]
    entries = {name: handle for pair in drawn for handle, name in zip(*pair, strict=True)}
    figure.legend(entries.values(), entries, ncols=8, fontsize=7, loc="outside lower center")
    figure.savefig(path, dpi=110)


def curve_figure(rows: Table, path: Path) -> None:
    """How the two tasks of memory are learned: mean and range of the seeds."""
    styles = ("full", "isometric", "lora")
    shown = {
        task: [
            got
            for one in points_of(parameters, task)
            if one.method in styles and (got := found(rows, one))
        ]
        for task in ("memory", "recall")
    }
    shown = {task: gots for task, gots in shown.items() if gots}
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(shown), figsize=(5.4 * len(shown), 3.8), layout="constrained", squeeze=False
    )
    for panel, (task, gots) in zip(axes.flat, shown.items(), strict=True):
        counts = parameters.counts(task)
        for got in gots:
            method = got.point.method
            curves = 100 * np.array([row["curve"].split() for row in got.rows.values()], float)
            steps = (np.arange(curves.shape[1]) + 0.5) * TASKS[task].steps / curves.shape[1]
            sizes = [parameters.point(task, method, count).size for count in counts]
            style = ("-", "--", ":")[sizes.index(got.point.size)]
            label = f"{TITLES[method]}, {trained(got) / 1e6:.2f} M"
            panel.plot(steps, curves.mean(0), style, color=COLORS[method], label=label)
            panel.fill_between(steps, curves.min(0), curves.max(0), color=COLORS[method], alpha=0.1)
        panel.set(title=TASKS[task].title, xlabel="step", ylabel="known (%)", ylim=(0, 100))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def landscape_figure(rows: Table, path: Path) -> None:
    """CKA by layer, and the loss over the plane, a row for each task."""
    found_rows, planes = read_csv(landscape.CKA), read_csv(landscape.PLANE)
    tasks = list(dict.fromkeys(row["task"] for row in found_rows))
    if not tasks:
        return
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(10, 3.6 * len(tasks)), layout="constrained", squeeze=False
    )
    for (left, right), task in zip(axes, tasks, strict=True):
        for way in ("start", "lora", "isometric"):
            of_way = [r for r in found_rows if (r["task"], r["method"]) == (task, way)]
            names = list(dict.fromkeys(row["layer"] for row in of_way))
            mean = [
                statistics.fmean(float(r["cka"]) for r in of_way if r["layer"] == name)
                for name in names
            ]
            label = {"start": "before", **TITLES}[way]
            left.plot(range(1, len(mean) + 1), mean, ".-", color=COLORS[way], label=label)
        left.set(title=f"{TASKS[task].title}: CKA with the fine-tuned model", xlabel="layer")
        left.legend(fontsize=7)
        left.grid(alpha=0.3)
        points = [
            tuple(float(r[n]) for n in ("x", "y", "loss")) for r in planes if r["task"] == task
        ]
        if points:
            x, y, loss = np.array(points).T
            levels = np.linspace(loss.min(), min(loss.max(), loss.min() + 4), 25)
            drawn = right.tricontourf(x, y, loss, levels=levels, extend="max")
            figure.colorbar(drawn, ax=right, label="training loss")
            places = {"LoRA": (0, 0), "RandLoRA": (1, 0), "fine-tuned": (0.5, 1)}
            for name, place in places.items():
                right.plot(*place, "wo", markeredgecolor="black")
                right.annotate(
                    name, place, color="white", xytext=(4, 4), textcoords="offset points"
                )
            right.set(title=f"{TASKS[task].title}: the plane of weights, seed 0")
    figure.savefig(path, dpi=110)


def shots_figure(rows: Table, path: Path) -> None:
    if not any(found(rows, one) for one in shots.points() if one.shots):
        return
    figure, panel = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
    for method in ("head", "lora", "isometric", "full"):
        gots = [found(rows, shots.case(method, count)) for count in shots.SHOTS]
        if shown := [(place, got) for place, got in enumerate(gots) if got]:
            places, gots = zip(*shown, strict=True)
            scores = np.array([interval(list(got.values().values())) for got in gots]).T
            panel.errorbar(places, *scores, color=COLORS[method], marker="o", label=TITLES[method])
    panel.set_xticks(range(len(shots.SHOTS)), [s or "all" for s in shots.SHOTS])
    panel.set(title=TASKS[shots.TASK].title, xlabel="examples of a class", ylabel="accuracy")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def forgetting_figure(rows: Table, path: Path) -> None:
    """Kept over test, the rates as points of a line."""
    shown = {one: got for one in forgetting.points() if len(got := at_each_rate(rows, one)) > 3}
    tasks = list(dict.fromkeys(one.task for one in shown))
    if not tasks:
        return
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5 * len(tasks), 3.6), layout="constrained", squeeze=False
    )
    for panel, task in zip(axes.flat, tasks, strict=True):
        for one, at_rate in shown.items():
            if one.task != task:
                continue
            test, kept = ([got.mean(name) for got in at_rate.values()] for name in ("test", "kept"))
            (line,) = panel.plot(test, kept, "o-", color=COLORS[one.method], ms=3)
            line.set_label(TITLES[one.method])
        panel.set(title=TASKS[task].title, xlabel="accuracy, learned", ylabel="accuracy, kept")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


FIGURES: dict[str, Callable[[Table, Path], None]] = {
    "parameters.png": parameter_figure,
    "curves.png": curve_figure,
    "landscape.png": landscape_figure,
    "shots.png": shots_figure,
    "forgetting.png": forgetting_figure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    check_counts()
    check_rates(results())
    text = README.read_text()
    if options.check:
        if filled(text) != text:
            raise SystemExit(f"the tables of {README.name} are old: run report.py")
        return
    README.write_text(filled(text))
    rows = results()
    for name, draw in FIGURES.items():
        draw(rows, HERE / name)


if __name__ == "__main__":
    main()
