"""Injection into models of unusual classes, wrapped ones, and on another default device."""

import abc
import copy
import typing
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import randlora
from randlora import disabled, inject, load_adapter, save_adapter
from tests.support.moving import (
    ROWS,
    X,
    adapted,
    dumped,
    finetune,
    norms,
    pretrained,
    same,
    shuffle,
)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("basis", ["dense", "very_sparse", "isometric", "peft"])
def test_no_call_hangs_on_the_default_device(basis, device, tmp_path):
    base = pretrained()
    path = tmp_path / "a.pt"
    with torch.device(device):
        model = inject(copy.deepcopy(base), rank=2, basis=basis, modules_to_save="fc")
    shuffle(model)
    with torch.device(device):
        save_adapter(model, path)
        other = load_adapter(copy.deepcopy(base), path)
        for act in (randlora.merge, randlora.unmerge, copy.deepcopy):
            act(other)
        assert torch.equal(other(X), model(X))
        randlora.unload(other, merge=True)


class Plugin(nn.Linear):
    registered: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, *, name):
        cls.registered.append(cls)


class Named(Plugin, name="named"):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("cls", [Plugin, Named])
def test_a_class_that_wants_something_of_its_subclasses_is_adapted(cls):
    model = adapted(nn.Sequential(cls(6, 6)))
    assert Plugin.registered == [Named]
    for copied in (copy.deepcopy(model), torch.load(dumped(model), weights_only=False)):
        assert torch.equal(copied(ROWS), model(ROWS))
    assert type(randlora.unload(model)[0]) is cls


def wrapped_in_parts(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "a part compiled": wrapped_in_parts,
    "data parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(wrapped_in_parts(model)), backend="eager"),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_of_the_plain_model_whatever_is_around_it(wrap, tmp_path):
    base = pretrained()
    model = finetune(inject(copy.deepcopy(base), rank=2, modules_to_save="fc"))
    want = model(X)
    save_adapter(model, tmp_path / "a.pt")
    around = WRAPPERS[wrap](model)
    save_adapter(around, tmp_path / "b.pt")
    one, two = (randlora.checkpoint.read(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert one.header() == two.header()
    assert one.tensors().keys() == two.tensors().keys()
    assert randlora.merged_state_dict(around).keys() == base.state_dict().keys()
    other = copy.deepcopy(base)
    load_adapter(WRAPPERS[wrap](other), tmp_path / "b.pt")
    with torch.no_grad():  # the compiler gives no warning then
        assert torch.equal(other(X), want)
    again = copy.deepcopy(base)
    inject(WRAPPERS[wrap](again), rank=2, target_modules="blocks.0.conv1", modules_to_save=[])
    assert [layer.name for layer in randlora.summary(again).layers] == ["blocks.0.conv1"]


def test_a_head_that_is_left_frozen_is_warned_of():
    message = "'fc' looks like the output head of a new task, .* modules_to_save='fc' trains it"
    with pytest.warns(UserWarning, match=message) as caught:
        inject(pretrained(), rank=2)
    assert caught[0].filename == __file__
    for keywords in ({"modules_to_save": "fc"}, {"modules_to_save": []}, {"target_modules": ".*"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            inject(pretrained(), rank=2, **keywords)


def test_an_alpha_of_zero_is_refused():
    for make in (
        lambda: inject(pretrained(), rank=2, alpha=0),
        lambda: randlora.RandLoRALinear(6, 6, rank=2, alpha=0.0),
    ):
        with pytest.raises(ValueError, match="alpha must not be 0"):
            make()


def test_injection_takes_the_gradients_of_what_it_freezes():
    model = norms()
    model(ROWS).sum().backward()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    inject(model, 2)
    optimiser.step()
    assert same(randlora.unload(model).state_dict(), before)


class Abstract(abc.ABC, nn.Linear):
    pass


class Generic(typing.Generic[typing.TypeVar("T")], nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x):
        return self.scale * x


class Mixed(abc.ABC, Generic):
    pass


class Mapping(dict, nn.Linear):
    __hash__ = nn.Module.__hash__

    def __init__(self):
        nn.Linear.__init__(self, 6, 6)


class Slots(nn.Module):
    __slots__ = ("extra",)

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(6))


@pytest.mark.parametrize("modules_to_save", [[], ["1", "2"]])
def test_classes_with_bases_of_another_layout_are_adapted(modules_to_save):
    model = nn.Sequential(Abstract(6, 6), Generic(), Mixed(), Slots(), Mapping())
    model.append(torch.ao.quantization.FakeQuantize())
    plain = copy.deepcopy(model)
    inject(model, 2, modules_to_save=modules_to_save)
    with torch.no_grad():
        model[1].scale.mul_(2)
    shuffle(model)
    for copied in (copy.deepcopy(model), torch.load(dumped(model), weights_only=False)):
        assert torch.equal(copied[:3](ROWS), model[:3](ROWS))
    assert isinstance(model[0], Abstract)
    with disabled(model):
        assert torch.equal(model[:3](ROWS), plain[:3](ROWS))
    assert [type(m) for m in randlora.unload(model)] == [type(m) for m in plain]


def test_a_class_whose_objects_cannot_be_changed_is_refused_before_anything_is(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 6), Slots())
    possible = randlora.model.installing.can_become
    monkeypatch.setattr(
        randlora.model.installing,
        "can_become",
        lambda cls, made: cls is not Slots and possible(cls, made),
    )
    with pytest.raises(TypeError, match=r"'1' cannot be an adapter's: .* class, Slots"):
        inject(model, 2)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_the_merged_state_is_that_of_the_plain_model_whatever_names_there_are():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return torch.ones(1)

        def set_extra_state(self, state):
            pass

    plain = nn.Sequential(nn.Linear(6, 6), Extra(6, 6))
    plain[1].register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({f"{prefix}weight.absmax": 1})
    )
    model = adapted(copy.deepcopy(plain))
    model[0] = checkpoint_wrapper(model[0])
    state = randlora.merged_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    assert torch.equal(state["0.weight"], model[0]._checkpoint_wrapped_module.weight)


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = pretrained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'fc' looks like"):
            inject(model, 2)
    assert type(model.stem[0]) is nn.Conv2d
    assert all(p.requires_grad for p in model.parameters())
