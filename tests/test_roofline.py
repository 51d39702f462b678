"""The counts of benchmarks/roofline.py, and the bounds that a change of the kernel has to keep."""

import itertools

import pytest
import torch

from randlora.core import machine
from randlora.core.planning import Work, choose, cost
from tests.support.benchmarks import imported


@pytest.fixture(scope="module")
def roofline():
    with imported("roofline") as module:
        yield module


def floor(roofline, method, case):
    kernels, _ = roofline.count(method, case)
    return len(kernels), sum(kernel.seconds(*roofline.GPUS["h100"]) for kernel in kernels)


# Kernels, and the floor as a part of full fine-tuning's: the most that is allowed.
BOUNDS = {
    ("isometric", 8192): (20, 1.22),
    ("isometric", 2048): (20, 1.80),
    ("dense", 8192): (16, 1.65),
    ("dense", 2048): (16, 2.9),
    ("sparse", 8192): (26, 1.75),
}


@pytest.mark.parametrize(("method", "tokens"), BOUNDS)
def test_a_square_layer_takes_no_more_than_it_did(roofline, method, tokens):
    case = roofline.Case(4096, 4096, tokens)
    kernels, seconds = floor(roofline, method, case)
    most, ratio = BOUNDS[method, tokens]
    assert kernels <= most
    assert seconds <= ratio * floor(roofline, "full", case)[1]


def test_a_block_takes_less_than_full_fine_tuning(roofline):
    """The seven layers of Llama 3 8B: the most that is allowed, of full fine-tuning's floor."""
    totals = dict.fromkeys(("full", "lora", "isometric", "dense"), 0.0)
    for method, (in_, out) in itertools.product(totals, roofline.BLOCKS["llama-3-8b"].values()):
        totals[method] += floor(roofline, method, roofline.Case(in_, out, 8192))[1]
    assert totals["isometric"] <= 0.92 * totals["full"]
    assert totals["isometric"] <= 1.08 * totals["lora"]
    assert totals["dense"] <= 1.45 * totals["full"]


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64)])
def test_products_multiply_as_often_as_the_planner_says(roofline, shape):
    in_, out = shape
    p, q = min(shape), max(shape)
    for tokens in (10, 500):
        case = roofline.Case(in_, out, tokens, rank=8)
        kernels, _ = roofline.count("dense", case)
        balance = 1000 * machine.ACCELERATOR.balance[torch.bfloat16.itemsize]
        work = Work(tokens, p, q, p, p // 8, in_ > out, balance=balance)
        plan = choose(work)
        beyond = cost(work._replace(balance=0), plan) // 1000
        frozen = 2 * tokens * p * q
        assert sum(kernel.flops for kernel in kernels) == 2 * (frozen + beyond)


def test_a_kernel_reads_expanded_numbers_once(roofline):
    with roofline.as_on_a_gpu() as counter:
        a = torch.empty(4, 5, device="meta")
        torch.bmm(a.expand(3, 4, 5), torch.empty(3, 5, 6, device="meta"))
        a.t().view(5, 4)
        a.add_(1)
    product, added = counter.kernels
    assert (product.nbytes, product.flops) == (4 * (20 + 90 + 72), 2 * 3 * 4 * 5 * 6)
    assert (added.name, added.nbytes) == ("add_", 4 * 40)
    assert product.seconds(1.0, 1.0, 1e-12) == product.flops  # in float32
