"""Adapter files give the same outputs everywhere, and load completely or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import (
    CheckpointError,
    inject,
    load_adapter,
    save_adapter,
    set_adapter,
)
from tests.support.adapters import (
    CHOICES,
    TOKENS,
    plain,
    same,
    snapshot,
    trained,
)
from tests.support.rows import shuffled

OWN_A = {"train_a": True}
GOLDEN = Path(__file__).parents[1] / "golden"


@torch.no_grad()
@pytest.mark.parametrize(
    "keywords",
    [*({"basis": kind} for kind in ("dense", "sparse", "very_sparse", "isometric")), OWN_A],
    ids=str,
)
def test_a_plain_model_becomes_the_one_that_was_saved(path, keywords):
    model = trained(**keywords)
    save_adapter(model, path)
    other = plain()
    assert load_adapter(other, path) is other
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert str(randlora.summary(other)) == str(randlora.summary(model))
    one, two = snapshot(model), snapshot(other)
    assert {n: grad for n, (grad, _) in one[1].items()} == {n: g for n, (g, _) in two[1].items()}
    assert one[2].keys() == two[2].keys()
    assert all(torch.equal(t, two[2][n]) for n, t in one[2].items())
    # Load again, into a model that has this adapter already.
    shuffled(other)
    before = {n: i for n, (_, i) in snapshot(other)[1].items()}
    load_adapter(other, path)
    assert {n: i for n, (_, i) in snapshot(other)[1].items()} == before
    assert torch.equal(other(TOKENS), model(TOKENS))
    # Load into a model with another adapter.
    several = inject(plain(), rank=1, adapter="first")
    load_adapter(several, path, adapter="second")
    assert torch.equal(set_adapter(several, "second")(TOKENS), model(TOKENS))
    save_adapter(several, path, adapter="second")
    assert torch.equal(load_adapter(plain(), path)(TOKENS), model(TOKENS))


FRESH = """
import sys, torch
sys.path.insert(0, {root!r})
from randlora import inject, load_adapter, set_adapter
from tests.support.adapters import TOKENS, plain
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
    root = str(Path(__file__).parents[2])
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
    model = trained(**OWN_A)
    save_adapter(model, path, dtype=dtype)
    other = load_adapter(plain(), path)
    numbers = randlora.adapter_state_dict(model)
    for name, tensor in randlora.adapter_state_dict(other).items():
        copied = "randlora_copy" in name
        stored = numbers[name] if copied else numbers[name].to(dtype).float()
        assert torch.equal(tensor, stored)
        assert tensor.dtype == numbers[name].dtype


@pytest.mark.parametrize("keywords", [{}, OWN_A], ids=str)
def test_a_merged_model_saves_and_loads(path, keywords):
    model = randlora.merge(trained(**keywords))
    save_adapter(model, path)
    want = model(TOKENS)
    other = randlora.merge(inject(plain(), **CHOICES, **keywords))
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
    model = load_adapter(golden_model(), GOLDEN / name)
    torch.testing.assert_close(
        model(torch.linspace(-1, 1, 6)), torch.load(GOLDEN / "output.pt"), rtol=1e-6, atol=1e-6
    )


def header(path):
    """The header of a .pt file."""
    return json.loads(torch.load(path, weights_only=True)["randlora"])


def test_a_file_says_that_a_is_trained_only_where_it_is(tmp_path):
    """Versions that cannot train A read all other files, and refuse this one."""
    known = header(GOLDEN / "adapter.pt")
    names = {frozenset(choice) for choice in known["choices"]}
    save_adapter(trained(), tmp_path / "a.pt")
    save_adapter(trained(**OWN_A), tmp_path / "b.pt")
    frozen, own = header(tmp_path / "a.pt"), header(tmp_path / "b.pt")
    assert (known["format"], frozen["format"], own["format"]) == (1, 1, 2)
    assert {frozenset(choice) for choice in frozen["choices"]} == names
    assert {frozenset(choice) - {"train_a"} for choice in own["choices"]} == names
    assert all(choice["train_a"] is True for choice in own["choices"])


def test_adapters_with_and_without_an_a_of_their_own_are_saved_from_one_model(tmp_path):
    model = inject(trained(), adapter="own", **{**CHOICES, **OWN_A})
    shuffled(model)
    outputs = {name: set_adapter(model, name)(TOKENS) for name in ("default", "own")}
    assert not torch.allclose(*outputs.values())
    other = plain()
    for name in outputs:
        save_adapter(model, tmp_path / f"{name}.pt", adapter=name)
        load_adapter(other, tmp_path / f"{name}.pt", adapter=name)
    for name, output in outputs.items():
        assert torch.equal(set_adapter(other, name)(TOKENS), output)


def golden_model():
    """A model whose numbers do not depend on a random generator."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.linspace(-1, 1, parameter.numel())
            parameter.copy_(values.reshape(parameter.shape))
    return model


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
    model = trained(**OWN_A).double()
    with torch.no_grad():
        for parameter in (model.conv.randlora_gamma, model.conv.randlora_a):
            parameter.add_(1e-12)
    save_adapter(model, path)
    other = load_adapter(plain().double(), path)
    assert other.conv.randlora_gamma.dtype == torch.float64
    assert other.conv.randlora_a.dtype == torch.float64
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_link_stays_a_link_and_a_mode_a_mode(path):
    real = path.with_name(f"real{path.suffix}")
    real.touch(0o600)
    path.symlink_to(real)
    save_adapter(trained(), path)
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    load_adapter(plain(), real)


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
    else:  # the damaged byte of the .pt archive has no meaning
        assert path.suffix == ".pt" or damaged == whole
        assert torch.equal(model(TOKENS), trained()(TOKENS))
        WHOLE[path.suffix] = whole, plain()


CRASHES = """
import gc, os, signal, sys, warnings
sys.path.insert(0, {root!r})
warnings.simplefilter("ignore")
import torch
from randlora import load_adapter, save_adapter
from tests.support.adapters import TOKENS, plain, trained
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
    root = str(Path(__file__).parents[2])
    code = CRASHES.format(root=root, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # some crashes left an unfinished temporary file
