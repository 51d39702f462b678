"""How much of a matrix an update can hold, with no model and no training (theorem 4.1, equation 8).

For each target a fit of each form of the update, at the count of numbers of LoRA of some rank, or
the nearest that the form can have: the share of the target's energy that it reaches, ``1 - ‖W -
ΔW‖² / ‖W‖²``. LoRA's is the best there is (Eckart-Young). The others come from least squares in
turns, so the best reaches at least so much. Targets are made, as those of KRAdapter (arXiv
2508.00230), or are differences that full fine-tuning made, at the rate that was chosen for it.

    python benchmarks/evidence/fits.py [--quick]
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import methods
import torch
from common import HERE, TASKS, found, point, results
from protocol import Run
from torch import Tensor
from tqdm import tqdm

import randlora

FITS = HERE / "fits.csv"
COLUMNS = "target", "rate", "out", "in", "lora", "form", "size", "count", "share"
SIDE = 384
RANKS = (4, 16)  # of LoRA, whose count the forms share

# --- the best fits -------------------------------------------------------------------------------


def best_low_rank(target: Tensor, size: int) -> Tensor:
    """Eckart-Young: the first ``size`` singular triples."""
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    return (u[:, :size] * s[:size]) @ v[:size]


def in_turns(step: Callable[[], Tensor], target: Tensor) -> Tensor:
    """Repeat a step, which returns a better fit, until the share grows by less than 1e-4."""
    share = -math.inf
    while True:
        fit = step()
        before, share = share, 1 - ((target - fit).square().sum() / target.square().sum()).item()
        if share - before < 1e-4:
            return fit


def best_randlora(target: Tensor, size: int, basis: str) -> Tensor:
    """Λ and Γ in turns, each by least squares, for the bases of this package and a tall target."""
    q, p = target.shape
    n = -(-p // size)
    bank = randlora.BasisBank(basis)
    a, b = bank.a(size, p).double(), bank.b(q, n * size).double()
    lam = torch.ones(n, size, dtype=torch.float64)
    blocks, right, gram = b.view(q, n, size), b.T @ target, b.T @ b

    def step() -> Tensor:
        nonlocal lam
        # Γ: for each column of the target, n directions B_j Λ_j A[:, c].
        directions = torch.einsum("qnr,nr,rc->cqn", blocks, lam, a)
        gamma = torch.linalg.lstsq(directions, target.T[:, :, None]).solution[:, :, 0].T
        # Λ: n r directions b_jk (A[k] Γ[j]), from the normal equations.
        rows = (a[None] * gamma[:, None]).flatten(0, 1)
        normal, wanted = gram * (rows @ rows.T), (right * rows).sum(1)
        lam = torch.linalg.lstsq(normal, wanted[:, None], driver="gelsd").solution.view(n, size)
        return b @ (lam.flatten()[:, None] * rows)

    return in_turns(step, target)


def first_components(stack: Tensor) -> Tensor:
    """The best matrix of rank one for each matrix of a stack."""
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    return (u[..., :, :1] * s[..., :1, None]) @ v[..., :1, :]


def best_trained_a(target: Tensor, size: int) -> Tensor:
    """``Λ[j, k] A[k, c] Γ[j, c]`` in turns, for ``B`` with orthonormal columns."""
    q, p = target.shape
    n = -(-p // size)
    b = torch.linalg.qr(randlora.BasisBank("isometric").b(q, n * size).double())[0]
    c = (b.T @ target).view(n, size, p)
    start = first_components(c.permute(2, 0, 1))  # for Λ = 1
    gamma = start.norm(dim=2).T
    a = torch.einsum("cnr,nc->rc", start, gamma) / gamma.square().sum(0)
    lam = torch.ones(n, size, dtype=torch.float64)

    def step() -> Tensor:
        nonlocal a, gamma, lam
        given = a[None] * gamma[:, None]
        lam = (c * given).sum(2) / given.square().sum(2)
        given = lam[:, :, None] * gamma[:, None]
        a = (c * given).sum(0) / given.square().sum(0)
        given = lam[:, :, None] * a[None]
        gamma = (c * given).sum(1) / given.square().sum(1)
        return b @ (lam[:, :, None] * a[None] * gamma[:, None]).flatten(0, 1)

    return in_turns(step, target)


def best_kradapter(target: Tensor, size: int) -> Tensor:
    """A Kronecker product for each column: rank one as a matrix, whose last entries are free."""
    q, p = target.shape
    first, second = methods.KRAdapter.sides(q)
    columns = torch.zeros(p, first * second, dtype=target.dtype)

    def step() -> Tensor:
        columns[:, :q] = target.T
        fit = first_components(columns.view(p, first, second)).flatten(1)
        columns[:, q:] = fit[:, q:]
        return fit[:, :q].T

    return in_turns(step, target)


FORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "lora": best_low_rank,
    "isometric": partial(best_randlora, basis="isometric"),
    "dense": partial(best_randlora, basis="dense"),
    "trained A": best_trained_a,
    "kradapter": best_kradapter,
}


def sizes(form: str, shape: methods.Shape, rank: int) -> int:
    """The size with the count of LoRA; of a trained ``A``, among those that divide ``p``."""
    if form != "trained A":
        return methods.size_for(form, [shape], rank)
    wanted, p = methods.total("lora", [shape], rank), min(shape)
    divisors = (size for size in range(1, p + 1) if p % size == 0)
    return min(divisors, key=lambda r: abs(methods.METHODS[form].count(*shape, r) - wanted))


# --- the targets ---------------------------------------------------------------------------------


def made() -> Iterator[tuple[str, Tensor]]:
    """Matrices of 384 × 384 from numbers that are drawn with one seed."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, SIDE, SIDE, generator=generator, dtype=torch.float64)
    noise = draw()
    yield "Gaussian noise", noise
    yield "sparse noise, 90 % zeros", draw() * (torch.rand(SIDE, SIDE, generator=generator) < 0.1)
    u, s, v = torch.linalg.svd(draw())
    yield "low rank, 96", (u[:, :96] * s[:96]) @ v[:96]
    yield "whitened noise: an orthogonal matrix", torch.linalg.qr(draw())[0]
    time = torch.arange(SIDE, dtype=torch.float64) / SIDE
    frequencies = torch.linspace(1000, 10_000, SIDE, dtype=torch.float64)[:, None]
    phases = 2 * math.pi * torch.rand(SIDE, 1, generator=generator, dtype=torch.float64)
    yield "high frequencies", torch.sin(2 * math.pi * frequencies * time + phases)


