"""Imports a script of the folder ``benchmarks``, to test what it computes."""

import importlib
import sys
from contextlib import contextmanager

import pytest

from tests.support.pages import ROOT


@contextmanager
def imported(name):
    """The module; afterwards it and those that it imported from its folder are forgotten."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.syspath_prepend(ROOT / "benchmarks" / "evidence")
        patch.setattr(sys, "dont_write_bytecode", True)
        yield importlib.import_module(name)
        for new in set(sys.modules) - before:
            file = getattr(sys.modules[new], "__file__", None) or ""
            if file.startswith(str(ROOT / "benchmarks")):
                del sys.modules[new]
