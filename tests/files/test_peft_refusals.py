"""Refused: folders that PEFT did not write, and adapters that PEFT cannot represent."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import randlora
from randlora import (
    FileError,
    MismatchError,
    inject,
)
from randlora.bases.peft_rule import PeftBank
from tests.support.adapters import same, snapshot
from tests.support.peft import TALL, Mlp, edit, mlp, theirs

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT gives many warnings

TAMPERED = {
    "another method": (FileError, lambda c, t: c.update(peft_type="LORA")),
    "no method": (FileError, lambda c, t: c.pop("peft_type")),
    "trained biases": (FileError, lambda c, t: c.update(bias="all")),
    "no rank": (FileError, lambda c, t: c.pop("r")),
    "a rank of no number": (FileError, lambda c, t: c.update(r="4")),
    "another rank": (FileError, lambda c, t: c.update(r=3)),
    "a seed of no number": (FileError, lambda c, t: c.update(projection_prng_key=None)),
    "a dropout of 2": (FileError, lambda c, t: c.update(randlora_dropout=2)),
    "an alpha of no number": (FileError, lambda c, t: c.update(randlora_alpha="x")),
    "targets of no names": (FileError, lambda c, t: c.update(target_modules=5)),
    "targets of no pattern": (FileError, lambda c, t: c.update(target_modules="(")),
    "more targets": (MismatchError, lambda c, t: c["target_modules"].append("head")),
    "no lambda": (FileError, lambda c, t: t.pop(TALL + "lambda")),
    "no gamma": (FileError, lambda c, t: t.pop(TALL + "gamma")),
    "neither": (MismatchError, lambda c, t: (t.pop(TALL + "lambda"), t.pop(TALL + "gamma"))),
    "nothing": (FileError, lambda c, t: t.clear()),
    "a layer too many": (
        MismatchError,
        lambda c, t: t.update(
            {f"base_model.model.x.randlora_{n}": torch.ones(4, 4) for n in ("lambda", "gamma")}
        ),
    ),
    "a foreign tensor": (FileError, lambda c, t: t.update(other=torch.ones(2))),
    "a base weight": (
        MismatchError,
        lambda c, t: t.update({"base_model.model.head.weight": torch.ones(2, 3)}),
    ),
    "not a number": (FileError, lambda c, t: t[TALL + "gamma"].view(-1)[3:4].fill_(torch.nan)),
    "other shapes": (MismatchError, lambda c, t: t.update({TALL + "gamma": torch.ones(3, 9)})),
    "transposed": (MismatchError, lambda c, t: t.update({TALL + "lambda": torch.ones(3, 4)})),
    "several bases": (FileError, lambda c, t: t[TALL + "B"].add_(1)),
    "one base": (FileError, lambda c, t: [t.pop(n) for n in list(t) if n.endswith("_B")]),
    "no bases": (FileError, lambda c, t: [t.pop(n) for n in list(t) if n[-2:] in ("_A", "_B")]),
    "bases of any size": (
        FileError,
        lambda c, t: t.update(
            {
                n: torch.ones(10**9, 0) if n[-1] == "B" else torch.ones(4, 1, 10**5)
                for n in t
                if n[-2:] in ("_A", "_B")
            }
        ),
    ),
    "bases too small": (
        FileError,
        lambda c, t: t.update({n: v[:20].clone() for n, v in t.items() if n.endswith("_B")}),
    ),
    "bases of another rank": (
        FileError,
        lambda c, t: t.update({n: v[:2].clone() for n, v in t.items() if n.endswith("_A")}),
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_folder_that_was_changed_is_refused(name, tmp_path):
    error, change = TAMPERED[name]
    theirs("mlp", 4).save_pretrained(tmp_path)
    edit(tmp_path, change)
    plain, so_already = mlp(), inject(mlp(), 4, alpha=640, basis="peft")
    for model in (plain, so_already):
        before = snapshot(model)
        with pytest.raises(error):
            randlora.peft.load_adapter(model, tmp_path)
        assert same(snapshot(model), before)


def test_paths_and_files_that_are_not_there(tmp_path):
    with pytest.raises(TypeError, match="folder must be a path, got 3"):
        randlora.peft.load_adapter(mlp(), 3)
    with pytest.raises(TypeError, match="model must be"):
        randlora.peft.load_adapter(None, tmp_path)
    with pytest.raises(FileError, match="folder must be a folder"):
        randlora.peft.load_adapter(mlp(), tmp_path / "none")
    with pytest.raises(OSError, match="adapter_config"):
        randlora.peft.load_adapter(mlp(), tmp_path)
    theirs("mlp", 4).save_pretrained(tmp_path)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    for cut in (0, 8, len(whole) // 2, len(whole) - 1):
        (tmp_path / "adapter_model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(FileError, match="no whole adapter"):
            randlora.peft.load_adapter(mlp(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="adapter_model"):
        randlora.peft.load_adapter(mlp(), tmp_path)


class WithConv(Mlp):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3)


REFUSED = {
    "other bases": (lambda: inject(mlp(), 4), "one bank, of a kind of PEFT's"),
    "other layers": (
        lambda: inject(WithConv(), 2, basis="peft"),
        "of linear layers and Conv1D only.*'conv.weight' in a RandLoRAConv1d",
    ),
    "fewer bases": (lambda: inject(mlp(), 4, num_bases=2, basis="peft"), "ceil.*'tall.weight'"),
    "a trained A": (
        lambda: inject(mlp(), 4, basis="peft", train_a=True),
        "must share a frozen A, .* but 'tall.weight' trains its own",
    ),
    "a name that ends another's": (
        lambda: inject(copy.copy(nested()), 4, basis="peft", modules_to_save="head"),
        "modules_to_save must be the only ones.*'other_head'",
    ),
    "a plain model": (mlp, "must be adapted"),
}


def nested():
    model = mlp()
    model.other_head = nn.Linear(3, 3)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_could_not_have_made_is_not_written(name, tmp_path):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        randlora.peft.save_adapter(build(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_several_alphas_are_not_written(tmp_path):
    model = inject(mlp(), 4, basis="peft")
    update = model.tall._randlora.active_updates["weight"]
    update.settings = replace(update.settings, scaling=2.0)
    with pytest.raises(ValueError, match="one scaling and one dropout"):
        randlora.peft.save_adapter(model, tmp_path)


def test_arguments_of_injection_and_banks_are_checked():
    with pytest.raises(TypeError, match="rank must be"):
        inject(mlp(), {"tall": 4, ".*": 3}, basis="peft")
    with pytest.raises(ValueError, match="basis must be"):
        inject(mlp(), 4, basis="pef")
    bank = PeftBank(rank=4, smaller=12, larger=24)
    with pytest.raises(ValueError, match=r"must fit a layer of rank 4, p=24"):
        inject(mlp(), 4, basis=bank)
    with pytest.raises(ValueError, match=r"must fit a layer of rank 3"):
        inject(mlp(), 3, basis=bank, target_modules="narrow")
    for keywords, message in (
        ({"kind": "dense"}, "kind must be one of peft"),
        ({"dtype": "float32"}, "dtype must be one of"),
        ({"smaller": 30}, "smaller must be at most larger=24"),
        ({"rank": 0}, "rank must be"),
        ({"seed": -1}, "seed must be"),
        ({"entries": (torch.ones(4, 12), torch.ones(24, 11))}, "entries must be"),
        ({"entries": (torch.ones(4, 12), torch.ones(24, 12)), "kind": "peft_sparse"}, "entries"),
    ):
        with pytest.raises(ValueError, match=message):
            PeftBank(**{"rank": 4, "smaller": 12, "larger": 24, **keywords})
