"""Training in several processes: memory, communication and scaling under DDP and FSDP2.

Each method trains a stack of `step.py` in two processes, connected by gloo on this machine. Bytes
are those that one process sends in one step if the collectives are rings, which is the least that
any algorithm needs. Peak memory is that of a process beyond its imports. Scaling is the time of a
step in one process of one thread, divided by that of two such processes with a batch each.

    python benchmarks/distributed.py [--case NAME] [--methods NAME ...] [--engines NAME ...]
                                     [--rounds N]
    torchrun --nproc-per-node 2 benchmarks/distributed.py --methods isometric --engines fsdp

The first starts a `torchrun` for each method and engine. With `--models` nothing is run: the same
counts, checked against the measured ones by each run, give the memory and communication of Llama 3
8B and 70B on 8 and 64 GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import CASES, FRUGAL, METHODS, Case, resident
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import randlora
from randlora.modules.weight_update import Settings, WeightSpec

NAMES = "full fine-tuning", "PEFT LoRA", "isometric", "dense"
ENGINES = "ddp", "fsdp"

# --- one process among several -------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends, by collective, if each is a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        n, name = dist.get_world_size(), func.name()
        passed = (n - 1) / n
        if name == "c10d::_allgather_base_":
            self.sent["all-gather"] += passed * args[0].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.sent["reduce-scatter"] += passed * args[1].nbytes
        elif name == "c10d::allreduce_":
            self.sent["all-reduce"] += 2 * passed * sum(t.nbytes for t in args[0])
        elif name.startswith("c10d::"):
            raise SystemExit(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


def wrapped(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model)
    blocks = model.base_model.model if hasattr(model, "base_model") else model  # PEFT's is wrapped
    for block in blocks:
        fully_shard(block)
    return fully_shard(model)


class Run:
    """A model in training."""

    def __init__(self, method: str, case: Case, engine: str | None) -> None:
        self.model = METHODS[method](case.model(), case).train()
        if engine is not None:
            self.model = wrapped(self.model, engine)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser, self.x = torch.optim.AdamW(trained, lr=1e-4), case.input()

    def step(self) -> float:
        start = time.perf_counter()
        self.optimiser.zero_grad()
        self.model(self.x).float().square().mean().backward()
        self.optimiser.step()
        return time.perf_counter() - start


def measure(method: str, engine: str, case: Case, rounds: int) -> dict[str, Any]:
    """Memory, bytes sent and seconds; the same in every process."""
    import peft  # noqa: F401  (so that all methods start from the same)

    before = resident("VmRSS")
    run = Run(method, case, engine)
    run.step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    run.step()
    run.step()
    peak = torch.tensor(resident("VmHWM") - before)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    with Sent() as counter:
        run.step()
    alone = Run(method, case, None) if dist.get_rank() == 0 else None
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(rounds + 1):
        dist.barrier()
        if alone is not None:
            seconds["alone"].append(alone.step())
        dist.barrier()
        seconds["together"].append(run.step())
    sizes = [(p.numel(), p.requires_grad) for p in METHODS[method](case.model(), case).parameters()]
    return {
        "method": method,
        "engine": engine,
        "peak": int(peak),
        "sent": counter.sent,
        "scaling": scaling(seconds) if alone is not None else math.nan,
        "frozen": sum(n for n, trained in sizes if not trained),
        "trained": sum(n for n, trained in sizes if trained),
    }


def scaling(seconds: dict[str, list[float]]) -> float:
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return median["alone"] / median["together"]


# --- the counts ----------------------------------------------------------------------------------


def bytes_sent(
    engine: str, frozen: int, trained: int, n: int, item: int, own: int, once: int = 0
) -> dict[str, float]:
    """Bytes that a process sends in a step: ``item`` for a frozen number, ``own`` for a trained.

    DDP averages gradients. FSDP gathers all parameters twice, for forward and for backward, and
    scatters the gradients. The ``once`` numbers that the root has by itself stay gathered.
    """
    passed = (n - 1) / n
    if engine == "ddp":
        return {"all-gather": 0, "reduce-scatter": 0, "all-reduce": 2 * passed * own * trained}
    gathered = passed * (2 * (item * frozen + own * trained) - item * once)
    return {"all-gather": gathered, "reduce-scatter": passed * own * trained, "all-reduce": 0}


def check(row: dict[str, Any], case: Case) -> None:
    """Compare measured with counted bytes: equal, but for the padding of uneven shares."""
    item, n = case.dtype.itemsize, dist.get_world_size()
    own = item if row["method"] == "full fine-tuning" else 4
    want = bytes_sent(row["engine"], row["frozen"], row["trained"], n, item, own)
    for name, value in row["sent"].items():
        if not want[name] <= value <= 1.001 * want[name]:
            raise SystemExit(f"{name}: counted {want[name]:,.0f} bytes, sent {value:,.0f}")


# --- large models --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama 3 (arXiv 2407.21783, table 3); keys and values have 8 heads of 128."""

    name: str
    d: int
    hidden: int
    layers: int

    vocabulary: int = 128256

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The linear layers of a block, ``(out, in)``."""
        d, hidden = self.d, self.hidden
        return [(d, d), (1024, d), (1024, d), (d, d), (hidden, d), (hidden, d), (d, hidden)]

    @property
    def block(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes) + 2 * self.d

    @property
    def root(self) -> int:
        """What is in no block: the embedding, the head and the last norm."""
        return 2 * self.vocabulary * self.d + self.d

    @property
    def total(self) -> int:
        return self.layers * self.block + self.root


MODELS = Llama("Llama 3 8B", 4096, 14336, 32), Llama("Llama 3 70B", 8192, 28672, 80)
# Bytes that a GPU sends in a second: NVLink of an H100 within a node of 8, else 400 Gbit/s.
RATES = {8: 450e9, 64: 50e9}
RANK = 32


def updates(model: Llama) -> tuple[int, dict[str, int]]:
    """Trained numbers of a block at rank 32, and the bytes of the bases in bfloat16."""
    banks = {kind: randlora.BasisBank(kind) for kind in ("isometric", "dense")}
    specs = [WeightSpec("weight", *shape) for shape in model.shapes]
    settings = [Settings.of(spec, banks["isometric"], rank=RANK) for spec in specs]
    trained = sum(s.num_bases * (s.rank + spec.p) for s, spec in zip(settings, specs, strict=True))
    sizes = [s.sizes(spec) for s, spec in zip(settings, specs, strict=True)]
    store = banks["isometric"].store(torch.device("cpu"), torch.bfloat16)
    for one in sizes:
        store.operands(*one)
    # The dense bases of all layers are blocks of one A and one B.
    dense = 2 * (RANK * max(p for _, p, _, _ in sizes))
    dense += 2 * max(q for *_, q, _ in sizes) * max(m for *_, m in sizes)
    return trained, {"isometric": store.nbytes, "dense": dense}


def large(model: Llama, n: int) -> list[tuple[str, ...]]:
    """Rows of the table of large models: memory of a GPU, bytes that it sends, and how long."""
    block, bases = updates(model)
    trained = model.layers * block
    rows = []
    for method, base in (("full fine-tuning", 0), ("LoRA", 0), *bases.items()):
        full = method == "full fine-tuning"
        frozen, own = (0, model.total) if full else (model.total, trained)
        item = 2 if full else 4  # bytes of a gradient that is sent
        # Parameters in bfloat16. What is trained has a float32 value, gradient and two moments;
        # of a full model the gradient is in bfloat16.
        state = (2 + 2 + 12) * own if full else 16 * own
        for engine in ENGINES:
            held = 2 * frozen + state + base
            if engine == "fsdp":
                # The root, a block, and the next one, which is gathered meanwhile.
                gathered = 2 * model.root + 2 * (2 * model.block + (0 if full else 4 * block))
                held = (2 * frozen + state) / n + gathered + base
            sent = sum(bytes_sent(engine, frozen, own, n, 2, item, model.root).values())
            rows.append(
                (
                    method,
                    engine,
                    f"{own / 1e6:,.0f}",
                    f"{held / 2**30:,.1f}",
                    f"{sent / 2**30:,.2f}",
                    f"{1e3 * sent / RATES[n]:,.1f}",
                )
            )
    return rows


def print_models() -> None:
    for model in MODELS:
        for n in RATES:
            print(f"\n{model.name}, {n} GPUs, rank {RANK}, LoRA with as many numbers\n")
            print("| method | engine | trained, millions | GiB a GPU | GiB sent | ms |")
            print("|---|---|---|---|---|---|")
            for row in large(model, n):
                print("| " + " | ".join(row) + " |")


# --- the command ---------------------------------------------------------------------------------


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    case = CASES[args.case]
    for engine in args.engines:
        for method in args.methods:
            row = measure(method, engine, case, args.rounds)
            check(row, case)
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
    dist.destroy_process_group()


def launch(args: argparse.Namespace, method: str, engine: str) -> dict[str, Any]:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    options = ["--case", args.case, "--rounds", str(args.rounds)]
    done = subprocess.run(
        [sys.executable, *run, *options, "--methods", method, "--engines", engine],
        env={**os.environ, **FRUGAL, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=CASES, default="vit-400-fp32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=NAMES)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", action="store_true", help="calculate large models only")
    args = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        worker(args)
        return
    if not args.models:
        runs = [(method, engine) for engine in args.engines for method in args.methods]
        rows = [launch(args, *run) for run in tqdm(runs, leave=False)]
        print(
            "| method | engine | trained | peak, MiB | gathered | scattered | reduced | scaling |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for row in rows:
            sent = " | ".join(f"{value / 2**20:,.2f}" for value in row["sent"].values())
            print(
                f"| {row['method']} | {row['engine']} | {row['trained']:,} "
                f"| {row['peak'] / 2**20:,.0f} | {sent} | {row['scaling']:.2f} |"
            )
    print_models()


if __name__ == "__main__":
    main()
