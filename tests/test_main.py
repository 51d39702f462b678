"""The commands: what is in a file, whether its bases are, and its updates in a file of weights."""

import json
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import randlora
from randlora import kernel, operators, products
from randlora.__main__ import main
from randlora.diagnostics import rank_report
from tests.memory import Allocated
from tests.test_checkpoint import TOKENS, plain, rewrite, trained, with_bank


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "adapter.safetensors"
    randlora.save_adapter(trained(), path)
    return path


def test_inspect_says_what_is_there(path, capsys):
    assert main(["inspect", str(path), "--ranks"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert rows["attention.in_proj_weight"].split() == [
        *("attention.in_proj_weight", "24", "x", "8", "3", "3", "1", "33", "0", "8", "of", "8")
    ]
    ranks = {r.name: r.rank for r in rank_report(trained())}
    assert rows["experts.down"].endswith(f"{ranks['experts.down[0]']} of 8")
    assert "bank 0: BasisBank('sparse', seed=5, sparsity=6), digest " in out
    assert "trained in full: norm, head: 46 numbers" in out
    assert main(["inspect", str(path)]) == 0
    assert "rank of update" not in capsys.readouterr().out


def test_verify_tells_other_bases(path, capsys):
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith("6 updates; BasisBank(")
    with_bank(randlora.BasisBank("sparse", seed=6))(path)
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith("BasesError: the bases that BasisBank('sparse'")
    path.write_bytes(b"")
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith("FileError: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", ["dense", "sparse", "isometric"])
def test_merge_writes_what_merging_a_model_gives(tmp_path, basis, dtype):
    adapter, base, out = (tmp_path / f"{n}.safetensors" for n in ("adapter", "base", "out"))
    model = trained(basis=basis)
    randlora.save_adapter(model, adapter)
    weights = plain().to(dtype)
    safetensors.torch.save_file(weights.state_dict(), base, {"format": "pt", "note": "kept"})
    assert main(["merge", str(adapter), str(base), str(out)]) == 0
    want = randlora.unload(randlora.load_adapter(plain().to(dtype), adapter), merge=True)
    got = safetensors.torch.load_file(out)
    assert got.keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(got[name], tensor), name
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    weights.load_state_dict(got)
    with torch.no_grad():
        assert torch.equal(weights(TOKENS), want(TOKENS))


@pytest.mark.parametrize("basis", ["dense", "isometric"])
def test_merging_takes_the_memory_of_a_layer_and_not_of_the_model(tmp_path, basis, monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", False)  # which takes a product's size more
    for module in (kernel, operators, products):  # what is measured here is not watched elsewhere
        monkeypatch.setattr(module, "in_place", lambda: True)
    size = 1024
    adapter, base, out = (tmp_path / f"{n}.safetensors" for n in ("adapter", "base", "out"))
    # First a small one, for what is imported when it is needed.
    for width, depth in ((64, 1), (size, 24)):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))
        safetensors.torch.save_file(model.state_dict(), base)
        randlora.save_adapter(randlora.inject(model, 8, basis=basis), adapter)
        with Allocated() as allocated:
            assert main(["merge", str(adapter), str(base), str(out)]) == 0
    # The adapter as it was read; then a weight, the new one, its coefficients C, and B or what is
    # between its two factors. The rest is as small as names, of which there are some hundred.
    layer, rest = 4 * size**2, 2**19
    assert allocated.peak < adapter.stat().st_size + 4 * layer + rest
    assert allocated.peak > 4 * layer  # it is seen


def test_another_base_is_taken_where_that_is_meant_and_may_be_the_output(path):
    base = path.with_name("base.safetensors")
    safetensors.torch.save_file(plain(seed=1).state_dict(), base)
    assert main(["merge", "--any-base", str(path), str(base), str(base)]) == 0
    other = randlora.load_adapter(plain(seed=1), path, check_base=False)
    want = randlora.unload(other, merge=True).state_dict()
    got = safetensors.torch.load_file(base)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_a_bar_is_drawn_on_a_terminal(path, capsys, monkeypatch):
    base = path.with_name("base.safetensors")
    safetensors.torch.save_file(plain().state_dict(), base)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["merge", str(path), str(base), str(path.with_name("out.safetensors"))]) == 0
    count = len(plain().state_dict())
    drawn = capsys.readouterr().err
    assert drawn.endswith(f"[{'#' * 30}] {count} of {count}\n")
    assert drawn.count("\r") == count


def short(path):
    path.write_bytes(path.read_bytes()[:-1])


def without_conv(path):
    state = {n: t for n, t in plain().state_dict().items() if not n.startswith("conv")}
    safetensors.torch.save_file(state, path)


def other_conv(path):
    state = {**plain().state_dict(), "conv.weight": torch.zeros(5, 8, 1)}
    safetensors.torch.save_file(state, path)


def edited(**changes):
    def act(path):
        state = {**plain().state_dict(), **changes}
        safetensors.torch.save_file({n: t for n, t in state.items() if t is not None}, path)

    return act


def header(change):
    """A header that says something else of the convolution."""

    def act(path):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        change(entries["conv.weight"])
        head = json.dumps(entries).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])

    return act


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (edited(**plain(seed=1).state_dict()), "BaseModelError: .* trained on another base model"),
        (
            edited(**{"attention.in_proj_weight": torch.zeros(8, 24)}),
            r"MismatchError: the base has 'attention.in_proj_weight' as F32 of \[8, 24\]",
        ),
        (edited(**{"head.bias": None}), "MismatchError: the base has no 'head.bias', which was tr"),
        (header(lambda e: e.pop("dtype")), "FileError: .*'dtype'"),
        (header(lambda e: e.update(shape=[-6, -8, 1])), "FileError: .*'conv.weight' is not"),
        (header(lambda e: e.update(shape=[6, 9, 1])), "FileError: .*'conv.weight' is not as long"),
        (header(lambda e: e.update(data_offsets=[-8, 0])), "FileError: .* is not where"),
        (short, "FileError: .*it is not as long as its header says"),
        (lambda p: p.write_text("text"), "FileError: .* is not a whole .safetensors file"),
        (without_conv, "MismatchError: the base has no 'conv.weight'"),
        (other_conv, "MismatchError: the base has 'conv.weight' as F32 of"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_and_nothing_written(path, tamper, message, capsys):
    base, out = path.with_name("base.safetensors"), path.with_name("out.safetensors")
    safetensors.torch.save_file(plain().state_dict(), base)
    out.write_text("before")
    tamper(base)
    assert main(["merge", str(path), str(base), str(out)]) == 1
    error = capsys.readouterr().err
    assert re.match(message, error), error
    assert out.read_text() == "before"
    assert len(list(path.parent.iterdir())) == 3


def test_it_is_run_as_a_module(path):
    command = [sys.executable, "-m", "randlora", "verify", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the bases are those of the file" in done.stdout


def test_rewriting_changes_nothing_by_itself(path):
    before = path.read_bytes()
    rewrite(path, lambda contents: contents)
    assert path.read_bytes() == before
