"""What the questions of this folder share: the tasks, and their command line.

Tasks. A pre-trained model is adapted by AdamW, with a rate that rises for 30 % of the steps:

    digits    a vision transformer (0.4 M parameters), pre-trained on digits, adapts to permuted
              pixels: accuracy. *Kept*: its accuracy on the pixels in order
    fashion   the same with images of clothes
    glosses   MiniLM (22 M) sorts glosses of WordNet into 45 lexicographer files: accuracy. Kept:
              how often, of 500, the embedding of a synset's words is nearest to that of its gloss
    memory    MiniLM learns random labels of 2,000 glosses by a frozen random head: the share that
              it knows at the end. Kept as above
    recall    the upper third of SmolLM2 (135 M) learns random values of random keys (MoRA, arXiv
              2405.12130, section 4): the share of their tokens that it knows at the end. Kept:
              minus its loss on 200 examples of WordNet
    language  the same model learns the language of glosses: minus the loss. Kept as above
    words     the same model answers a gloss with a word of its synset: the share of exact answers.
              Kept as above
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import methods
import numpy as np
import protocol
import torch
import torch.nn.functional as F
from protocol import RATES, Found, Run, Table, interval
from torch import Tensor, nn
from training import train

# isort: split
import finetune  # from the folder above, which protocol puts on the path
from runs import crossed, perform_all, read
from tasks import (
    Classifier,
    Glosses,
    Synset,
    in_turn,
    language_model,
    minilm_glosses,
    minilm_tokens,
    read_synsets,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"


class Outcome(NamedTuple):
    """What a run gave. The curve is the accuracy on each batch, before its step."""

    model: nn.Module
    validation: float
    test: float
    kept: float
    seconds: float  # of a step, the median
    curve: Sequence[Tensor] = ()


def few(labels: Tensor, shots: str, seed: int) -> Tensor:
    """The places of the first ``shots`` of each class, or of a share, in random order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    if not shots:
        return order
    if shots.endswith("%"):
        return order[: len(order) * int(shots[:-1]) // 100]
    taken = [order[labels[order] == label][: int(shots)] for label in labels.unique()]
    return torch.cat(taken)


# --- images --------------------------------------------------------------------------------------

FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


@lru_cache(maxsize=12)
def vision(
    fashion: bool, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, finetune.Split], finetune.Split]:
    """A transformer of two blocks, trained on images; the same permuted; the test images."""
    data = {
        name: finetune.Split(split.images.to(device), split.labels.to(device))
        for name, split in finetune.load(seed, FASHION if fashion else None).items()
    }
    torch.manual_seed(seed)
    model = finetune.VisionTransformer(128, depth=2).to(device)
    train(model, image_losses(model, data["train"], 400, seed), 400, 1.5e-3)
    return model, {n: finetune.permuted(split, seed) for n, split in data.items()}, data["test"]


def image_losses(
    model: nn.Module, split: finetune.Split, steps: int, seed: int
) -> Iterator[Tensor]:
    batches = in_turn(len(split.labels), min(32, len(split.labels)), seed)
    for places in itertools.islice(batches, steps):
        yield F.cross_entropy(model(split.images[places]), split.labels[places])


def images(run: Run, device: torch.device, steps: int, fashion: bool) -> Outcome:
    """The tasks digits and fashion, in batches of 32."""
    start, data, kept = vision(fashion, run.seed, device)
    model = copy.deepcopy(start)
    methods.adapt(model, run.method, run.size, run.seed)
    model.head.requires_grad_(True)
    places = few(data["train"].labels, run.shots, run.seed)
    split = finetune.Split(data["train"].images[places], data["train"].labels[places])
    losses = image_losses(model, split, steps, run.seed)
    seconds = train(model, losses, steps, run.rate, run.head)
    scores = (finetune.accuracy(model, data[name]) for name in ("validation", "test"))
    return Outcome(model, *scores, finetune.accuracy(model, kept), seconds)


# --- MiniLM --------------------------------------------------------------------------------------


