import os
import sys

import pytest
import torch
from hypothesis import settings

from randlora import products

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# What the package reads off the processor, for a whole run as another one would have it.
SWITCHES = ("onednn", "no-onednn", "widened", "no-widened", "flipped")  # the last: neither as here


def pytest_addoption(parser):
    parser.addoption(
        "--switch",
        action="append",
        choices=SWITCHES,
        default=[],
        help="set one of the switches of randlora.products, whatever the processor",
    )


def pytest_configure(config):
    asked = set(config.getoption("--switch"))
    if "flipped" in asked:
        asked.add("no-onednn" if products.ONEDNN and products._AVAILABLE else "onednn")
        asked.add("no-widened" if products.WIDENED else "widened")
    if "onednn" in asked:
        # The operator is there on processors without AVX-512 too, where it is of no use.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
            products._AVAILABLE = products._available()
    if asked & {"onednn", "no-onednn"}:
        products.ONEDNN = "onednn" in asked
    if asked & {"widened", "no-widened"}:
        low = {torch.bfloat16, torch.float16}
        products.WIDENED = frozenset(low if "widened" in asked else ())


def pytest_report_header(config):
    onednn = products.onednn(torch.float32, torch.device("cpu"))
    return (
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; large "
        f"products by oneDNN: {onednn}; in float32: {set(products.WIDENED) or 'none'}"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _alone():
    """Let no test see which ones ran before it."""
    torch.manual_seed(0)
    torch.set_warn_always(True)  # a warning that is given once would be another test's
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what was compiled counts towards a limit
