"""Time and memory of a training step, side by side: this package, PEFT and full fine-tuning.

All methods train the same stack in one process, in turn, after a warm-up; what counts are ratios of
medians. Each layer is first compared with the oracle in float64. Peak memory is taken in a process
of its own for each method. On a GPU the times are those between CUDA events, and the peak is that
of torch's allocator.

    python benchmarks/step.py [--cases NAME ...] [--methods NAME ...] [--rounds N] [--no-memory]
                              [--compile] [--curves [NAME ...]] [--out FOLDER] [--device D]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import randlora
from randlora import Choice, reference
from randlora.core import matmul
from randlora.core.planning import cost
from randlora.functional import work_of

# --- what is trained -----------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention, its projections fused or apart."""

    def __init__(self, d: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        names = ["qkv"] if fused else ["q", "k", "v"]
        self.inputs = nn.ModuleList(nn.Linear(d, 3 * d // len(names), bias=fused) for _ in names)
        self.proj = nn.Linear(d, d, bias=fused)

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.cat([layer(x) for layer in self.inputs], -1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """A perceptron, or a gated one."""

    def __init__(self, d: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d, hidden, bias=False) if gated else None
        self.up = nn.Linear(d, hidden, bias=not gated)
        self.down = nn.Linear(hidden, d, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Block(nn.Module):
    """A transformer block: a ViT's, or a Llama's."""

    def __init__(self, d: int, heads: int, hidden: int, llama: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.norm1, self.norm2 = norm(d), norm(d)
        self.attn = Attention(d, heads, fused=not llama)
        self.mlp = Mlp(d, hidden, gated=llama)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class Case:
    """A stack of blocks, its input and the ranks compared."""

    d: int
    heads: int
    hidden: int
    depth: int
    batch: int
    length: int
    rank: int
    llama: bool = False
    dtype: torch.dtype = torch.float32
    layer: bool = False  # one square layer in place of the stack

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        if self.layer:
            return nn.Sequential(nn.Linear(self.d, self.d, dtype=self.dtype))
        blocks = (Block(self.d, self.heads, self.hidden, self.llama) for _ in range(self.depth))
        return nn.Sequential(*blocks).to(self.dtype)

    def input(self) -> Tensor:
        torch.manual_seed(1)
        return torch.randn(self.batch, self.length, self.d).to(self.dtype)


VIT = {"d": 768, "heads": 12, "hidden": 3072, "depth": 4, "length": 50, "rank": 6}
LLAMA = {"d": 2048, "heads": 16, "hidden": 5632, "depth": 1, "length": 512, "rank": 16}
BF16 = torch.bfloat16
CASES = {
    "vit-3200-fp32": Case(**VIT, batch=64),
    "vit-3200-bf16": Case(**VIT, batch=64, dtype=BF16),
    "vit-400-fp32": Case(**VIT, batch=8),
    "vit-400-bf16": Case(**VIT, batch=8, dtype=BF16),
    "llama-2048-fp32": Case(**LLAMA, batch=4, llama=True),
    "llama-2048-bf16": Case(**LLAMA, batch=4, llama=True, dtype=BF16),
}
# The width of Llama 3 8B, and of ViT-L.
GPU_CASES = {
    "llama-8192-bf16": Case(4096, 32, 14336, 1, 4, 2048, rank=32, llama=True, dtype=BF16),
    "llama-2048-wide-bf16": Case(4096, 32, 14336, 1, 1, 2048, rank=32, llama=True, dtype=BF16),
    "vit-l-8192-bf16": Case(1024, 16, 4096, 4, 32, 256, rank=16, dtype=BF16),
}
DEVICE = torch.device("cpu")  # set by --device


# Whether the update's products go to oneDNN on this machine.
USE_ONEDNN = matmul.uses_onednn(torch.float32, torch.device("cpu"))
Prepare: TypeAlias = Callable[[nn.Module, Case], nn.Module]

# --- the methods ---------------------------------------------------------------------------------


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def full(model: nn.Module, case: Case) -> nn.Module:
    return model.requires_grad_(True)


def ours(basis: str, choice: Choice | None = None, *, train_a: bool = False) -> Prepare:
    def prepare(model: nn.Module, case: Case) -> nn.Module:
        randlora.inject(model, case.rank, basis=basis, train_a=train_a)
        for layer in model.modules():
            if isinstance(layer, randlora.RandLoRALinear):
                nn.init.normal_(layer.randlora_gamma, std=1e-2)
                if choice is not None:
                    layer.choice = choice
        return model

    return prepare


def peft_randlora(model: nn.Module, case: Case) -> nn.Module:
    from peft import RandLoraConfig, get_peft_model

    config = RandLoraConfig(r=case.rank, target_modules=adapted_names(model))
    return get_peft_model(model, config)


def peft_lora(model: nn.Module, case: Case) -> nn.Module:
    """LoRA of the one rank that trains most nearly as many parameters."""
    from peft import LoraConfig, get_peft_model

    layers = [model.get_submodule(name) for name in adapted_names(model)]
    p = [min(layer.weight.shape) for layer in layers]
    trained = sum(-(-size // case.rank) * (case.rank + size) for size in p)
    rank = max(1, round(trained / sum(sum(layer.weight.shape) for layer in layers)))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted_names(model))
    return get_peft_model(model, config)


METHODS: dict[str, Prepare] = {
    "full fine-tuning": full,
    "PEFT LoRA": peft_lora,
    "PEFT RandLora": peft_randlora,
    "dense": ours("dense"),
    "dense, torch's GEMM": ours("dense"),
    "sparse": ours("sparse"),
    "very sparse": ours("very_sparse"),
    "isometric": ours("isometric"),
    "isometric, A trained": ours("isometric", train_a=True),
}
COMPILED = ", compiled"  # ends the name of a method under torch.compile


def method(name: str) -> Prepare:
    return METHODS[name.removesuffix(COMPILED)]


# --- the oracle first ----------------------------------------------------------------------------


def check(model: nn.Module, case: Case) -> None:
    """Compare each kind of layer with the oracle in float64, values and gradients."""
    seen = set()
    for layer in model.modules():
        if not isinstance(layer, randlora.RandLoRALinear) or layer.base_weight.shape in seen:
            continue
        seen.add(layer.base_weight.shape)
        # Few tokens, but the plan of the many that are timed.
        given = layer.choice
        plan = layer.plan(case.batch * case.length)
        layer.choice = Choice(**dataclasses.asdict(plan))
        x = torch.randn(64, layer.in_features).to(DEVICE, case.dtype)
        probe = torch.randn(64, layer.out_features).to(DEVICE, case.dtype)
        r, p, q, m = layer.weight_update.sizes
        a, b = (t.to(DEVICE, torch.float64) for t in (layer.bank.a(r, p), layer.bank.b(q, m)))
        got = [x, *layer.weight_update.parameters(layer)]
        want = [t.detach().double() for t in got]
        for leaf in (x, *want):
            leaf.requires_grad_()
        y = layer(x)
        layer.choice = given
        bias = None if layer.bias is None else layer.bias.double()
        exact_x, lam, gamma, *own = want
        a = own[0] if own else a
        exact = reference.linear(
            exact_x, layer.base_weight.double(), bias, a, b, lam, gamma, scaling=layer.scaling
        )
        grads = torch.autograd.grad((y * probe).sum(), got)
        exacts = torch.autograd.grad((exact * probe.double()).sum(), want)
        tolerance = 1e-5 if case.dtype == torch.float32 else 3e-2  # a hundred, or four, roundings
        for one, other in zip((y, *grads), (exact, *exacts), strict=True):
            error = (one.double() - other).norm() / other.norm()
            if not error <= tolerance:
                raise SystemExit(f"{tuple(layer.weight.shape)}: {error:.1e} off the oracle")


# --- time and memory -----------------------------------------------------------------------------


class Stopwatch:
    """Marks in time. On a GPU they are events in its stream, so that nothing waits for it."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        if DEVICE.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def between(self, one: int, other: int) -> float:
        """Seconds from one mark to another."""
        if DEVICE.type == "cuda":
            self.marks[other].synchronize()
            return self.marks[one].elapsed_time(self.marks[other]) / 1e3
        return self.marks[other] - self.marks[one]


class Run:
    """One model with its optimiser, and the seconds of its steps."""

    def __init__(self, name: str, prepare: Prepare, case: Case, *, to_check: bool = True) -> None:
        self.onednn = USE_ONEDNN and "torch's GEMM" not in name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = prepare(case.model().to(DEVICE), case).train()
        if to_check:
            check(self.model, case)
        if name.endswith(COMPILED):
            self.model.compile()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4)
        # One layer gets a gradient of its input, as if there were more below.
        self.x = case.input().to(DEVICE).requires_grad_(case.layer)
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}

    def step(self) -> None:
        matmul.USE_ONEDNN = self.onednn
        self.optimiser.zero_grad()
        watch = Stopwatch()
        watch.mark()
        loss = self.model(self.x).float().square().mean()
        watch.mark()
        loss.backward()
        watch.mark()
        self.optimiser.step()
        watch.mark()
        for phase, span in zip(self.seconds, ((0, 1), (1, 2), (0, 3)), strict=True):
            self.seconds[phase].append(watch.between(*span))

    def saved_bytes(self) -> int:
        """Bytes saved for backward, without the storages of parameters, buffers and banks."""
        known = {t.untyped_storage().data_ptr() for t in self.model.parameters()}
        known |= {t.untyped_storage().data_ptr() for t in self.model.buffers()}
        known.add(self.x.untyped_storage().data_ptr())
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(self.x).float().square().mean()
        del loss
        return sum(saved.values())


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"no {field} in /proc/self/status")


def fault_in_code() -> None:
    """Read all that is mapped of files: code would else count for the method that first runs it."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, access, *_, path = [*line.split(maxsplit=5), ""][:6]
            if access.startswith("r") and path.startswith("/"):
                start, end = (int(number, 16) for number in span.split("-"))
                with contextlib.suppress(OSError):  # of a device, or beyond the end of a file
                    for at in range(start, end, 2**20):
                        memory.seek(at)
                        memory.read(min(2**20, end - at))


def peak(name: str, case: Case) -> int:
    """Most resident memory of the second and third step, beyond the imports and libraries' code.

    On a GPU, the most that torch allocated there.
    """
    import peft  # noqa: F401  (so that all methods start from the same)

    if DEVICE.type == "cuda":
        run = Run(name, method(name), case, to_check=False)
        run.step()
        torch.cuda.reset_peak_memory_stats()
        run.step()
        run.step()
        return torch.cuda.max_memory_allocated()

    # oneDNN generates 7 MiB of code at its first product. No method should count it.
    with torch.no_grad():
        matmul.mm(torch.randn(1024, 1024), torch.randn(1024, 1024))
    fault_in_code()

    before, code = resident("VmRSS"), resident("RssFile")
    run = Run(name, method(name), case, to_check=False)  # it was checked before the timing
    run.step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    run.step()
    run.step()
    if resident("RssFile") < code:
        raise SystemExit("too little memory: code was taken out, so the peak cannot be told")
    return resident("VmHWM") - before


# By default, malloc and MKL keep freed memory, which would then be measured.
FRUGAL = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
}


def peak_in_own_process(name: str, case_name: str) -> int:
    command = [sys.executable, __file__, "--peak", case_name, name, "--device", str(DEVICE)]
    done = subprocess.run(command, env={**os.environ, **FRUGAL}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def percentiles(values: list[float]) -> tuple[float, float, float]:
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], statistics.median(values), tenths[7]


@torch.no_grad()
def gemm_rate(dtype: torch.dtype, onednn: bool) -> float:
    """Multiply-adds a second of a large matrix product, the best of five."""
    matmul.USE_ONEDNN = onednn and USE_ONEDNN
    a, b = (torch.randn(3072, 3072).to(DEVICE, dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        watch = Stopwatch()
        watch.mark()
        matmul.mm(a, b)
        watch.mark()
        seconds.append(watch.between(0, 1))
    return 3072**3 / min(seconds[1:])


def least_seconds(run: Run, tokens: int, rates: tuple[float, float]) -> float:
    """What the products of the linear layers take at the rates of torch's own and of oneDNN.

    As the planner counts them, cheap bases at their price. The forward product is torch's own.
    """
    seconds = 0.0
    for layer in run.model.modules():
        if isinstance(layer, randlora.RandLoRALinear):
            a, b = layer.operands(layer.base_weight.dtype)
            work = work_of(tokens, a, b, layer.out_features < layer.in_features)
            own = tokens * layer.in_features * layer.out_features
            update = cost(work, layer.plan(tokens)) // 1000
            seconds += own / rates[0] + (own + update) / rates[run.onednn]
        elif isinstance(layer, nn.Linear):
            seconds += 3 * tokens * layer.in_features * layer.out_features / rates[0]
    return seconds


def bench(case_name: str, methods: list[str], rounds: int, memory: bool) -> list[dict[str, object]]:
    case = {**CASES, **GPU_CASES}[case_name]
    rates = gemm_rate(case.dtype, False), gemm_rate(case.dtype, True)
    if case.dtype != torch.float32 or not USE_ONEDNN:  # there torch's own product is no other
        methods = [name for name in methods if "torch's GEMM" not in name]
    if not methods:
        return []
    runs = {name: Run(name, method(name), case) for name in methods}
    with tqdm(total=(rounds + 1) * len(runs), desc=case_name, leave=False) as bar:
        for turn in range(rounds + 1):
            # Alternate the order: each method changes the allocator and caches for the next one.
            for run in list(runs.values())[:: -1 if turn % 2 else 1]:
                run.step()
                if turn == 0:  # the warm-up
                    run.seconds = {phase: [] for phase in run.seconds}
                bar.update()
            bar.set_postfix_str(so_far(runs) if turn else "warm-up")
    rows: list[dict[str, object]] = []
    for name, run in runs.items():
        row: dict[str, object] = {"case": case_name, "method": name}
        row["trained"] = sum(p.numel() for p in run.trained)
        for phase, values in run.seconds.items():
            for label, value in zip(("p20", "p50", "p80"), percentiles(values), strict=True):
                row[f"{phase}_{label}"] = value
        row["saved_mib"] = run.saved_bytes() / 2**20
        least = least_seconds(run, case.batch * case.length, rates) if "PEFT" not in name else 0
        row["products"] = least / float(row["step_p50"])  # type: ignore[arg-type]
        rows.append(row)
    runs.clear()
    for row in tqdm(rows, desc=f"{case_name}, memory", leave=False, disable=not memory):
        row["peak_mib"] = (
            peak_in_own_process(str(row["method"]), case_name) / 2**20 if memory else 0
        )
    return rows


def so_far(runs: dict[str, Run]) -> str:
    """Steps as ratios of the first method's, medians up to now."""
    median = {name: statistics.median(run.seconds["step"]) for name, run in runs.items()}
    first = next(iter(median.values()))
    return ", ".join(f"{name} {value / first:.2f}" for name, value in median.items())


def table(rows: list[dict[str, object]]) -> str:
    by_name = {row["method"]: row for row in rows}
    lines = [
        f"| {'method':<18} | trained | forward | backward | step | of eager | of full "
        "| of PEFT RandLora "
        "| of PEFT LoRA | products | saved | peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        eager = str(row["method"]).removesuffix(COMPILED)
        ratios = [
            f"{row['step_p50'] / by_name[name]['step_p50']:.2f}" if name in by_name else ""
            for name in (eager, "full fine-tuning", "PEFT RandLora", "PEFT LoRA")
        ]
        lines.append(
            f"| {row['method']:<18} | {row['trained']:,} | {row['forward_p50']:.3f} s "
            f"| {row['backward_p50']:.3f} s "
            f"| {row['step_p50']:.3f} s ({row['step_p20']:.3f}-{row['step_p80']:.3f}) | "
            + " | ".join(ratios)
            + (f" | {row['products']:.2f}" if row["products"] else " | ")
            + f" | {row['saved_mib']:.0f} MiB | {row['peak_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


# --- curves --------------------------------------------------------------------------------------

PURE = {
    "weight": Choice("weight", "weight", "weight"),
    "activations": Choice("activations", "activations", "activations"),
}
BASE = {"d": 768, "heads": 12, "hidden": 3072, "depth": 1, "length": 64, "rank": 6, "batch": 16}
CURVES: dict[str, list[dict[str, Any]]] = {
    "tokens": [{"batch": batch} for batch in (1, 4, 16, 64)],
    "d": [{"d": d, "hidden": 4 * d} for d in (192, 384, 1536)],
    "rank": [{"rank": rank} for rank in (2, 24, 96)],
    "depth": [{"depth": depth} for depth in (1, 4)],
    "d of one layer": [{"d": d, "layer": True} for d in (512, 1024, 2048, 4096, 8192)],
}
BASES = ("dense", "very_sparse", "isometric")


def curve_point(case: Case, rounds: int) -> dict[str, float]:
    """Medians of a whole step: planned and pure ways of two kinds, and the others."""
    names = ["full fine-tuning", "PEFT LoRA"] + ["PEFT RandLora"] * (not case.layer)
    methods = {name: METHODS[name] for name in names}
    for basis in BASES:
        methods[f"{basis}, planned"] = ours(basis)
        for way, choice in PURE.items() if not case.layer else ():
            methods[f"{basis}, {way}"] = ours(basis, choice)
    # Wider layers run the same code, and their oracle takes minutes. Tests check that ways agree.
    runs = {
        name: Run(name, prepare, case, to_check="planned" in name and case.d <= 768)
        for name, prepare in methods.items()
    }
    for turn in range(rounds + 2):
        for run in runs.values():
            run.step()
            if turn == 1:
                run.seconds = {phase: [] for phase in run.seconds}
    point = {name: statistics.median(run.seconds["step"]) for name, run in runs.items()}
    banks = {
        layer.bank for layer in runs["dense, planned"].model.modules() if hasattr(layer, "bank")
    }
    point["bank_mib"] = sum(bank.nbytes for bank in banks) / 2**20
    return point


def curves(names: list[str], rounds: int, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows: list[dict[str, object]] = []
    worst = dict.fromkeys(BASES, 0.0)
    total = sum(len(CURVES[name]) for name in names)
    with tqdm(total=total, desc="curves", leave=False) as bar:
        for curve in names:
            for change in CURVES[curve]:
                case = Case(**{**BASE, **change})
                times = curve_point(case, rounds)
                value = (
                    case.batch * case.length if curve == "tokens" else next(iter(change.values()))
                )
                rows.append({"curve": curve, "value": value, **times})
                relative = {
                    name: seconds / times["full fine-tuning"]
                    for name, seconds in times.items()
                    if "planned" in name or "PEFT" in name
                }
                ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in relative.items())
                tqdm.write(f"{curve} {value}: of full fine-tuning {ratios}")
                for basis in worst if not case.layer else ():
                    better = min(times[f"{basis}, {way}"] for way in PURE)
                    ratio = times[f"{basis}, planned"] / better
                    worst[basis] = max(worst[basis], ratio)
                    tqdm.write(f"{curve} {value}, {basis}: planned / better pure {ratio:.2f}")
                bar.update()
    write(folder / "curves.csv", rows)
    print("worst:", ", ".join(f"{basis} {ratio:.2f}" for basis, ratio in worst.items()))
    figure, axes = plt.subplots(
        1, len(names), figsize=(4 * len(names), 4), layout="constrained", squeeze=False
    )
    for ax, curve in zip(axes[0], names, strict=True):
        chosen = [row for row in rows if row["curve"] == curve]
        for name in chosen[0]:
            if name not in ("curve", "value", "bank_mib", "full fine-tuning"):
                ratios = [row[name] / row["full fine-tuning"] for row in chosen]
                style = "-o" if "planned" in name else "--" if "PEFT" in name else ":"
                ax.semilogx([row["value"] for row in chosen], ratios, style, label=name)
        ax.set(xlabel=curve, ylabel="step / full fine-tuning", ylim=(0, 4))
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(folder / "curves.png", dpi=120)


def picture(rows: list[dict[str, object]], path: Path) -> None:
    """Step times of all cases, as ratios of the first method's, by default full fine-tuning's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(
        1, len(cases), figsize=(3.2 * len(cases), 4), layout="constrained", sharey=True
    )
    axes = [axes] if len(cases) == 1 else list(axes)
    for ax, case_name in zip(axes, cases, strict=True):
        chosen = [row for row in rows if row["case"] == case_name]
        first = chosen[0]["step_p50"]
        ax.barh([row["method"] for row in chosen], [row["step_p50"] / first for row in chosen])
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(title=case_name, xlabel=f"step / {chosen[0]['method']}")
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        fields = dict.fromkeys(field for row in rows for field in row)
        writer = csv.DictWriter(file, list(fields))
        writer.writeheader()
        writer.writerows(rows)


def processor() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    everything = {**CASES, **GPU_CASES}
    parser.add_argument("--cases", nargs="*", choices=list(everything))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        help="of the cases, not of the curves; pictures take the first as 1",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks")
    parser.add_argument(
        "--compile", action="store_true", help="each method under torch.compile, too"
    )
    parser.add_argument(
        "--curves", nargs="*", choices=list(CURVES), help="scaling curves as well, by default all"
    )
    parser.add_argument("--out", type=Path, default=Path("step"), help="a folder for CSV and plots")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    global DEVICE, USE_ONEDNN
    DEVICE = options.device
    USE_ONEDNN = matmul.uses_onednn(torch.float32, DEVICE)
    if options.cases is None:
        options.cases = list(GPU_CASES if DEVICE.type == "cuda" else CASES)
    if options.peak:  # for peak_in_own_process, which sets the environment
        case_name, method = options.peak
        print(peak(method, everything[case_name]))
        return
    import peft

    options.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{processor()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, peft {peft.__version__}, randlora {randlora.__version__}"
    )
    for dtype in (torch.float32, BF16):
        for onednn, name in enumerate(("torch's own", "the update's")):
            rate = gemm_rate(dtype, bool(onednn))
            print(f"matrix products in {dtype}, {name}: {rate / 1e9:.0f} G multiply-adds / s")
    if options.compile:
        options.methods = [name + end for name in options.methods for end in ("", COMPILED)]
    found: list[dict[str, object]] = []
    for case_name in options.cases:
        rows = bench(case_name, options.methods, options.rounds, not options.no_memory)
        found += rows
        print(f"\n### {case_name}\n\n{table(rows)}", flush=True)
    if found:
        write(options.out / "step.csv", found)
        picture(found, options.out / "step.png")
    if options.curves is not None:
        print()
        curves(options.curves or list(CURVES), options.rounds, options.out)


if __name__ == "__main__":
    main()