REAL = {  # parts of names of layers, one of which stands for each kind
    "fashion": ("blocks.1.attn.proj", "blocks.1.mlp.0"),
    "glosses": ("layer.3.attention.output.dense", "layer.3.intermediate.dense"),
    "memory": ("layer.3.attention.output.dense", "layer.3.intermediate.dense"),
}


def differences(task: str, rate: float) -> Iterator[tuple[str, Tensor]]:
    """What full fine-tuning changed, in one seed."""
    run = Run(task, "full", 0, rate, seed=0)
    cpu = torch.device("cpu")
    start = TASKS[task].perform(replace(run, rate=0.0), cpu, 1).model
    after = TASKS[task].perform(run, cpu, TASKS[task].steps).model
    for part in REAL[task]:
        (name,) = (name for name in methods.layers(start) if name.endswith(part))
        weights = (m.get_submodule(name).weight.detach().double() for m in (after, start))
        yield f"{TASKS[task].title}: {part}", next(weights) - next(weights)


# --- the rows ------------------------------------------------------------------------------------


def rows_of(
    name: str, target: Tensor, ranks: tuple[int, ...], rate: str = ""
) -> Iterator[dict[str, object]]:
    """The shares that the forms reach of a target, at each count; the rate at which it was made."""
    tall = target if target.shape[0] >= target.shape[1] else target.T
    shape = tuple(tall.shape)
    for rank in ranks:
        for form, fit in FORMS.items():
            size = sizes(form, shape, rank)
            count = methods.METHODS[form].count(*shape, size)
            if form == "kradapter" and rank != 16:
                continue  # it has one count
            error = (tall - fit(tall, size)).square().sum() / tall.square().sum()
            yield dict(
                zip(
                    COLUMNS,
                    (name, rate, *target.shape, rank, form, size, count, f"{1 - error.item():.4f}"),
                    strict=True,
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--csv", type=Path, default=FITS)
    parser.add_argument("--quick", action="store_true", help="one target and count, not kept")
    options = parser.parse_args()
    if options.quick:
        for row in rows_of(*next(made()), ranks=(16,)):
            print(row)
        return
    done = set()
    if options.csv.exists():
        with options.csv.open(newline="") as file:
            done = {(row["target"], row["rate"]) for row in csv.DictReader(file)}
    rows = results()
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not options.csv.stat().st_size:
            writer.writeheader()

        def add(name: str, target: Tensor, rate: str = "") -> None:
            if (name, rate) not in done:
                writer.writerows(rows_of(name, target, RANKS, rate))
                file.flush()

        for name, target in made():
            add(name, target)
        for task in tqdm(REAL, desc="tasks"):
            if chosen := found(rows, point(task, "full")):
                rate = f"{chosen.rate:g}"
                names = {(f"{TASKS[task].title}: {part}", rate) for part in REAL[task]}
                if not names <= done:
                    for name, target in differences(task, chosen.rate):
                        add(name, target, rate)


if __name__ == "__main__":
    main()
