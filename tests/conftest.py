import os
import sys
import warnings

import pytest
import torch
from hypothesis import settings

from randlora.core import machine, matmul

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Run all tests as on another processor. "flipped" sets the switches of CPUs to the opposite of this
# one. "accelerator" takes the ways that the kernel takes on a GPU.
SWITCHES = ("onednn", "no-onednn", "widened", "no-widened", "flipped", "accelerator")


def pytest_addoption(parser):
    parser.addoption(
        "--switch",
        action="append",
        choices=SWITCHES,
        default=[],
        help="set one of the switches of randlora.core.matmul, whatever the processor",
    )


def pytest_configure(config):
    asked = set(config.getoption("--switch"))
    if "flipped" in asked:
        asked.add("no-onednn" if matmul.USE_ONEDNN and matmul._AVAILABLE else "onednn")
        asked.add("no-widened" if matmul.UPCAST_DTYPES else "widened")
    if "onednn" in asked:
        # Processors without AVX-512 have the operator too; the package only does not use it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
            matmul._AVAILABLE = matmul._available()
    if "accelerator" in asked:
        machine.CPU = machine.ACCELERATOR
    if asked & {"onednn", "no-onednn"}:
        matmul.USE_ONEDNN = "onednn" in asked
    if asked & {"widened", "no-widened"}:
        low = {torch.bfloat16, torch.float16}
        matmul.UPCAST_DTYPES = frozenset(low if "widened" in asked else ())


def pytest_report_header(config):
    onednn = matmul.uses_onednn(torch.float32, torch.device("cpu"))
    return (
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; large "
        f"products by oneDNN: {onednn}; in float32: {set(matmul.UPCAST_DTYPES) or 'none'}"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _alone():
    """Make tests independent of the tests that ran before them."""
    torch.manual_seed(0)
    torch.set_warn_always(True)  # else only the first test gets a warning that is given once
    yield
    if "torch._dynamo" in sys.modules:
        with warnings.catch_warnings(action="ignore"):  # it imports more of torch
            torch._dynamo.reset()  # compiled graphs count towards a limit
    if accelerate := sys.modules.get("accelerate"):
        accelerate.state.AcceleratorState._reset_state(True)  # all of a process share its settings
