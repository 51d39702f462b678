"""Adapters as files: the same outputs anywhere, and nothing half loaded."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import checkpoint, inject, load_adapter, save_adapter, set_adapter, summary
from randlora.checkpoint import (
    BaseModelError,
    BasesError,
    CheckpointError,
    FileError,
    MismatchError,
)
from tests.test_contract import Experts, shuffled

SUFFIXES = (".safetensors", ".pt")
TOKENS = torch.arange(10).reshape(2, 5)


class Net(nn.Module):
    """Weights of many kinds, and a head to be trained in full, with a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts, self.conv = Experts(), nn.Conv1d(8, 6, 1)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.experts(x + self.attention(x, x, x)[0])
        return self.head(self.norm(self.conv(x.transpose(1, 2))).mean(2))


def plain(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


CHOICES = {
    "rank": {"attention": 3, ".*": 2},
    "target_modules": ["embed", "attention", "conv"],
    "target_parameters": ["up", "down"],
    "modules_to_save": ["norm", "head"],
    "basis": "sparse",
    "alpha": 3,
    "seed": 5,
}


def trained(**keywords):
    model = inject(plain(), **{**CHOICES, **keywords})
    shuffled(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "randlora_copy" in name:
                tensor.add_(1)
    return model


def snapshot(model):
    return (
        {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()},
        {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()},
        {n: t.clone() for n, t in model.state_dict().items()},
    )


def same(one, other):
    return one[:2] == other[:2] and all(torch.equal(t, other[2][n]) for n, t in one[2].items())


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    return tmp_path / f"adapter{request.param}"


# --- there and back ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse", "isometric"])
def test_a_plain_model_becomes_the_one_that_was_saved(path, basis):
    model = trained(basis=basis)
    save_adapter(model, path)
    other = plain()
    assert load_adapter(other, path) is other
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert str(randlora.summary(other)) == str(randlora.summary(model))
    one, two = snapshot(model), snapshot(other)
    assert {n: grad for n, (grad, _) in one[1].items()} == {n: g for n, (g, _) in two[1].items()}
    assert one[2].keys() == two[2].keys()
    assert all(torch.equal(t, two[2][n]) for n, t in one[2].items())
    # Again, into what is so already.
    shuffled(other)
    before = {n: i for n, (_, i) in snapshot(other)[1].items()}
    load_adapter(other, path)
    assert {n: i for n, (_, i) in snapshot(other)[1].items()} == before
    assert torch.equal(other(TOKENS), model(TOKENS))
    # And as one of several.
    several = inject(plain(), rank=1, adapter="first")
    load_adapter(several, path, adapter="second")
    assert torch.equal(set_adapter(several, "second")(TOKENS), model(TOKENS))
    save_adapter(several, path, adapter="second")
    assert torch.equal(load_adapter(plain(), path)(TOKENS), model(TOKENS))


FRESH = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.test_checkpoint import *
model = plain()  # whose numbers do not depend on what follows
for name in ("conv", "attention", "embed"):  # in another order
    model.add_module(name, model._modules.pop(name))
torch.set_default_dtype(torch.float64)
torch.manual_seed(99)
inject(model, rank=4, target_modules=["conv"], seed=8, adapter="another")
load_adapter(model, {path!r}, adapter="it")
torch.save(set_adapter(model, "it")(TOKENS), {out!r})
"""


def test_in_a_fresh_process_it_is_the_same_to_the_bit(path, tmp_path):
    model, out = trained(), tmp_path / "out.pt"
    save_adapter(model, path)
    root = str(Path(__file__).parent.parent)
    code = FRESH.format(root=root, path=str(path), out=str(out))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert torch.equal(torch.load(out), model(TOKENS))


def test_what_it_holds_by_name():
    model = trained()
    state = randlora.adapter_state_dict(model)
    full = model.state_dict()
    assert state.keys() == {n for n in full if "randlora" in n}
    assert {n.replace("randlora_copy_", "") for n in state if "randlora_copy" in n} == {
        n for n in full if n.startswith(("norm.", "head.")) and "randlora" not in n
    }
    assert all(t.data_ptr() == full[n].data_ptr() for n, t in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_stored_in_the_dtype_asked_for(path, dtype):
    model = trained()
    save_adapter(model, path, dtype=dtype)
    other = load_adapter(plain(), path)
    numbers = randlora.adapter_state_dict(model)
    for name, tensor in randlora.adapter_state_dict(other).items():
        copied = "randlora_copy" in name
        stored = numbers[name] if copied else numbers[name].to(dtype).float()
        assert torch.equal(tensor, stored)
        assert tensor.dtype == numbers[name].dtype


def test_a_merged_model_saves_and_loads(path):
    model = randlora.merge(trained())
    save_adapter(model, path)
    want = model(TOKENS)
    other = randlora.merge(inject(plain(), **CHOICES))
    assert torch.equal(load_adapter(other, path)(TOKENS), want)


def test_a_base_in_another_dtype_is_the_same_base(path):
    save_adapter(trained(), path)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = load_adapter(plain().to(dtype), path)
        assert model.conv.randlora_gamma.dtype == torch.float32


def test_a_file_of_48_blocks_is_the_numbers_and_little_more(path):
    class Block(nn.Module):
        def __init__(self, d=96):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, nn.Linear(d, d))
            self.gate_proj, self.up_proj = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d)
            self.down_proj = nn.Linear(2 * d, d)

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList()})})
    model["model"]["layers"].extend(Block() for _ in range(48))
    inject(model, rank=6)
    save_adapter(model, path)
    bytes_trained = sum(p.numel() * 4 for p in randlora.adapter_parameters(model))
    assert 0 < path.stat().st_size - bytes_trained <= 64 * 2**10


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.pt"])
def test_files_written_once_go_on_loading(name):
    golden = Path(__file__).parent / "golden"
    model = load_adapter(golden_model(), golden / name)
    torch.testing.assert_close(
        model(torch.linspace(-1, 1, 6)), torch.load(golden / "output.pt"), rtol=1e-6, atol=1e-6
    )


def golden_model():
    """A model of numbers that no generator makes."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.linspace(-1, 1, parameter.numel())
            parameter.copy_(values.reshape(parameter.shape))
    return model


# --- what does not fit ---------------------------------------------------------------------------


def rewrite(path, change):
    """A file that is whole, but says something else."""
    contents = checkpoint.read(path)
    contents = change(contents)
    header = contents.header()
    tensors = {name: t.contiguous() for name, t in contents.tensors().items()}
    write(path, header, tensors)


def write(path, header, tensors, checksum=None):
    header["checksum"] = checksum or checkpoint._checksum(header, tensors)
    text = json.dumps(header)
    if path.suffix == ".pt":
        torch.save({"randlora": text, **checkpoint._packed(tensors)}, path)
    else:
        safetensors.torch.save_file(tensors, path, {"randlora": text})


def with_header(**changes):
    def act(path):
        contents = checkpoint.read(path)
        tensors = {name: t.contiguous() for name, t in contents.tensors().items()}
        write(path, {**contents.header(), **changes}, tensors)

    return act


def renamed(old, new):
    """An update for another weight, or with None for none."""

    def change(contents):
        def names(table):
            pairs = ((n.replace(old, new) if new else n, v) for n, v in table.items())
            return {n: v for n, v in pairs if new or old not in n}

        updates = names(contents.updates)
        kept = [i for i, n in enumerate(sorted(contents.updates)) if new or old not in n]
        numbers = names(contents.numbers)
        return replace(contents, updates=updates, numbers=numbers, base=contents.base[kept])

    return lambda path: rewrite(path, change)


def one_number(value):
    def change(contents):
        first = next(iter(contents.numbers.values()))
        first.view(-1)[0] = value
        return contents

    return lambda path: rewrite(path, change)


def with_bank(bank):
    return lambda path: rewrite(path, lambda c: replace(c, banks=(bank,)))


def with_settings(**changes):
    def change(contents):
        updates = {n: (s, replace(t, **changes), b) for n, (s, t, b) in contents.updates.items()}
        return replace(contents, updates=updates)

    return lambda path: rewrite(path, change)


def flipped(path):
    data, numbers = bytearray(path.read_bytes()), checkpoint.read(path).numbers
    data[data.index(next(iter(numbers.values())).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def foreign(path):
    if path.suffix == ".pt":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        safetensors.torch.save_file({"weight": torch.zeros(3)}, path)


class Evil:
    """What would run when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def evil(path):
    path.write_bytes(pickle.dumps(Evil()))


def directory(path):
    path.unlink()
    path.mkdir()


def same_checksum(path):
    """A header that was changed, with the checksum it had."""
    contents = checkpoint.read(path)
    tensors = {name: t.contiguous() for name, t in contents.tensors().items()}
    header = contents.header()
    checksum = checkpoint._checksum(header, tensors)
    header["choices"][0]["scaling"] = 99.0
    write(path, header, tensors, checksum)


def without_saved(path):
    rewrite(path, lambda c: replace(c, saved={n: t for n, t in c.saved.items() if "bias" not in n}))


def other_saved(path):
    rewrite(
        path, lambda c: replace(c, saved={n: t[:1] if t.ndim else t for n, t in c.saved.items()})
    )


def rewriting(change):
    """Other tensors under the same header."""

    def act(path):
        contents = checkpoint.read(path)
        tensors = {name: t.contiguous() for name, t in contents.tensors().items()}
        change(tensors)
        write(path, contents.header(), tensors)

    return act


def with_choice(**changes):
    """Other choices for the convolution."""

    def act(path):
        contents = checkpoint.read(path)
        header = contents.header()
        place = header["places"][sorted(contents.updates).index("conv.weight")]
        header["choices"][place].update(changes)
        write(path, header, {name: t.contiguous() for name, t in contents.tensors().items()})

    return act


def without_digest(path):
    contents = checkpoint.read(path)
    header = contents.header()
    del header["banks"][0]["digest"]
    write(path, header, {name: t.contiguous() for name, t in contents.tensors().items()})


TAMPERED = {
    "empty": (lambda p: p.write_bytes(b""), FileError, "not a whole file"),
    "truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), FileError, "not a whole file"),
    "short of a byte": (lambda p: os.truncate(p, p.stat().st_size - 1), FileError, "."),
    "a flipped bit": (flipped, FileError, "."),
    "text": (lambda p: p.write_text("not an adapter"), FileError, "not a whole file"),
    "of something else": (foreign, FileError, "not a whole file"),
    "code": (evil, FileError, "not a whole file"),
    "a directory": (directory, FileError, "is a directory"),
    "an old checksum": (same_checksum, FileError, "changed or damaged"),
    "a newer format": (with_header(format=2), FileError, "is of format 2; this version reads 1"),
    "no choices": (with_header(choices=[]), FileError, "of another making"),
    "negative places": (with_header(places=[-1] * 6), FileError, "there is no place -1 among"),
    "no bases": (with_header(bases=None), BasesError, "bases of version None"),
    "no digest": (without_digest, FileError, "of another making"),
    "modules of no names": (with_header(modules_to_save=[["a"]]), FileError, "must be names"),
    "the model trained in full": (
        with_header(modules_to_save=["", "norm", "head"]),
        MismatchError,
        "has a module ''",
    ),
    "a layer trained in full and adapted": (
        with_header(modules_to_save=["conv", "norm", "head"]),
        MismatchError,
        "'conv.weight' cannot be adapted and trained in full",
    ),
    "a tensor too many": (
        rewriting(lambda t: t.update({"randlora.bases.9.evil": torch.ones(2)})),
        FileError,
        "of another making",
    ),
    "numbers that are integers": (
        rewriting(lambda t: t.update({"conv.weight": t["conv.weight"].long()})),
        FileError,
        "'conv.weight' is no update",
    ),
    "scaling of no number": (with_choice(scaling="x"), FileError, "scaling must be a number"),
    "infinite scaling": (with_choice(scaling=1e999), FileError, "scaling must be finite"),
    "a rank asked for of no number": (with_choice(asked_rank=None), FileError, "asked_rank must"),
    "newer bases": (with_header(bases=2), BasesError, "bases of version 2"),
    "no number": (one_number(float("nan")), FileError, "not finite"),
    "infinite": (one_number(float("inf")), FileError, "not finite"),
    "another seed": (
        with_bank(randlora.BasisBank("sparse", seed=6)),
        BasesError,
        "not those of the file|in the file, here",
    ),
    "another kind": (
        with_bank(randlora.BasisBank("binary", seed=5)),
        BasesError,
        "not those of the file|in the file, here",
    ),
    "another sparsity": (
        with_bank(randlora.BasisBank("sparse", seed=5, sparsity=7)),
        BasesError,
        "not those of the file|in the file, here",
    ),
    "an update too many": (renamed("conv.", "conv1."), MismatchError, "the model has no 'conv1'"),
    "another parameter": (
        renamed("conv.weight", "conv.kernel"),
        MismatchError,
        "kernel of .*Conv1d is neither",
    ),
    "other sizes": (
        with_choice(in_=9),
        MismatchError,
        "as 6 x 9, but the model has it as 6 x 8",
    ),
    "something saved is missing": (without_saved, MismatchError, "the file has nothing for"),
    "something saved of other sizes": (other_saved, MismatchError, "of shape"),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", TAMPERED)
def test_what_does_not_fit_is_refused_and_changes_nothing(path, name, adapted, monkeypatch):
    monkeypatch.chdir(path.parent)
    tamper, error, message = TAMPERED[name]
    save_adapter(trained(), path)
    tamper(path)
    model = trained() if adapted else plain()
    before = snapshot(model)
    with pytest.raises(error, match=message) as caught:
        load_adapter(model, path)
    assert type(caught.value) is error
    assert isinstance(caught.value, CheckpointError)
    assert same(snapshot(model), before)
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    ("tamper", "error", "message"),
    [
        (renamed("conv.", None), MismatchError, "the file has no update for 'conv.weight'"),
        (with_settings(scaling=2.0), MismatchError, "the update of .* scaling=2.0"),
        (with_settings(dropout=0.5), MismatchError, "the update of .* dropout=0.5"),
    ],
)
def test_an_adapted_model_must_be_the_files_in_all_but_numbers(path, tamper, error, message):
    model = trained()
    save_adapter(model, path)
    tamper(path)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_adapter(model, path)
    assert same(snapshot(model), before)
    load_adapter(plain(), path)  # a plain one becomes so


def test_an_adapted_model_must_train_the_same_modules_in_full(path):
    with_head, without = trained(), trained(modules_to_save=None)
    for file, model in ((with_head, trained(modules_to_save=None)), (without, trained())):
        save_adapter(file, path)
        before = snapshot(model)
        with pytest.raises(MismatchError, match="must train the same modules in full"):
            load_adapter(model, path)
        assert same(snapshot(model), before)


def tied():
    model = plain()
    model.other = model.conv
    return model


def two_convolutions():
    model = plain()
    model.other = nn.Conv1d(8, 6, 1)
    return model


def in_inference_mode():
    with torch.inference_mode():
        return plain()


def on_meta():
    model = plain()
    model.conv.to("meta")
    return model


@pytest.mark.parametrize(
    ("source", "model", "keywords", "message"),
    [
        (two_convolutions, tied, {"target_modules": ["conv", "other"], "rank": 2}, "one weight of"),
        (plain, in_inference_mode, {}, "an inference tensor"),
        (plain, on_meta, {}, "'conv.weight' is on the meta device"),
    ],
)  # fmt: skip
def test_models_that_cannot_take_an_adapter(source, model, keywords, message, path):
    file = inject(source(), **{**CHOICES, **keywords})
    save_adapter(file, path)
    model = model()
    before = snapshot(model)
    with pytest.raises(MismatchError, match=message):
        load_adapter(model, path, check_base=False)
    assert [n for n, _ in before[0].items() if before[0][n] != snapshot(model)[0][n]] == []
    assert before[1] == snapshot(model)[1]


def test_what_could_not_be_loaded_is_not_written(path):
    def huge(model):
        model.conv.randlora_gamma.fill_(3.4e38)

    def no_number(model):
        model.head.bias.fill_(torch.nan)

    path.write_text("before")
    for spoil, message in ((huge, "finite updates"), (no_number, "'head.bias' has some")):
        model = trained()
        with torch.no_grad():
            spoil(model)
        with pytest.raises(ValueError, match=message):
            save_adapter(model, path, dtype=torch.bfloat16)
    model = nn.ModuleDict({"randlora": nn.ModuleDict({"saved": nn.Linear(3, 3)})})
    with pytest.raises(ValueError, match=r"no weight called 'randlora\.saved\.weight'"):
        save_adapter(inject(model, 2), path)
    assert path.read_text() == "before"


def test_masks_with_infinities_and_tied_weights_are_trained_in_full(path):
    def build():
        model = plain()
        model.head.register_buffer("mask", torch.full((3,), -torch.inf))
        model.head.twin = model.norm
        return model

    model = inject(build(), **CHOICES)
    save_adapter(model, path)
    other = load_adapter(build(), path)
    assert torch.equal(other.head.mask, model.head.mask)
    assert other.head.twin.weight is other.norm.weight


def test_numbers_in_double_precision_stay_so(path):
    model = trained().double()
    with torch.no_grad():
        model.conv.randlora_gamma.add_(1e-12)
    save_adapter(model, path)
    other = load_adapter(plain().double(), path)
    assert other.conv.randlora_gamma.dtype == torch.float64
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_link_stays_a_link_and_a_mode_a_mode(path):
    real = path.with_name(f"real{path.suffix}")
    real.touch(0o600)
    path.symlink_to(real)
    save_adapter(trained(), path)
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    load_adapter(plain(), real)


def test_a_model_adapted_otherwise_is_refused(path):
    save_adapter(trained(), path)
    for keywords, error in [
        ({"target_modules": ["embed", "attention"]}, MismatchError),
        ({"rank": 1}, MismatchError),
        ({"basis": "dense"}, BasesError),
        ({"seed": 6}, BasesError),
    ]:
        model = inject(plain(), **{**CHOICES, **keywords})
        before = snapshot(model)
        with pytest.raises(error):
            load_adapter(model, path)
        assert same(snapshot(model), before)


def test_another_base_model_is_refused_unless_it_is_meant(path):
    save_adapter(trained(), path)
    model = plain(seed=1)
    before = snapshot(model)
    with pytest.raises(BaseModelError, match=r"another base model: 'attention\.in_proj_weight'"):
        load_adapter(model, path)
    assert same(snapshot(model), before)
    load_adapter(model, path, check_base=False)
    assert len(summary(model).layers) == 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: save_adapter(m, "a.bin"), ValueError, "path must end in .safetensors or .pt"),
        (lambda m: save_adapter(m, 3), TypeError, "path must be a path, got 3 of type int"),
        (lambda m: save_adapter(m, "a.pt", adapter="b"), ValueError, "one of 'default', got 'b'"),
        (lambda m: save_adapter(m, "a.pt", dtype=torch.int8), TypeError, "dtype must be torch.flo"),
        (lambda m: save_adapter(plain(), "a.pt"), ValueError, "model must be adapted"),
        (lambda m: save_adapter(m, "nowhere/a.pt"), FileNotFoundError, "nowhere"),
        (lambda m: load_adapter(m, "a.pt"), FileNotFoundError, "a.pt"),
        (lambda m: load_adapter({}, "a.pt"), TypeError, "model must be an nn.Module, got dict"),
        (lambda m: load_adapter(m, "a.pt", adapter="b c"), ValueError, "adapter must be a name"),
        (lambda m: load_adapter(m, "a.pt", check_base=1), TypeError, "check_base must be True or"),
        (lambda m: randlora.adapter_state_dict(m, adapter="b"), ValueError, "got 'b'"),
    ],
)
def test_bad_calls_are_refused_and_write_nothing(call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        call(trained())
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_not_written(path):
    model = trained()
    save_adapter(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        model.conv.randlora_gamma[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"finite updates .* 'conv.weight'"):
        save_adapter(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


WHOLE = {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_half_loads_runs_or_hangs(path, data):
    if path.suffix not in WHOLE:
        save_adapter(trained(), path)
        WHOLE[path.suffix] = path.read_bytes(), plain()
    whole, model = WHOLE[path.suffix]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        damaged[place] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    path.write_bytes(damaged)
    before = snapshot(model)
    try:
        load_adapter(model, path)
    except CheckpointError:
        assert same(snapshot(model), before)
    else:  # a byte that says nothing, of the archive that .pt is
        assert path.suffix == ".pt" or damaged == whole
        assert torch.equal(model(TOKENS), trained()(TOKENS))
        WHOLE[path.suffix] = whole, plain()


CRASHES = """
import gc, os, signal, sys, warnings
sys.path.insert(0, {root!r})
warnings.simplefilter("ignore")
from tests.test_checkpoint import *
torch.set_num_threads(1)  # so that the process can be forked
gc.disable()  # its calls would be counted

def save(until=None):
    # Dies at one of the calls and returns of saving; gives which of these begin to write, and end.
    begin = count = 0

    def event(frame, kind, arg):
        nonlocal begin, count
        count += 1
        if not begin and frame.f_code.co_name == "replacing":
            begin = count
        if count == until:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(event)
    save_adapter(model, {path!r})
    sys.setprofile(None)
    return begin, count

model = trained()
want = model(TOKENS)
save()  # what is done once for all
begin, end = save()
for crash in range(50):
    writer = os.fork()
    if not writer:
        save(begin + (end - begin) * crash // 50)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(writer, 0)[1])
    assert torch.equal(load_adapter(plain(), {path!r})(TOKENS), want)
print(len(os.listdir(os.path.dirname({path!r}))) - 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks as POSIX does")
def test_fifty_crashes_while_saving_never_lose_what_was_there(path):
    root = str(Path(__file__).parent.parent)
    code = CRASHES.format(root=root, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # some died with a file half written beside
