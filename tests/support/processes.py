"""Runs a module in two processes that train together, connected by gloo on the loopback."""

import gc
import os
import socket
import subprocess
import sys

import torch

from tests.support.pages import ROOT

# `lo` on Linux, `lo0` on macOS.
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
COMMAND = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node", "2", "--local-addr", "127.0.0.1", "-m"),
)


def disconnect():
    """End the connection of this process.

    Without this, or while a model still holds it, gloo's threads abort some processes at their
    exit.
    """
    gc.collect()
    torch.distributed.destroy_process_group()


def run_in_two_processes(module, *arguments):
    """Run ``python -m module arguments`` in each. What both wrote is shown if one fails."""
    done = subprocess.run(
        [*COMMAND, module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
