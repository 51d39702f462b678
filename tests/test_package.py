"""The shape of the package itself: its public names, its direction, what it imports."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import randlora

SOURCE = Path(randlora.__file__).parent

# What each module may import from the package: imports run one way.
MAY_IMPORT = {
    "_checks": set(),
    "reference": set(),
    "products": set(),
    "operators": {"isometry", "products"},
    "planning": set(),
    "symbolic": set(),
    "isometry": set(),
    "streams": set(),
    "bases": {"_checks", "isometry", "operators", "streams"},
    "kernel": {"operators", "planning", "products"},
    "functional": {"kernel", "operators", "planning"},
    "adapters": {"_checks", "bases", "operators"},
    "suspension": set(),
    "adapted": {
        *("adapters", "bases", "functional", "operators", "patterns", "suspension", "symbolic"),
    },
    "layers": {
        *("_checks", "adapted", "adapters", "bases", "functional", "kernel", "operators"),
        *("planning", "symbolic"),
    },
    "handlers": {"adapted", "adapters", "functional", "kernel", "layers", "symbolic"},
    "patterns": set(),
    "peft_bases": {"_checks", "bases", "streams"},
    "targets": {"adapted", "adapters", "handlers", "patterns"},
    "injection": {
        *("_checks", "adapted", "adapters", "bases", "handlers", "patterns", "peft_bases"),
        *("streams", "targets"),
    },
    "merging": {
        *("_checks", "adapted", "adapters", "injection", "patterns", "suspension", "targets"),
    },
    "arithmetic": {"adapted", "adapters", "injection", "merging", "targets"},
    "__main__": {"bases", "checkpoint", "contents", "diagnostics", "functional", "operators"},
    "contents": {
        *("__version__", "adapted", "adapters", "bases", "handlers", "injection", "patterns"),
        *("peft_bases", "streams", "targets"),
    },
    "checkpoint": {
        *("_checks", "adapted", "adapters", "bases", "contents", "peft_bases", "streams"),
    },
    "peft": {"adapters", "checkpoint", "contents", "handlers", "patterns", "peft_bases", "targets"},
    "diagnostics": {"adapted", "adapters", "bases", "layers", "patterns", "planning", "targets"},
}

EXTRAS = {"checkpoint": {"safetensors"}}  # imported where they are needed, with a word if lacking


def imports(path):
    """The modules of the package that a file imports, and the others, by their first name."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [node.module]
            if node.module == "randlora":
                names = [f"randlora.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            (own if first == "randlora" else foreign).add(rest if first == "randlora" else first)
    return own, foreign


def test_every_module_has_its_place():
    assert {path.stem for path in SOURCE.glob("*.py")} == {*MAY_IMPORT, "__init__"}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_run_one_way(module):
    own, foreign = imports(SOURCE / f"{module}.py")
    assert own <= MAY_IMPORT[module]
    assert foreign <= sys.stdlib_module_names | {"numpy", "torch", *EXTRAS.get(module, ())}


def test_planning_knows_no_tensors():
    assert imports(SOURCE / "planning.py")[1] <= sys.stdlib_module_names


def test_importing_is_free_of_compilers():
    """torch._dynamo takes a second to import; nothing here needs it."""
    command = "import sys, torch, randlora; print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_public_names_are_documented():
    for name in randlora.__all__:
        assert getattr(randlora, name).__doc__, name
    assert sorted(randlora.__all__) == randlora.__all__


def test_the_examples_of_the_readme_run():
    text = (SOURCE.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


@pytest.mark.parametrize("name", [name for name in MAY_IMPORT if name != "_checks"])
def test_the_examples_of_the_docstrings_run(name):
    module = importlib.import_module(f"randlora.{name}")
    globs = {"torch": torch, "nn": torch.nn, **vars(module)}
    failed, _ = doctest.testmod(module, extraglobs=globs)
    assert not failed
