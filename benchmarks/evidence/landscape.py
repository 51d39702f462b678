"""How near RandLoRA and LoRA come to full fine-tuning (the paper's figure 4 and appendix A).

Each adapts the model at the rate that ``parameters.py`` chose. Then

- *CKA*, layer by layer: the linear centred kernel alignment of a layer's outputs, the mean of the
  tokens, with those of the fine-tuned model, over 500 inputs, of images those of the test; and the
  size of what changed in the layer's weight;
- *the plane* of weights through LoRA (0, 0), RandLoRA (1, 0) and fine-tuned (½, 1), in one seed:
  the training loss on 500 inputs.

    python benchmarks/evidence/landscape.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Iterator
from pathlib import Path

import methods
import numpy as np
import torch
import torch.nn.functional as F
from common import HERE, TASKS, Classifier, found, minilm_glosses, point, results, vision
from protocol import Run
from torch import Tensor, nn
from tqdm import tqdm

CKA, PLANE = HERE / "cka.csv", HERE / "plane.csv"
WAYS = ("full", "lora", "isometric")
SEEDS = {"digits": range(5), "fashion": range(5), "memory": range(1)}
COLUMNS = "task", "seed", "method", "rate", "layer", "cka", "spectral", "frobenius"
STEPS_X, STEPS_Y = 21, 17
Inputs = tuple[Tensor, ...]


def inputs(task: str, seed: int) -> tuple[nn.Module, Inputs, Tensor, Inputs]:
    """The model at the start, 500 inputs of the training with their labels, 500 of the test."""
    if task == "memory":
        glosses = minilm_glosses(seed, 1000, tokens=12)
        labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 45, 2000))[:500]
        torch.manual_seed(seed)
        model = Classifier()
        first, second = (glosses.batch(range(at, at + 500), "cpu")[:2] for at in (0, 500))
        return model, first, labels, second
    model, data, _ = vision(task == "fashion", seed, torch.device("cpu"))
    train, test = data["train"], data["test"]
    return model, (train.images[:500],), train.labels[:500], (test.images[:500],)


def effective(start: nn.Module, model: nn.Module) -> nn.Module:
    """The plain model with the weights that one adapted by LoRA, RandLoRA or itself has."""
    plain = copy.deepcopy(start)
    for name in methods.layers(plain):
        layer = model.get_submodule(name)
        weight = layer.weight
        if hasattr(layer, "get_delta_weight"):  # of PEFT
            weight = weight + layer.get_delta_weight("default")
        plain.get_submodule(name).weight.data.copy_(weight.detach())
    plain.head.load_state_dict(model.head.state_dict())
    return plain.requires_grad_(False)


@torch.no_grad()
def outputs(model: nn.Module, given: Inputs) -> dict[str, Tensor]:
    """Of each adapted layer the mean output over the tokens, ``(inputs, out)``."""
    kept: dict[str, Tensor] = {}
    mask = given[1] if len(given) > 1 else torch.ones(1)  # which tokens are no padding

    def mean(output: Tensor) -> Tensor:
        weights = mask.to(output.dtype).unsqueeze(-1).expand(*output.shape[:2], 1)
        return (output * weights).sum(1) / weights.sum(1)

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: kept.update({name: mean(output)})
        )
        for name in methods.layers(model)
    ]
    model(*given)
    for hook in hooks:
        hook.remove()
    return kept


def alignment(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of features (Kornblith et al., 2019), in float64."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    scale = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return (torch.linalg.matrix_norm(x.T @ y) ** 2 / scale).item()


def norms(start: nn.Module, model: nn.Module, name: str) -> tuple[float, float]:
    """The spectral and the Frobenius norm of what changed in a weight, of those of the weight."""
    before, after = (m.get_submodule(name).weight.double() for m in (start, model))
    orders = 2, "fro"
    return tuple(
        (torch.linalg.matrix_norm(after - before, o) / torch.linalg.matrix_norm(before, o)).item()
        for o in orders
    )


def plane(ways: dict[str, nn.Module], given: Inputs, labels: Tensor) -> Iterator[tuple]:
    """The loss over the plane, as rows x, y, loss."""
    states = {way: model.state_dict() for way, model in ways.items()}
    model = copy.deepcopy(ways["full"])
    for y in np.linspace(-0.3, 1.3, STEPS_Y):
        for x in np.linspace(-0.5, 1.5, STEPS_X):
            # LoRA (0, 0), RandLoRA (1, 0), full (½, 1): the shares sum to 1.
            shares = {"full": y, "isometric": x - y / 2, "lora": 1 - x - y / 2}
            mixed = {
                name: sum(float(share) * states[way][name] for way, share in shares.items())
                for name, value in states["full"].items()
                if value.is_floating_point()
            }
            model.load_state_dict(mixed, strict=False)
            with torch.no_grad():
                loss = F.cross_entropy(model(*given), labels).item()
            yield f"{x:.2f}", f"{y:.2f}", f"{loss:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="10 steps of one task, not kept")
    options = parser.parse_args()
    rows, wanted = results(), [(task, seed) for task in SEEDS for seed in SEEDS[task]]
    if options.quick:
        wanted = [("digits", 0)]
    done = set()
    if CKA.exists() and not options.quick:
        with CKA.open(newline="") as file:
            done = {
                (row["task"], int(row["seed"]), row["method"], row["rate"])
                for row in csv.DictReader(file)
            }
    for task, seed in tqdm(wanted, desc="seeds"):
        chosen = {way: found(rows, point(task, way)) for way in WAYS}
        rates = dict.fromkeys(WAYS, 1e-3)
        if not options.quick:
            if not all(chosen.values()):
                continue
            rates = {way: chosen[way].rate for way in WAYS}
            if {(task, seed, way, f"{rate:g}") for way, rate in rates.items()} <= done:
                continue
        start, first, labels, second = inputs(task, seed)
        ways = {}
        for way in WAYS:
            run = Run(task, way, point(task, way).size, rates[way], seed)
            steps = 10 if options.quick else TASKS[task].steps
            ways[way] = effective(start, TASKS[task].perform(run, torch.device("cpu"), steps).model)
        reference = outputs(ways["full"], second)
        aligned = [
            (
                *(task, seed, way, f"{rates.get(way, 0):g}", name),
                f"{alignment(output, reference[name]):.4f}",
                *(f"{size:.4f}" for size in norms(start, model, name)),
            )
            for way, model in {"start": start, **ways}.items()
            for name, output in outputs(model, second).items()
        ]
        points = list(plane(ways, first, labels)) if seed == 0 and not options.quick else []
        if options.quick:
            print(*aligned, sep="\n")
            break
        append(PLANE, ("task", "x", "y", "loss"), ((task, *one) for one in points))
        append(CKA, COLUMNS, aligned)  # at the end: it says what is done


def append(path: Path, names: tuple[str, ...], rows: object) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(names)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