def classified(model: nn.Module, glosses: Glosses, places: Sequence[int]) -> float:
    """The share of these glosses that the model sorts right."""
    device, right = model.head.weight.device, 0
    with torch.inference_mode():
        for at in range(0, len(places), 100):
            *inputs, labels = glosses.batch(places[at : at + 100], device)
            right += int((model(*inputs).argmax(1) == labels).sum())
    return right / len(places)


@lru_cache(maxsize=1)
def synsets() -> tuple[Glosses, Glosses]:
    """Of 500 synsets the glosses and the words, as tokens."""
    found = read_synsets(seed=1)[:500]
    texts = [synset.gloss for synset in found], [named(synset) for synset in found]
    glosses, words = (Glosses(minilm_tokens(one), torch.zeros(500)) for one in texts)
    return glosses, words


def named(synset: Synset) -> str:
    return ", ".join(word.replace("_", " ") for word in synset.words)


def retrieved(model: nn.Module) -> float:
    """How often a synset's words lie nearest to its own gloss: what MiniLM was made for."""
    found = []
    with torch.inference_mode():
        for texts in synsets():
            tokens, mask, _ = texts.batch(range(500), model.head.weight.device)
            found.append(F.normalize(model.embed(tokens, mask), dim=1))
    nearest = (found[1] @ found[0].T).argmax(1)
    return (nearest == torch.arange(500, device=nearest.device)).double().mean().item()


def sort(run: Run, device: torch.device, steps: int) -> Outcome:
    """The task glosses, in batches of 32."""
    tested, trained = 3000, 32 * steps
    glosses = minilm_glosses(run.seed, tested + trained, tokens=16)
    torch.manual_seed(run.seed)
    model = Classifier()
    methods.adapt(model, run.method, run.size, run.seed)
    model.to(device).head.requires_grad_(True)
    places = (tested + few(glosses.labels[tested:], run.shots, run.seed)).tolist()

    def losses() -> Iterator[Tensor]:
        for at in itertools.islice(in_turn(len(places), 32, run.seed), steps):
            *inputs, labels = glosses.batch([places[place] for place in at], device)
            yield F.cross_entropy(model(*inputs), labels)

    seconds = train(model, losses(), steps, run.rate, run.head)
    parts = range(1000), range(1000, tested)
    scores = (classified(model, glosses, part) for part in parts)
    return Outcome(model, *scores, retrieved(model), seconds)


def memorise(run: Run, device: torch.device, steps: int, count: int) -> Outcome:
    """The task memory, in batches of 32."""
    glosses = minilm_glosses(run.seed, count, tokens=12)
    labels = np.random.default_rng(run.seed).integers(0, 45, count)
    glosses = replace(glosses, labels=torch.from_numpy(labels))
    torch.manual_seed(run.seed)
    model = Classifier()
    methods.adapt(model, run.method, run.size, run.seed)
    model.to(device)
    curve = []

    def losses() -> Iterator[Tensor]:
        for at in itertools.islice(in_turn(count, 32, run.seed), steps):
            *inputs, labels = glosses.batch(at, device)
            logits = model(*inputs)
            curve.append((logits.argmax(1) == labels).double().mean())
            yield F.cross_entropy(logits, labels)

    seconds = train(model, losses(), steps, run.rate)
    score = classified(model, glosses, range(count))
    return Outcome(model, score, score, retrieved(model), seconds, curve)


# --- SmolLM2 -------------------------------------------------------------------------------------

LOWER = 20  # layers that are frozen, of 30
EXAMPLES = 200


