"""A plugin of pytest for each of the two processes: it connects them before the first test."""

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import disconnect


def pytest_configure(config):
    torch.set_num_threads(1)
    # The time-out ends a process that waits for one that failed.
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    assert dist.get_world_size() == 2
    config.option.tbstyle = "short" if dist.get_rank() == 0 else "line"


def pytest_unconfigure(config):
    disconnect()


@pytest.fixture
def shared_path():
    """A new folder that both processes use.

    Not ``tmp_path``: for that both would tidy up one folder of pytest's at once, which can fail.
    """
    first = dist.get_rank() == 0
    made = [tempfile.mkdtemp() if first else None]
    dist.broadcast_object_list(made)
    yield Path(made[0])
    dist.barrier()
    if first:
        shutil.rmtree(made[0])


@pytest.fixture(autouse=True)
def _together():
    yield
    dist.barrier()
