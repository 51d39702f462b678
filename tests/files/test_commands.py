"""The commands ``inspect``, ``verify`` and ``merge``."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import randlora
from randlora.__main__ import main
from randlora.core import gather, matmul, update
from randlora.files import merge_files
from randlora.model.reports import rank_report
from tests.support.adapters import TOKENS, plain, rewrite, trained, with_bank
from tests.support.memory import Allocated
from tests.support.rows import shuffled


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "adapter.safetensors"
    randlora.save_adapter(trained(), path)
    return path


@pytest.mark.parametrize(("train_a", "numbers", "rank"), [(False, 33, 6), (True, 57, 4)])
def test_inspect_says_what_is_there(path, capsys, train_a, numbers, rank):
    model = trained(train_a=train_a)
    if train_a:
        with torch.no_grad():
            model.conv.randlora_a[:, :2] = 0  # zero columns of A are zero columns of ΔW
    randlora.save_adapter(model, path)
    assert main(["inspect", str(path), "--ranks"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert rows["attention.in_proj_weight"].split() == [
        *("attention.in_proj_weight", "24", "x", "8", "3", "3", "1"),
        *(str(numbers), *["with", "A"] * train_a, "0", "8", "of", "8"),
    ]
    ranks = {r.name: r.rank for r in rank_report(model)}
    assert rows["conv.weight"].endswith(f"{rank} of 6")
    assert ranks["conv"] == rank
    assert rows["experts.down"].endswith(f"{ranks['experts.down[0]']} of 8")
    assert "bank 0: BasisBank('sparse', seed=5, sparsity=6), digest " in out
    assert "trained in full: norm, head: 46 numbers" in out
    assert main(["inspect", str(path)]) == 0
    assert "rank of update" not in capsys.readouterr().out


@pytest.mark.parametrize("train_a", [False, True])
def test_verify_tells_other_bases(path, capsys, train_a):
    randlora.save_adapter(trained(train_a=train_a), path)
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith("6 updates; BasisBank(")
    with_bank(randlora.BasisBank("sparse", seed=6))(path)
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith("BasesError: the bases that BasisBank('sparse'")
    path.write_bytes(b"")
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith("FileError: ")


INDEX = "model.safetensors.index.json"
LAYOUTS = ("file", "folder", "shards")
METADATA = {"format": "pt", "note": "kept"}


def save_base(folder, layout, state):
    """Weights as one file, as a folder with one, or as a folder with shards; returns the path."""
    if layout == "file":
        safetensors.torch.save_file(state, folder / "base.safetensors", METADATA)
        return folder / "base.safetensors"
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    if layout == "folder":
        safetensors.torch.save_file(state, base / "model.safetensors", METADATA)
        return base
    names = list(state)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        part = {name: state[name] for name in names[shard::3]}
        safetensors.torch.save_file(part, base / file, METADATA)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (base / INDEX).write_text(json.dumps(index))
    return base


def weight_files(path):
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def load(path):
    loaded = {}
    for file in weight_files(path):
        loaded |= safetensors.torch.load_file(file)
    return loaded


def merged(path, model):
    return randlora.unload(randlora.load_adapter(model, path), merge=True)


def contents(folder):
    """The bytes of all files in a folder, by path."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "keywords",
    [{"basis": "dense"}, {"basis": "sparse"}, {"basis": "isometric"}, {"train_a": True}],
    ids=str,
)
def test_merge_writes_what_merging_a_model_gives(tmp_path, keywords, dtype, layout):
    adapter = tmp_path / "adapter.safetensors"
    randlora.save_adapter(trained(**keywords), adapter)
    weights = plain().to(dtype)
    base = save_base(tmp_path, layout, weights.state_dict())
    out = base.with_name(base.name.replace("base", "out"))
    assert main(["merge", str(adapter), str(base), str(out)]) == 0
    want = merged(adapter, plain().to(dtype))
    assert_same(load(out), want.state_dict())
    weights.load_state_dict(load(out))
    with torch.no_grad():
        assert torch.equal(weights(TOKENS), want(TOKENS))
    if base.is_dir():
        same = contents(base).keys()
        assert contents(out).keys() == same
        for name in same - {file.relative_to(base) for file in weight_files(base)}:
            assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_adapter_does_not_change_stays_as_it_is_to_the_byte(path, layout):
    others = {
        "integers": torch.arange(5),
        "nothing": torch.zeros(0, 3),
        "f8": torch.linspace(-1, 1, 9).to(torch.float8_e4m3fn),
        "f4": torch.arange(9, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "not a number": torch.tensor([torch.nan, -0.0]),
    }
    base = save_base(path.parent, layout, {**plain().state_dict(), **others})
    out = base.with_name(base.name.replace("base", "out"))
    assert main(["merge", str(path), str(base), str(out)]) == 0
    for before, after in zip(weight_files(base), weight_files(out), strict=True):
        one, two = before.read_bytes(), after.read_bytes()
        start = 8 + int.from_bytes(one[:8], "little")
        assert one[:start] == two[:start]  # the metadata is in it
        for name, entry in json.loads(one[8:start]).items():
            if name in others:
                begin, end = (start + at for at in entry["data_offsets"])
                assert one[begin:end] == two[begin:end], name


def test_a_folder_of_transformers_is_merged_into_one(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    base, out, adapter = tmp_path / "base", tmp_path / "out", tmp_path / "adapter.safetensors"
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(base, max_shard_size="8KB")
    assert len(weight_files(base)) > 2
    (base / "pytorch_model.bin").write_text("unmerged")
    (base / "pytorch_model.bin.index.json").write_text("of unmerged")
    (base / "original").mkdir()
    shuffled(randlora.inject(model, rank=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.randlora_copy_weight.add_(1)
    randlora.save_adapter(model, adapter)
    capsys.readouterr()
    assert main(["merge", str(adapter), str(base), str(out)]) == 0
    left_out = "original, pytorch_model.bin, pytorch_model.bin.index.json"
    assert capsys.readouterr().err == f"not copied: {left_out}\n"
    assert {f.name for f in base.iterdir()} - {f.name for f in out.iterdir()} == set(
        left_out.split(", ")
    )
    loaded = transformers.LlamaForCausalLM.from_pretrained(out, local_files_only=True).eval()
    with torch.no_grad():
        want = randlora.merge(model)(TOKENS).logits
        assert torch.equal(loaded(TOKENS).logits, want)
        # The comparison would notice a missing update.
        plain_model = transformers.LlamaForCausalLM.from_pretrained(base, local_files_only=True)
        assert not torch.equal(plain_model.eval()(TOKENS).logits, want)
    # If OUT is BASE, only the shards change.
    before = contents(base)
    capsys.readouterr()
    assert main(["merge", str(adapter), str(base), str(base)]) == 0
    assert capsys.readouterr().err == f"not merged: {left_out}\n"
    assert contents(base) == before | contents(out)


def test_the_file_that_is_loaded_is_the_one_that_is_merged(path, capsys):
    base = save_base(path.parent, "shards", plain(seed=1).state_dict())
    safetensors.torch.save_file(plain().state_dict(), base / "model.safetensors")
    out = path.with_name("out")
    out.mkdir()  # empty
    assert main(["merge", str(path), str(base), str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load(out), merged(path, plain()).state_dict())
    assert re.match(f"not copied: (model-.*, ){{3}}{INDEX}$", capsys.readouterr().err)


def test_weights_that_are_tied_and_trained_in_full_may_have_one_name_in_the_base(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict(
            {"embed": torch.nn.Embedding(12, 8), "body": torch.nn.Linear(8, 8)}
        )
        model["head"] = torch.nn.Linear(8, 12, bias=False)
        model["head"].weight = model["embed"].weight
        return model

    adapter, base = tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"
    model = tied(seed=0)
    keywords = {"target_modules": ["body"], "modules_to_save": ["embed", "head"]}
    shuffled(randlora.inject(model, rank=2, **keywords))
    with torch.no_grad():
        model["embed"].randlora_copy_weight.add_(1)
    randlora.save_adapter(model, adapter)
    state = {n: t for n, t in tied(seed=0).state_dict().items() if n != "head.weight"}
    safetensors.torch.save_file(state, base)
    assert main(["merge", str(adapter), str(base), str(base)]) == 0
    assert torch.equal(load(base)["embed.weight"], model["embed"].randlora_copy_weight)
    # Two weights with different trained values are not tied.
    rewrite(
        adapter,
        lambda data: replace(data, saved={**data.saved, "head.weight": torch.zeros(12, 8)}),
    )
    assert main(["merge", "--any-base", str(adapter), str(base), str(base)]) == 1


@pytest.mark.parametrize("basis", ["dense", "isometric"])
def test_merging_takes_the_memory_of_a_layer_and_not_of_the_model(tmp_path, basis, monkeypatch):
    monkeypatch.setattr(matmul, "USE_ONEDNN", False)  # it needs extra memory for a product
    for module in (matmul, gather, update):  # else the mode of `Allocated` switches it off
        monkeypatch.setattr(module, "in_place", lambda: True)
    size = 1024
    adapter, base, out = (tmp_path / f"{n}.safetensors" for n in ("adapter", "base", "out"))
    # The first, small run does the lazy imports.
    for width, depth in ((64, 1), (size, 24)):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))
        safetensors.torch.save_file(model.state_dict(), base)
        randlora.save_adapter(randlora.inject(model, 8, basis=basis), adapter)
        with Allocated() as allocated:
            assert main(["merge", str(adapter), str(base), str(out)]) == 0
    # The adapter that was read; then a weight, the new weight, its C, and B (or the product of C
    # with one factor). The rest is small, such as some hundred names.
    layer, rest = 4 * size**2, 2**19
    assert allocated.peak < adapter.stat().st_size + 4 * layer + rest
    assert allocated.peak > 4 * layer  # the measurement sees the weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_base_is_taken_where_that_is_meant_and_may_be_the_output(path, layout):
    base = save_base(path.parent, layout, plain(seed=1).state_dict())
    before = contents(path.parent).keys()
    assert main(["merge", "--any-base", str(path), str(base), str(base)]) == 0
    other = randlora.load_adapter(plain(seed=1), path, check_base=False)
    assert_same(load(base), randlora.unload(other, merge=True).state_dict())
    assert contents(path.parent).keys() == before


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


def prefixed(path):
    state = {f"model.{name}": tensor for name, tensor in plain().state_dict().items()}
    safetensors.torch.save_file(state, path)


def edited(**changes):
    def act(path):
        state = {**plain().state_dict(), **changes}
        safetensors.torch.save_file({n: t for n, t in state.items() if t is not None}, path)

    return act


def header(change):
    """Change the header entry of the convolution."""

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
            r"MismatchError: the base has 'attention.in_proj_weight' as torch.float32 of "
            r"\[8, 24\], the adapter an update for 24 x 8",
        ),
        (
            edited(**{"head.bias": None}),
            "MismatchError: .* no 'head.bias', which the adapter trained in full",
        ),
        (
            header(lambda e: e.pop("dtype")),
            "FileError: .* is not a complete .*field `dtype`",
        ),
        (header(lambda e: e.update(shape=[-6, -8, 1])), "FileError: .* is not a complete"),
        (header(lambda e: e.update(shape=[6, 9, 1])), "FileError: .* is not a complete"),
        (header(lambda e: e.update(data_offsets=[-8, 0])), "FileError: .* is not a complete"),
        (short, "FileError: .* is not a complete"),
        (lambda p: p.write_text("text"), "FileError: .* is not a complete .safetensors file"),
        (lambda p: p.write_bytes(b""), "FileError: .* is not a complete .safetensors file"),
        (lambda p: p.unlink(), "FileNotFoundError: .*base.safetensors"),
        (without_conv, "MismatchError: the base has no 'conv.weight'"),
        (other_conv, "MismatchError: the base has 'conv.weight' as torch.float32 of"),
        (
            edited(**{"conv.weight": torch.zeros(6, 8, 1).to(torch.float8_e4m3fn)}),
            "MismatchError: the base has 'conv.weight' as torch.float8_e4m3fn of",
        ),
        (
            edited(**{"head.weight": torch.zeros(3, 6, dtype=torch.int32)}),
            r"MismatchError: the base has 'head.weight' as torch.int32 of \[3, 6\], the adapter "
            r"torch.float32 of \[3, 6\]",
        ),
        (
            edited(**{"head.weight": torch.zeros(3, 5)}),
            r"MismatchError: the base has 'head.weight' as torch.float32 of \[3, 5\], the adapter",
        ),
        (
            prefixed,
            r"MismatchError: the base has no '(.*)', which the adapter updates; similar names in "
            r"the base: 'model\.\1'",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused_and_nothing_written(path, tamper, message, capsys):
    base, out = path.with_name("base.safetensors"), path.with_name("out.safetensors")
    safetensors.torch.save_file(plain().state_dict(), base)
    out.write_text("before")
    tamper(base)
    before = contents(path.parent)
    assert main(["merge", str(path), str(base), str(out)]) == 1
    error = capsys.readouterr().err
    assert re.match(message, error), error
    assert contents(path.parent) == before


def change_index(change):
    def act(base):
        index = json.loads((base / INDEX).read_text())
        change(index["weight_map"])
        (base / INDEX).write_text(json.dumps(index))

    return act


def change_shard(change):
    """Change the second of three shards, which has the weight of the head."""

    def act(base):
        shard = weight_files(base)[1]
        state = safetensors.torch.load_file(shard)
        change(state)
        safetensors.torch.save_file(state, shard)

    return act


def linked(base):
    shard = weight_files(base)[1]
    shard.rename(base.with_name("blob"))
    shard.symlink_to(base.with_name("blob"))


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda b: weight_files(b)[1].unlink(), "FileNotFoundError: .*model-00002-of-00003"),
        (lambda b: short(weight_files(b)[1]), "FileError: .*model-00002-of-00003.safetensors'"),
        (
            change_shard(lambda state: state.pop("conv.weight")),
            f"FileError: .*{INDEX}' has 'conv.weight' in model-00002-of-00003.safetensors, but it "
            "is in no file",
        ),
        (
            change_index(lambda names: names.pop("conv.weight")),
            f"FileError: .*{INDEX}' has 'conv.weight' in no file, but it is in model-00002",
        ),
        (
            change_shard(lambda state: state.update({"embed.weight": torch.zeros(2)})),
            "FileError: .*model-00002-of-00003.safetensors' has 'embed.weight', as 'model-00001",
        ),
        (
            change_index(lambda names: names.update({"conv.weight": "../base.safetensors"})),
            f"FileError: .*{INDEX}' names 'base.safetensors', no .safetensors file beside it",
        ),
        (
            change_index(lambda names: names.update({"conv.weight": 3})),
            f"FileError: .*{INDEX}' is not an index of weights: TypeError",
        ),
        (lambda b: (b / INDEX).write_text("{}"), f"FileError: .*{INDEX}' is not an index"),
        (lambda b: (b / INDEX).unlink(), "ValueError: base must be a .safetensors file, or a fold"),
        (
            change_shard(lambda state: state["conv.weight"].add_(1)),
            "BaseModelError: the adapter was trained on another base model: 'conv.weight'",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_nothing_written(
    path, tamper, message, in_place, capsys
):
    base = save_base(path.parent, "shards", plain().state_dict())
    tamper(base)
    before = contents(path.parent)
    out = base if in_place else path.with_name("out")
    assert main(["merge", str(path), str(base), str(out)]) == 1
    error = capsys.readouterr().err
    assert re.match(message, error), error
    assert contents(path.parent) == before


@pytest.mark.parametrize(
    ("layout", "out", "message"),
    [
        ("shards", "filled", "ValueError: out must be a new or empty folder, or base itself, but"),
        ("shards", "out.safetensors", "ValueError: out must be a folder, as base is, got '.*out.s"),
        ("shards", "adapter.safetensors", "ValueError: out must be a folder, as base is"),
        ("shards", "filled/some", "ValueError: out must be a folder, as base is"),
        ("shards", "lacking/out", "FileNotFoundError: .*lacking'$"),
        ("file", "out", "ValueError: out must be a .safetensors file, as base is, got"),
        ("file", "filled", "ValueError: out must be a .safetensors file, as base is, got"),
        (
            "file",
            "filled.safetensors",
            "ValueError: out must be a .safetensors file, as base is, got",
        ),
        ("file", "lacking/out.safetensors", "FileNotFoundError: .*lacking'$"),
    ],
)
def test_what_is_in_the_way_is_not_touched(path, layout, out, message, capsys):
    base = save_base(path.parent, layout, plain().state_dict())
    (path.parent / "filled").mkdir()
    (path.parent / "filled.safetensors").mkdir()
    (path.parent / "filled" / "some").write_text("mine")
    before = contents(path.parent)
    assert main(["merge", str(path), str(base), str(path.parent / out)]) == 1
    error = capsys.readouterr().err
    assert re.match(message, error), error
    assert contents(path.parent) == before


def test_a_link_is_read_and_what_it_leads_to_not_written(path, capsys):
    base = save_base(path.parent, "shards", plain().state_dict())
    linked(base)
    before = contents(path.parent)
    assert main(["merge", str(path), str(base), str(base)]) == 1
    assert "model-00002-of-00003.safetensors' is one" in capsys.readouterr().err
    assert contents(path.parent) == before
    out = path.with_name("out")
    assert main(["merge", str(path), str(base), str(out)]) == 0
    assert_same(load(out), merged(path, plain()).state_dict())
    assert not any(file.is_symlink() for file in out.iterdir())
    assert {n: b for n, b in contents(path.parent).items() if n.parts[0] != "out"} == before


@pytest.mark.parametrize("place", ["new", "empty", "base"])
@pytest.mark.parametrize(
    ("step", "call"),
    [("add_update", 6), ("os.fsync", 2), ("shutil.copymode", 2)],  # the last update; a second file
)
def test_what_fails_half_way_leaves_all_as_it_was(path, step, call, place, monkeypatch, capsys):
    base = save_base(path.parent, "shards", plain().state_dict())
    out = {"new": path.with_name("out"), "empty": path.with_name("empty"), "base": base}[place]
    path.with_name("empty").mkdir()
    before = contents(path.parent)
    owner, _, name = step.rpartition(".")
    owner = getattr(merge_files, owner) if owner else merge_files
    inner, calls = getattr(owner, name), []

    def full(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError("no space left on device")
        return inner(*arguments, **keywords)

    monkeypatch.setattr(owner, name, full)
    assert main(["merge", str(path), str(base), str(out)]) == 1
    assert capsys.readouterr().err == "OSError: no space left on device\n"
    assert contents(path.parent) == before


def test_it_is_run_as_a_module(path):
    command = [sys.executable, "-m", "randlora", "verify", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the bases are those of the file" in done.stdout


def test_what_others_put_into_the_folder_stays_after_an_error(path, monkeypatch, capsys):
    base, out = save_base(path.parent, "shards", plain().state_dict()), path.with_name("out")

    def full(*_, **__):
        (out / "notes").mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(merge_files, "add_update", full)
    assert main(["merge", str(path), str(base), str(out)]) == 1
    assert capsys.readouterr().err == "OSError: no space left on device\n"
    assert [file.name for file in out.iterdir()] == ["notes"]


def test_the_base_may_have_any_ending(path):
    base = save_base(path.parent, "file", plain().state_dict())
    blob, out = base.rename(path.with_name("blob")), path.with_name("out.safetensors")
    assert main(["merge", str(path), str(blob), str(out)]) == 0
    assert_same(load(out), merged(path, plain()).state_dict())


def test_a_missing_package_is_an_error_of_the_command(path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["inspect", str(path)]) == 1
    assert "ImportError: a .safetensors file needs the package" in capsys.readouterr().err
