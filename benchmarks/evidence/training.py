"""The training that all methods share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def train(
    model: nn.Module, losses: Iterable[Tensor], steps: int, rate: float, head: float = 0.0
) -> float:
    """Train, the head at a rate of its own if there is one; return the median seconds of a step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    of_head, others = (
        [p for name, p in named if name.startswith("head.") is where] for where in (True, False)
    )
    if head and not of_head:
        raise ValueError("a rate for the head needs trained parameters named 'head.…', found none")
    rates = (head or rate), rate
    optimiser = torch.optim.AdamW(
        [{"params": of_head}, {"params": others}], lr=rate, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=steps)
    ends = [time.perf_counter()]
    for loss in losses:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        ends.append(time.perf_counter())
    return statistics.median(np.diff(ends))
