"""Gradients in low precision are hardly less exact than those of full fine-tuning."""

import pytest
import torch

from tests.support.benchmarks import imported


@pytest.fixture(scope="module")
def precision():
    with imported("precision") as module:
        yield module


@pytest.mark.parametrize("kind", ["isometric", "dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "autocast, bfloat16", "autocast, float16"])
def test_gradients_are_as_exact_as_those_of_full_fine_tuning(precision, name, kind):
    """What the products with bases add is less than one rounding at its worst, half an epsilon.

    Errors that do not depend on each other add in squares.
    """
    low = torch.bfloat16 if "bfloat16" in name else torch.float16
    half = torch.finfo(low).eps / 2
    for ours, full in zip(*precision.compare(kind, name), strict=True):
        assert ours**2 <= full**2 + half**2
