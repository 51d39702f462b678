import os

import pytest
import torch
from hypothesis import settings

from randlora import products

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# What the package reads off the processor, as another processor would have it.
SWITCHES = {
    "onednn": ("ONEDNN", True),
    "no-onednn": ("ONEDNN", False),
    "widened": ("WIDENED", frozenset({torch.bfloat16, torch.float16})),
    "no-widened": ("WIDENED", frozenset()),
    "flipped": None,  # both the other way round than here
}


def pytest_addoption(parser):
    parser.addoption(
        "--switch",
        action="append",
        choices=list(SWITCHES),
        default=[],
        help="run with a switch of randlora.products set, whatever the processor",
    )


def pytest_configure(config):
    for name in config.getoption("--switch"):
        if name == "flipped":
            products.ONEDNN = not products.ONEDNN
            products.WIDENED = SWITCHES["no-widened" if products.WIDENED else "widened"][1]
        else:
            setattr(products, *SWITCHES[name])


def pytest_report_header(config):
    low = ", ".join(sorted(str(dtype) for dtype in products.WIDENED)) or "none"
    here = torch.backends.cpu.get_cpu_capability()
    return (
        f"{here}, {torch.get_num_threads()} threads; oneDNN {'on' if products.ONEDNN else 'off'}"
        f"{'' if products._AVAILABLE else ' (not to be had)'}, widened: {low}"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