@lru_cache(maxsize=1)
def frozen(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """What no method adapts: SmolLM2 below ``LOWER``, without the norm at its end; and its head."""
    whole = copy.deepcopy(language_model()[0]).requires_grad_(False).to(device)
    whole.model.layers = whole.model.layers[:LOWER]
    whole.config.num_hidden_layers = LOWER
    whole.model.norm = nn.Identity()
    return whole.model, copy.deepcopy(whole.lm_head).bfloat16()  # as autocast would, each time


@lru_cache(maxsize=1024)  # batches: the runs of a seed share theirs
def below(tokens: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The states that enter ``Upper``."""
    # Training cannot use what inference mode made.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16),
    ):
        ids = torch.tensor(tokens, device=device)
        return frozen(device)[0](input_ids=ids, use_cache=False).last_hidden_state


class Upper(nn.Module):
    """The layers of SmolLM2 from ``LOWER`` on."""

    def __init__(self) -> None:
        super().__init__()
        whole, self.tokenizer = language_model()
        upper = copy.copy(whole.model)
        upper._modules = dict(whole.model._modules)
        upper.layers = copy.deepcopy(whole.model.layers[LOWER:])
        upper.embed_tokens = None
        self.layers = upper
        self.layers.config = copy.deepcopy(whole.config)
        self.layers.config.num_hidden_layers = len(upper.layers)

    def forward(self, hidden: Tensor, asked: Tensor) -> Tensor:
        """The last states at the places where the mask ``asked`` is true."""
        return self.layers(inputs_embeds=hidden, use_cache=False).last_hidden_state[asked]


def logits_of(model: Upper, tokens: Tensor, asked: Tensor) -> Tensor:
    """In half precision, each for the token after a place that is asked."""
    hidden = below(tuple(map(tuple, tokens.tolist())), tokens.device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return frozen(tokens.device)[1](model(hidden, asked)).float()


@dataclass(frozen=True)
class Prompted:
    """Texts of which an end is learned: tokens, and where it begins."""

    rows: list[list[int]]
    starts: list[int]

    def batch(self, places: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, which of them are asked for their next token, and those next tokens."""
        rows = [torch.tensor(self.rows[place]) for place in places]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        place = torch.arange(1, tokens.shape[1])
        starts = torch.tensor([self.starts[at] for at in places])[:, None]
        ends = torch.tensor([len(row) for row in rows])[:, None]
        asked = F.pad((place >= starts) & (place < ends), (0, 1))
        wanted = tokens.roll(-1, 1)[asked]
        return tokens.to(device), asked.to(device), wanted.to(device)


def prompted(tokenizer: Any, texts: Iterable[tuple[str, str]], most: int = 32) -> Prompted:
    """Of pairs (prompt, answer); a long prompt loses its beginning."""
    rows, starts = [], []
    for prompt, answer in texts:
        end = tokenizer(answer)["input_ids"]
        begin = tokenizer(prompt)["input_ids"][len(end) - most :] if prompt else []
        rows.append([*begin, *end])
        starts.append(max(1, len(begin)))
    return Prompted(rows, starts)


def hexadecimal(seed: int, count: int) -> list[tuple[str, str]]:
    """Random keys of 8 and values of 16 digits."""
    digits = np.random.default_rng(seed).integers(0, 16, (count, 24))
    texts = ["".join(map("{:x}".format, row)) for row in digits]
    return [(f"{text[:8]}:", f" {text[8:]}\n") for text in texts]


def definitions(seed: int, count: int) -> list[tuple[str, str]]:
    return [("", f"{synset.gloss}.\n") for synset in read_synsets(seed)[:count]]


def answers(seed: int, count: int) -> list[tuple[str, str]]:
    """A gloss, and the first word of its synset, if it is one word."""
    found = ((s.gloss, s.words[0]) for s in read_synsets(seed) if "_" not in s.words[0])
    chosen = itertools.islice(found, count)
    return [(f"{gloss}\nThe word is:", f" {word}\n") for gloss, word in chosen]


def sentences(seed: int, count: int) -> list[tuple[str, str]]:
    found = (s.example for s in read_synsets(seed) if len(s.example) > 20)
    return [("", f"{example}.\n") for example in itertools.islice(found, count)]


class Scores(NamedTuple):
    loss: float
    tokens: float  # the share of the tokens that are right, given those before
    exact: float  # the share of the answers that greedy decoding would give


def answered(model: Upper, texts: Prompted, places: Sequence[int], device: torch.device) -> Scores:
    losses, rights, exact = [], [], 0
    with torch.inference_mode():
        for at in range(0, len(places), 50):
            tokens, asked, wanted = texts.batch(places[at : at + 50], device)
            logits = logits_of(model, tokens, asked)
            right = logits.argmax(-1) == wanted
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            rights.append(right)
            wrong = torch.zeros_like(asked)
            wrong[asked] = ~right
            exact += int((~wrong.any(1)).sum())
    return Scores(
        torch.cat(losses).mean().item(),
        torch.cat(rights).double().mean().item(),
        exact / len(places),
    )


def speak(
    run: Run,
    device: torch.device,
    steps: int,
    batch: int,
    texts: Callable[[int, int], list[tuple[str, str]]],
    score: Callable[[Scores], float],
    pairs: int = 0,
) -> Outcome:
    """The tasks recall (with ``pairs``), language and words."""
    model = Upper()
    tested = 0 if pairs else 600
    data = prompted(model.tokenizer, texts(run.seed, pairs or tested + batch * steps))
    methods.adapt(model, run.method, run.size, run.seed)
    model.to(device)
    curve = []
    turns = in_turn(len(data.rows) - tested, batch, run.seed)

    def losses() -> Iterator[Tensor]:
        for at in itertools.islice(turns, steps):
            tokens, asked, wanted = data.batch([tested + place for place in at], device)
            logits = logits_of(model, tokens, asked)
            curve.append((logits.argmax(-1) == wanted).double().mean())
            yield F.cross_entropy(logits, wanted)

    seconds = train(model, losses(), steps, run.rate)
    first = score(answered(model, data, range(pairs or 200), device))
    if run.seed in protocol.PILOTS:  # what chooses a rate: the rest of the scores takes long
        return Outcome(model, first, math.nan, math.nan, seconds, curve)
    test = first if pairs else score(answered(model, data, range(200, tested), device))
    other = prompted(model.tokenizer, sentences(1, EXAMPLES))
    kept = -answered(model, other, range(EXAMPLES), device).loss
    return Outcome(model, first, test, kept, seconds, curve)


# --- the tasks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task: how it is run, for how many steps, which seeds are reported."""

    title: str
    perform: Callable[[Run, torch.device, int], Outcome]
    steps: int
    seeds: Sequence[int]
    shapes: Sequence[methods.Shape]  # of the layers that are adapted
    rank: int  # of the LoRA whose count the methods share
    floor: float = -math.inf  # the score of what has learned nothing


# Not seed 1: it draws the texts by which *kept* is measured.
five, three = (0, 2, 3, 4, 5), (0, 2, 3)
TRANSFORMER = [(128, 49), *2 * [(384, 128), (128, 128), (256, 128), (128, 256)]]
MINILM = 6 * [*4 * [(384, 384)], (1536, 384), (384, 1536)]
UPPER = (30 - LOWER) * [*2 * [(576, 576), (192, 576)], *2 * [(1536, 576)], (576, 1536)]
upper = partial(speak, batch=16)
recall = partial(upper, texts=hexadecimal, score=lambda found: found.tokens, pairs=128)
language = partial(upper, texts=definitions, score=lambda found: -found.loss)
words = partial(upper, texts=answers, score=lambda found: found.exact)
memory = partial(memorise, count=2000)
TASKS = {
    "digits": Task("digits", partial(images, fashion=False), 450, range(5), TRANSFORMER, 9, 0.2),
    "fashion": Task("clothes", partial(images, fashion=True), 450, range(5), TRANSFORMER, 9, 0.2),
    "glosses": Task("glosses", sort, 150, five, MINILM, 16, 0.15),
    "memory": Task("random labels", memory, 240, five, MINILM, 16, 0.06),
    "recall": Task("keys and values", recall, 160, three, UPPER, 16, 0.2),
    "language": Task("language", language, 60, three, UPPER, 16),
    "words": Task("words", words, 60, three, UPPER, 16),
}


def point(task: str, method: str, rank: int = 0, **fields: Any) -> Run:
    """A method on a task, as large as LoRA of this rank, or of the task's own; without a rate."""
    size = methods.size_for(method, TASKS[task].shapes, rank or TASKS[task].rank)
    return Run(task, method, size, 0.0, **fields)


def every(tasks: Iterable[str], names: Iterable[str]) -> list[Run]:
    """All these methods on all these tasks, at the counts of the tasks."""
    return [point(task, name) for task, name in itertools.product(tasks, names)]


def before(task: str) -> list[Run]:
    """The model before it is adapted: one step at rate 0, on the seeds that are reported."""
    return [Run(task, "full", 0, 0.0, seed, steps=1) for seed in TASKS[task].seeds]


# --- running -------------------------------------------------------------------------------------

MEASURED = "trained", "validation", "test", "kept", "seconds", "curve", "device"
POINTS = 40  # of a curve


def results() -> Table:
    """The rows that the repository has."""
    return read(RESULTS, Run)


def perform(run: Run, device: torch.device) -> dict[str, Any]:
    """What was measured in a run."""
    task, start = TASKS[run.task], time.perf_counter()
    model, validation, test, kept, _, curve = task.perform(run, device, run.steps or task.steps)
    seconds = time.perf_counter() - start
    known = torch.stack(curve).tolist() if curve else []
    parts = np.array_split(np.array(known), POINTS) if curve else []
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation": f"{validation:.4f}",
        "test": f"{test:.4f}",
        "kept": f"{kept:.4f}",
        "seconds": f"{seconds:.1f}",
        "curve": " ".join(f"{part.mean():.3f}" for part in parts if len(part)),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor: they round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*: (.+)$", known, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def answer(
    points: Iterable[Run],
    doc: str | None,
    rates: Sequence[float] = (),
    beside: Callable[[Table], Iterable[Run]] = lambda rows: (),
) -> None:
    """The command line of a question: run what the results lack, for all points.

    With ``rates`` none is chosen: all of them are run on the seeds that are reported. ``beside``
    gives, from the results, runs to make beside the points.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these, see methods.py")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick", action="store_true", help="a minute: 10 steps, two points, not kept"
    )
    options = parser.parse_args()
    chosen = options.methods or methods.METHODS

    def asked(ones: Iterable[Run]) -> list[Run]:
        return [one for one in ones if one.task in options.tasks and one.method in chosen]

    points = asked(points)
    if not points:
        parser.error("no point of this question has such a task and method")
    settings: dict[str, Any] = {}
    if options.quick:
        settings = {"rates": RATES[1:3], "thorough": False}
        task = min((one.task for one in points), key=list(TASKS).index)  # images cost least
        points = [replace(one, steps=10) for one in points if one.task == task][:2]
        options.csv = Path(tempfile.mkdtemp()) / "quick.csv"

    def lacking(rows: Table) -> Iterator[Run]:
        yield from () if options.quick else asked(beside(rows))
        for one in points:
            seeds = TASKS[one.task].seeds[: 1 if options.quick else None]
            if rates:
                yield from crossed(one, rate=rates[:2] if options.quick else rates, seed=seeds)
                continue
            missing, rate = protocol.choose(rows, one, floor_of(one), **settings)
            yield from missing or crossed(replace(one, rate=rate), seed=seeds)

    rows = perform_all(lacking, Run, perform, MEASURED, options.csv, options.jobs, options.device)
    if options.quick:
        print(*(f"{run}: {row['test']}" for run, row in rows.items()), sep="\n")
    elif not rates:
        print(table(rows, points))


def floor_of(one: Run) -> float:
    """With few examples little is learned at any rate."""
    return -math.inf if one.shots else TASKS[one.task].floor


def found(rows: Table, one: Run) -> Found | None:
    """What a point gave, or None if runs are missing."""
    return protocol.found(rows, one, TASKS[one.task].seeds, floor_of(one))


def table(rows: Table, points: Iterable[Run]) -> str:
    """A line for each point: its count, rate, score with a 95 % interval, and what it kept."""
    lines = ["| task | method | trained | rate | test | kept |", "|---|---|---|---|---|---|"]
    for one in points:
        if got := found(rows, one):
            mean, half = interval(list(got.values().values()))
            trained = int(next(iter(got.rows.values()))["trained"])
            lines.append(
                f"| {TASKS[one.task].title} | {methods.METHODS[one.method].title} | {trained:,} "
                f"| {got.rate:g} | {mean:.3f} ± {half:.3f} | {got.mean('kept'):.3f} |"
            )
    return "\n".join(lines)
