"""Runs the tests of this folder in two processes, which gloo connects on the loopback."""

from pathlib import Path

import pytest

from tests.support.processes import run_in_two_processes

CHECKS = sorted(Path(__file__).parent.glob("check_*.py"))


@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_in_two_processes(checks):
    # Without a cache, which both would write.
    plugins = "-p", "tests.distributed.ranks", "-p", "no:xdist", "-p", "no:cacheprovider"
    run_in_two_processes("pytest", "-q", "-x", *plugins, checks)
