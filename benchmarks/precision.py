"""How exact gradients are in low precision: this package beside full fine-tuning.

Two blocks of width 192, 200 tokens, rank 6, an update of a third of the weights' size. Errors are
relative, in the Frobenius norm, to the gradients in float64 of the same numbers: weights, bases and
inputs as they are in that precision. Full fine-tuning has the weights W0 + ΔW. Its gradients are
projected to those of Λ and Γ in float64, so that both have the same exact result.

    python benchmarks/precision.py
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from step import Block
from torch import Tensor, nn

import randlora
from randlora import RandLoRALinear
from randlora.core.kronecker import KroneckerOperator
from randlora.core.operators import DenseOperator, Operator

KINDS = "isometric", "dense", "sparse", "very_sparse"
# The dtype of the model, and that of autocast.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast, bfloat16": (torch.float32, torch.bfloat16),
    "autocast, float16": (torch.float32, torch.float16),
}


def layers(model: nn.Module) -> dict[str, RandLoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, RandLoRALinear)}


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(192, 3, 768, llama=False) for _ in range(2))).to(dtype)
    randlora.inject(model, rank=6, basis=kind)
    for layer in layers(model).values():
        nn.init.normal_(layer.randlora_gamma, std=1e-2)
    return model


def in_float64(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in float64, with the bases as they are in ``dtype``."""
    exact = copy.deepcopy(model).double()
    for layer in layers(exact).values():
        update = layer.weight_update
        a, b = update.operands(torch.device("cpu"), dtype)
        operands = a.double(), widened(b, update)
        update.operands = lambda *_, operands=operands: operands  # type: ignore[method-assign]
    return exact


def widened(b: Operator, update: Any) -> Operator:
    if isinstance(b, KroneckerOperator):
        return KroneckerOperator(b.left.double(), b.right.double(), b.shape)
    if isinstance(b, DenseOperator):
        return DenseOperator(b.entries.double(), b.scale, b.unit)
    return update.operands(torch.device("cpu"), torch.float64)[1]  # signs are exact


def gradients(
    model: nn.Module, x: Tensor, autocast: torch.dtype | None, parameters: Sequence[Tensor]
) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
        y = model(x)
    torch.manual_seed(3)
    probe = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad((y * probe).double().sum(), [x, *parameters])
    return [grad.double() for grad in grads]


def projected(layer: RandLoRALinear, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of Λ and Γ that follow from that of the weight."""
    update = layer.weight_update
    lam, gamma = update.parameters(layer)
    a, b = update.operands(grad.device, grad.dtype)
    g = grad if layer.out_features >= layer.in_features else grad.T.contiguous()
    p = (layer.scaling * b.scale * b.tmm(g)).unflatten(0, lam.shape)
    return (p * a * gamma[:, None]).sum(2), (p * a * lam[:, :, None]).sum(1)


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[float, float, float]:
    """Of the input, and the means over layers of those of Λ and Γ."""
    each = [
        float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(got, want, strict=True)
    ]
    return each[0], statistics.mean(each[1::2]), statistics.mean(each[2::2])


def compare(kind: str, precision: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The errors of this package and of full fine-tuning."""
    dtype, autocast = PRECISIONS[precision]
    model = make(kind, dtype)
    exact = in_float64(model, autocast or dtype)
    full = randlora.unload(copy.deepcopy(model), merge=True).requires_grad_(True)
    x = torch.randn(4, 50, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = (
        [p for layer in layers(one).values() for p in layer.weight_update.parameters(layer)]
        for one in (model, exact)
    )
    want = gradients(exact, x.double(), None, theirs)
    weights = [full.get_submodule(name).weight for name in layers(model)]
    dx, *grads = gradients(full, x, autocast, weights)  # type: ignore[arg-type]
    found = zip(layers(exact).values(), grads, strict=True)
    through = [dx, *(one for layer, grad in found for one in projected(layer, grad))]
    return errors(gradients(model, x, autocast, ours), want), errors(through, want)


def main() -> None:
    print("| precision | bases | input | Λ | Γ | of full: input | Λ | Γ |")
    print("|---|---|---|---|---|---|---|---|")
    for precision in PRECISIONS:
        for kind in KINDS:
            ours, full = compare(kind, precision)
            cells = [f"{error:.1e}" for error in ours]
            cells += [f"{one / other:.2f}" for one, other in zip(ours, full, strict=True)]
            print(f"| {precision} | {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
