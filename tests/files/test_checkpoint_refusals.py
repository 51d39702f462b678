"""Files that are damaged or do not fit a model raise an error and do not change the model."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import randlora
from randlora import (
    BaseModelError,
    BasesError,
    CheckpointError,
    FileError,
    MismatchError,
    inject,
    load_adapter,
    save_adapter,
    summary,
)
from randlora.files import checkpoint
from tests.support.adapters import (
    CHOICES,
    plain,
    rewrite,
    same,
    snapshot,
    trained,
    with_bank,
    write,
)


def with_header(**changes):
    def act(path):
        contents = checkpoint.read(path)
        tensors = {name: t.contiguous() for name, t in contents.tensors().items()}
        write(path, {**contents.header(), **changes}, tensors)

    return act


def renamed(old, new):
    """Rename the weight of an update, or drop the update if ``new`` is None."""

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
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def evil(path):
    path.write_bytes(pickle.dumps(Evil()))


def directory(path):
    path.unlink()
    path.mkdir()


def same_checksum(path):
    """Write a changed header with the old checksum."""
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
    """Write changed tensors with the same header."""

    def act(path):
        contents = checkpoint.read(path)
        tensors = {name: t.contiguous() for name, t in contents.tensors().items()}
        change(tensors)
        write(path, contents.header(), tensors)

    return act


def with_choice(**changes):
    """Write other settings for the convolution."""

    def act(path):
        contents = checkpoint.read(path)
        header = contents.header()
        place = header["places"][sorted(contents.updates).index("conv.weight")]
        header["choices"][place].update(changes)
        write(path, header, {name: t.contiguous() for name, t in contents.tensors().items()})

    return act


def with_own_a(tamper):
    """Change the file of an adapter that trains A, in place of the given one."""

    def act(path):
        save_adapter(trained(train_a=True), path)
        tamper(path)

    return act


def without_digest(path):
    contents = checkpoint.read(path)
    header = contents.header()
    del header["banks"][0]["digest"]
    write(path, header, {name: t.contiguous() for name, t in contents.tensors().items()})


CONV_A = "randlora.a.conv.weight"
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
    "a newer format": (
        with_header(format=3),
        FileError,
        "is of format 3; this version reads 1 and 2",
    ),
    "no choices": (with_header(choices=[]), FileError, "does not write"),
    "negative places": (with_header(places=[-1] * 6), FileError, "there is no place -1 among"),
    "no bases": (with_header(bases=None), BasesError, "bases of version None"),
    "no digest": (without_digest, FileError, "does not write"),
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
        "does not write",
    ),
    "numbers that are integers": (
        rewriting(lambda t: t.update({"conv.weight": t["conv.weight"].long()})),
        FileError,
        "'conv.weight' is not an update",
    ),
    "scaling of no number": (with_choice(scaling="x"), FileError, "scaling must be a number"),
    "infinite scaling": (with_choice(scaling=1e999), FileError, "scaling must be finite"),
    "a rank asked for of no number": (with_choice(asked_rank=None), FileError, "asked_rank must"),
    "a trained A is missing": (
        with_own_a(rewriting(lambda t: t.pop(CONV_A))),
        FileError,
        r"'conv.weight' needs an A of shape \(2, 6\)",
    ),
    "a trained A of other sizes": (
        with_own_a(rewriting(lambda t: t.update({CONV_A: torch.ones(6, 2)}))),
        FileError,
        r"'conv.weight' needs an A of shape \(2, 6\)",
    ),
    "a trained A of a stack without the stack": (
        with_own_a(rewriting(lambda t: t.update({"randlora.a.experts.up": torch.ones(2, 8)}))),
        FileError,
        r"'experts.up' needs an A of shape \(3, 2, 8\)",
    ),
    "a trained A of integers": (
        with_own_a(rewriting(lambda t: t.update({CONV_A: t[CONV_A].long()}))),
        FileError,
        "'conv.weight' needs an A",
    ),
    "a trained A with no number": (
        with_own_a(rewriting(lambda t: t[CONV_A].fill_(torch.nan))),
        FileError,
        f"values in '{CONV_A}' that are not finite",
    ),
    "a trained A that the settings deny": (
        rewriting(lambda t: t.update({CONV_A: torch.ones(2, 6)})),
        FileError,
        "'conv.weight' needs an A of .* if it trains A, else none",
    ),
    "a trained A of no update": (
        with_own_a(rewriting(lambda t: t.update({"randlora.a.conv1.weight": torch.ones(2, 6)}))),
        FileError,
        "'randlora.a.conv1.weight' is the A of no update",
    ),
    "settings that promise a trained A": (with_choice(train_a=True), FileError, "needs an A of"),
    "a train_a of no truth value": (
        with_choice(train_a=0),
        FileError,
        "train_a must be True or False, got 0",
    ),
    "newer bases": (with_header(bases=2), BasesError, "bases of version 2"),
    "no number": (one_number(float("nan")), FileError, "not finite"),
    "infinite": (one_number(float("inf")), FileError, "not finite"),
    "another seed": (
        with_bank(randlora.BasisBank("sparse", seed=6)),
        BasesError,
        "not those of the file|in the file, but .* model's adapter; give adapter= another name",
    ),
    "another kind": (
        with_bank(randlora.BasisBank("binary", seed=5)),
        BasesError,
        "not those of the file|in the file, but .* model's adapter; give adapter= another name",
    ),
    "another sparsity": (
        with_bank(randlora.BasisBank("sparse", seed=5, sparsity=7)),
        BasesError,
        "not those of the file|in the file, but .* model's adapter; give adapter= another name",
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
        (with_settings(scaling=2.0), MismatchError, "the update of .* has scaling=2 in the file"),
        (
            with_settings(dropout=0.5),
            MismatchError,
            "the update of .* has dropout=0.5 in the file, but dropout=0 ",
        ),
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
    load_adapter(plain(), path)  # a plain model is adapted by it


@pytest.mark.parametrize("train_a", [False, True])
def test_an_adapted_model_must_train_a_as_the_file_does(path, train_a):
    save_adapter(trained(train_a=train_a), path)
    model = trained(train_a=not train_a)
    before = snapshot(model)
    message = f"has train_a={train_a} in the file, but train_a={not train_a} in the model's"
    with pytest.raises(MismatchError, match=message):
        load_adapter(model, path)
    assert same(snapshot(model), before)
    load_adapter(model, path, adapter="another")


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

    def huge_a(model):
        model.conv.randlora_a.fill_(3.4e38)

    path.write_text("before")
    for spoil, message in (
        (huge, "finite updates"),
        (huge_a, "finite updates .* 'conv.weight'"),
        (no_number, "'head.bias' has some"),
    ):
        model = trained(train_a=True)
        with torch.no_grad():
            spoil(model)
        with pytest.raises(ValueError, match=message):
            save_adapter(model, path, dtype=torch.bfloat16)
    for name in ("saved", "a"):
        model = nn.ModuleDict({"randlora": nn.ModuleDict({name: nn.Linear(3, 3)})})
        with pytest.raises(ValueError, match=rf"no weight called 'randlora\.{name}\.weight'"):
            save_adapter(inject(model, 2), path)
    assert path.read_text() == "before"


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
