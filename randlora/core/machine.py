"""How a device computes, as far as the kernel and the planner have to know.

A CPU computes most of a layer at the rate of its multiply-adds, and is fastest with parts that stay
in its cache. On an accelerator, moving a number takes as long as a hundred multiply-adds or more,
and each part is a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

# The limit for a temporary matrix of the shape of the weight, of B, of C or of P. To change it,
# assign to it in this module. A layer of 14336 x 4096 in float32 is just within it. The output of a
# larger layer after injection equals the plain layer's up to rounding, not bit for bit.
TRANSIENT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Machine:
    """What differs between a CPU and an accelerator."""

    # By the bytes of a number, the multiply-adds that take as long as moving it; none: moving is
    # not counted.
    balance: Mapping[int, int]
    # Bytes of C that are formed, and of int8 signs that are cast, at a time; 0: what the limit
    # of memory allows.
    part_bytes: int


CPU = Machine(balance={}, part_bytes=4 * 2**20)
# Of an H100: 3.0 TB/s beside 790 TFLOP/s in bfloat16, 67 in float32, 67 in float64.
ACCELERATOR = Machine(balance={2: 260, 4: 45, 8: 90}, part_bytes=0)


def machine_of(device: torch.device) -> Machine:
    """What the kernel and the planner assume of a device. ``meta`` counts as an accelerator."""
    return CPU if device.type == "cpu" else ACCELERATOR
