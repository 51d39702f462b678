"""The structure of the package: subpackages, who imports whom, public names, import cost."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import randlora

SOURCE = Path(randlora.__file__).parent
MODULES = sorted(path.relative_to(SOURCE).with_suffix("").parts for path in SOURCE.rglob("*.py"))
FRONT = {("__init__",), ("__main__",)}  # these two may import everything

# Each subpackage, top-level files that belong to it, and the subpackages that it may import.
SUBPACKAGES = {
    "core": ({"functional", "planning", "reference"}, set()),
    "bases": (set(), {"core"}),
    "modules": (set(), {"core", "bases"}),
    "model": (set(), {"core", "bases", "modules"}),
    "files": ({"checkpoint", "peft"}, {"core", "bases", "modules", "model"}),
}
# Optional packages. Triton comes with torch for CUDA.
EXTRAS = {
    "storage": {"safetensors"},
    "merge_files": {"safetensors"},
    "triton_kernels": {"triton"},
}


def subpackage_of(module: tuple[str, ...]) -> str:
    """The subpackage of a module, from the parts of its name below ``randlora``."""
    return next(name for name, (beside, _) in SUBPACKAGES.items() if module[0] in {name, *beside})


def imports(path: Path) -> tuple[set[tuple[str, ...]], set[str]]:
    """What a file imports: modules of the package, and the first names of all others."""
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
            first, *rest = name.split(".")
            if first == "randlora":
                own.add(tuple(rest))
            else:
                foreign.add(first)
    return own, foreign


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_imports_run_one_way(name):
    files = [m for m in MODULES if m not in FRONT and subpackage_of(m) == name]
    allowed = SUBPACKAGES[name][1] | {name}
    assert files
    for module in files:
        own, foreign = imports(SOURCE.joinpath(*module).with_suffix(".py"))
        assert {subpackage_of(other) for other in own - {("__version__",)}} <= allowed, module
        others = sys.stdlib_module_names | {"numpy", "torch"} | EXTRAS.get(module[-1], set())
        assert foreign <= others, module


def test_planning_knows_no_tensors():
    assert imports(SOURCE / "core" / "planning.py")[1] <= sys.stdlib_module_names


def test_public_names_are_documented():
    for name in randlora.__all__:
        assert getattr(randlora, name).__doc__, name
    assert sorted(randlora.__all__) == randlora.__all__


def test_public_modules_are_imported_in_every_form():
    lines = ["import sys"]
    for name in ("checkpoint", "functional", "peft", "planning", "reference"):
        lines.append(f"import randlora.{name} as one; from randlora import {name} as other")
        lines.append(f"assert one is other is sys.modules['randlora'].{name}")
    lines.append("assert 'torch._dynamo' not in sys.modules")  # it takes a second to import
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize("module", [m for m in MODULES if m not in FRONT], ids=".".join)
def test_the_examples_of_the_docstrings_run(module):
    if module[-1] == "triton_kernels":
        pytest.importorskip("triton")
    found = importlib.import_module(".".join(("randlora", *module)))
    public = {name: getattr(randlora, name) for name in randlora.__all__}
    failed, _ = doctest.testmod(found, extraglobs={**public, "torch": torch, "nn": torch.nn})
    assert not failed


def test_no_test_imports_another():
    folder = Path(__file__).parent
    for path in folder.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert "test_" not in str(node.module), f"{path.name} imports {node.module}"
