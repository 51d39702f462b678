"""Adapted modules keep the attributes, subclasses and state of their authors."""

import copy
import pickle

import pytest
import torch
from torch import nn

import randlora
from randlora import inject
from randlora.model.index import adapted_modules
from randlora.modules import table
from randlora.modules.adapted import AdaptedModule
from randlora.modules.weight_update import A_START
from tests.support.cases import assert_close
from tests.support.rows import (
    Scaled,
    shuffled,
)
from tests.support.small import adapted


def test_a_subclass_has_the_handler_of_its_class():
    class Wider(nn.Conv2d):
        pass

    model = inject(nn.Sequential(Wider(3, 4, 3), Scaled(9, 4)), rank=2, target_modules=["0", "1"])
    assert isinstance(model[0], Wider)
    assert isinstance(model[1], table.RandLoRAEmbedding)
    assert [m._randlora_base for m in model] == [Wider, Scaled]


@pytest.mark.parametrize("train_a", [False, True])
def test_a_model_made_anew_on_another_device_is_what_a_fresh_one_is(train_a):
    """`reset_parameters` initialises all base weights, and all updates to ΔW = 0."""
    for build, reset in [
        (lambda: nn.Linear(8, 12), "reset_parameters"),
        (lambda: nn.Conv2d(3, 4, 3), "reset_parameters"),
        (lambda: nn.MultiheadAttention(8, 2), "_reset_parameters"),
        (lambda: nn.LSTM(8, 6), "reset_parameters"),
        (lambda: nn.Embedding(9, 4), "reset_parameters"),
        (lambda: Scaled(9, 4), "reset_parameters"),
    ]:
        model = inject(build(), rank=2, target_modules=".*|", train_a=train_a)
        shuffled(model)
        with torch.no_grad():
            for module in model.modules():
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.fill_(7)
        model.to("meta").to_empty(device="cpu")
        for module in model.modules():
            again = getattr(module, reset if module is model else "reset_parameters", None)
            if again is not None:
                again()
        for path, module in adapted_modules(model).items():
            for name, adapter in module._randlora.active_updates.items():
                base = module._parameters[name]
                assert torch.equal(getattr(module, name), base), (path, name)
                assert 0 < base.std() < 2
                lam, gamma, *own = adapter.parameters(module)
                assert torch.equal(lam, lam[:1, :1].expand_as(lam))
                assert not gamma.count_nonzero()
                assert len(own) == train_a
                assert all(torch.equal(a, A_START * adapter.bank.a(*a.shape)) for a in own)


def test_attributes_of_a_module_are_its_authors():
    class Own(nn.Conv1d):
        base_class = "mine"

        def __init__(self):
            super().__init__(4, 4, 1)
            self.choice, self.rank, self.scaling = "mine", "mine", "mine"

    model = adapted(Own())
    for _ in range(2):
        one = model[0]
        assert {one.choice, one.rank, one.scaling, one.base_class} == {"mine"}
        if isinstance(one, AdaptedModule):
            randlora.unload(model)


def test_what_one_adapter_trains_in_full_another_may_update():
    x = torch.randn(3, 8)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    want = plain(x)
    model = inject(plain, 2, modules_to_save="0")
    inject(model, 2, adapter="b")
    inject(model, 2, adapter="c", target_modules="0", modules_to_save="1")
    outputs = {}
    for name in ("default", "b", "c"):
        randlora.set_adapter(model, name)
        assert torch.equal(model(x), want)
        for parameter in randlora.adapter_parameters(model):
            nn.init.normal_(parameter)
        outputs[name] = model(x)
    for name, output in outputs.items():
        assert torch.equal(randlora.set_adapter(model, name)(x), output)
        assert_close(randlora.merge(model).eval()(x), output, 1e-5)
        randlora.unmerge(model).train()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), output)
    with randlora.disabled(model):
        assert torch.equal(model(x), want)


def test_a_module_that_guards_its_attributes_is_adapted_and_given_back():
    class Guarded(nn.Conv1d):
        ready = False

        def __setattr__(self, name, value):
            if self.ready:
                raise AttributeError("frozen")
            super().__setattr__(name, value)

    module = Guarded(4, 4, 1)
    vars(module)["ready"] = True
    model = adapted(nn.Sequential(nn.Linear(4, 4), module))
    assert isinstance(module, AdaptedModule)
    randlora.unload(model)
    assert type(module) is Guarded


def test_half_an_adapter_of_a_model_does_not_load():
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)))
    linear = ["0.0.randlora_lambda", "0.0.randlora_gamma"]
    for keys in (linear, ["0.1.in_proj_weight_randlora_lambda"]):
        state = model.state_dict()
        for key in keys:
            del state[key]
        with pytest.raises(RuntimeError, match=f"Missing key.*{keys[0]}"):
            model.load_state_dict(state)
