"""Runs the tests of this folder in two processes, which gloo connects on the loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CHECKS = sorted(path.stem for path in FOLDER.glob("check_*.py"))


@pytest.mark.parametrize("checks", CHECKS)
def test_in_two_processes(checks):
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    inner = ["-m", "pytest", "-q", "-x", "-p", "tests.distributed.ranks", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, *run, *inner, str(FOLDER / f"{checks}.py")],
        cwd=FOLDER.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout  # 5 if there are no tests
