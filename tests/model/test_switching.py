"""Several named adapters on one model: add, switch and delete them; the others do not change."""

import copy
import pickle

import pytest
import torch
from torch import nn

import randlora
from randlora import adapter_parameters, delete_adapter, inject, set_adapter, summary
from randlora.model.index import adapted_modules

X = torch.linspace(-1, 1, 2 * 5 * 8).reshape(2, 5, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return self.head(x + self.down(self.up(x).relu()))


def plain():
    torch.manual_seed(0)
    return Net()


def shuffle(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model):
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def trained(seed, **keywords):
    """A model with one adapter whose update is not zero."""
    model = inject(plain(), **keywords)
    shuffle(model, seed)
    return model


ONE = {"rank": 3}
TWO = {"rank": 2, "target_modules": ["up", "out_proj"], "alpha": 5, "train_a": True}


def both():
    """A model with two adapters, of which the second is active."""
    model = trained(1, **ONE)
    inject(model, adapter="two", **TWO)
    set_adapter(model, "two")
    shuffle(model, 2)
    return model


@torch.no_grad()
def test_each_adapter_computes_as_if_it_were_alone():
    alone = {"default": trained(1, **ONE)(X), "two": trained(2, **TWO)(X)}
    model = both()
    assert torch.equal(model(X), alone["two"])
    for name in ("default", "two", "default"):
        assert set_adapter(model, name) is model
        assert torch.equal(model(X), alone[name])
    with randlora.disabled(model):
        assert torch.equal(model(X), inject(plain(), **ONE)(X))


def test_adding_one_changes_no_output_and_freezes_it():
    model = trained(1, **ONE)
    before, listed = model(X), adapter_parameters(model)
    assert inject(model, adapter="two", **TWO) is model
    assert torch.equal(model(X), before)
    assert list(map(id, adapter_parameters(model))) == list(map(id, listed))
    grad = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("two_" in name for name in grad)
    assert len(grad) == len(listed)


def test_only_the_active_one_is_trained_and_moves():
    model = both()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    trained_names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained_names == {
        "attention.out_proj.two_randlora_lambda",
        "attention.out_proj.two_randlora_gamma",
        "attention.out_proj.two_randlora_a",
        "up.two_randlora_lambda",
        "up.two_randlora_gamma",
        "up.two_randlora_a",
    }
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(X).square().mean().backward()
    optimiser.step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    assert moved == trained_names


def test_one_bank_serves_all_of_one_recipe():
    model = both()
    assert len(summary(model).banks) == 1
    inject(model, rank=2, adapter="three", seed=9)
    assert [bank.seed for bank in summary(model).banks] == [0, 9]
    mine = randlora.BasisBank("sparse")
    inject(model, rank=2, adapter="four", basis=mine)
    assert summary(model).banks[-1] is mine


def test_the_summary_is_of_the_active_one_and_names_the_others():
    model = both()
    found = summary(model)
    assert found.adapters == ("two", "default")
    assert [layer.name for layer in found.layers] == ["attention.out_proj", "up"]
    assert {(layer.rank, layer.scaling, layer.adapter) for layer in found.layers} == {
        (2, 2.5, "two")
    }
    assert "adapter 'two'; not active: 'default'" in str(found)
    assert (model.up.rank, model.up.scaling) == (2, 2.5)
    with pytest.raises(RuntimeError, match=r"active adapter, 'two', has no update .* 'default'"):
        _ = model.down.rank
    assert repr(model.down) == "RandLoRALinear(in_features=12, out_features=8, bias=True)"


def test_a_deleted_one_is_gone_and_layers_without_another_are_plain():
    model = both()
    state = {n: t.clone() for n, t in trained(2, **TWO).state_dict().items()}
    want = model(X)
    assert delete_adapter(model, "default") is model
    assert torch.equal(model(X), want)
    assert type(model.down) is nn.Linear
    assert type(model.attention) is nn.MultiheadAttention
    assert list(adapted_modules(model)) == ["attention.out_proj", "up"]
    assert summary(model).adapters == ("two",)
    assert {n.replace("two_", "") for n in model.state_dict()} == set(state)
    # Layers with both keep the other adapter; the name of a deleted adapter can be used again.
    inject(model, rank=1, target_modules="down")
    assert set_adapter(model, "default").down.rank == 1


def test_of_several_the_active_one_is_merged_or_unloaded():
    model = both().eval()
    with torch.no_grad():
        want = model(X)
        torch.testing.assert_close(randlora.merge(model)(X), want)
        with pytest.raises(ValueError, match="must not be merged while its adapter is changed"):
            set_adapter(model, "default")
        assert torch.equal(randlora.unmerge(model)(X), want)
        folded = randlora.unload(copy.deepcopy(model), merge=True)
        torch.testing.assert_close(folded(X), want)
        assert list(folded.state_dict()) == list(plain().state_dict())
        assert torch.equal(randlora.unload(model)(X), plain().eval()(X))


def test_copies_and_checkpoints_hold_all_of_them():
    model = both()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("default", "two"):
            assert torch.equal(set_adapter(copied, name)(X), set_adapter(model, name)(X))
    other = inject(inject(plain(), **ONE), adapter="two", **TWO)
    other.load_state_dict(model.state_dict())
    assert torch.equal(set_adapter(other, "two")(X), model(X))
    # A state_dict with one adapter does not change the other.
    before = other.up.two_randlora_gamma.clone()
    other.load_state_dict(trained(3, **ONE).state_dict())
    assert torch.equal(other.up.two_randlora_gamma, before)
    assert torch.equal(set_adapter(other, "default")(X), trained(3, **ONE)(X))


def test_layers_made_by_hand_take_another_one():
    class Mine(randlora.RandLoRALinear):
        pass

    layer = Mine(8, 6, rank=2)
    model = inject(nn.Sequential(layer, nn.Linear(6, 8)), rank=3, adapter="b")
    assert type(layer) is Mine
    assert (layer.rank, set_adapter(model, "b")[0].rank) == (2, 3)
    assert type(delete_adapter(set_adapter(model, "default"), "b")[0]) is Mine
    assert type(model[1]) is nn.Linear


def test_each_adapter_has_its_own_modules_trained_in_full():
    model = inject(plain(), rank=2, modules_to_save="head")
    shuffle(model, 1)
    one, head = model(X), model.head.weight
    assert any(p is head for p in adapter_parameters(model))
    inject(model, rank=2, adapter="b", modules_to_save=["head", "up"])
    inject(model, rank=2, adapter="c")
    assert torch.equal(model(X), one)
    want = plain()(X)
    for name in ("b", "c"):
        set_adapter(model, name)
        torch.testing.assert_close(model(X), want)  # torch's path depends on requires_grad
        trained = {id(p) for p in adapter_parameters(model)}
        assert (id(model.head.weight) in trained) == (name == "b")
    set_adapter(model, "b")
    shuffle(model, 2)
    two = model(X)
    assert torch.equal(set_adapter(model, "default")(X), one)
    assert model.head.weight is head
    assert torch.equal(set_adapter(model, "b")(X), two)
    with randlora.disabled(model):
        torch.testing.assert_close(model(X), want)
    for merge, output in ((True, two), ({"default": 1}, one), (False, want)):
        plain_again = randlora.unload(copy.deepcopy(model), merge=merge)
        torch.testing.assert_close(plain_again(X), output)
        assert plain_again.state_dict().keys() == plain().state_dict().keys()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: inject(m, rank=2), ValueError, "under the name 'default' yet"),
        (lambda m: inject(m, rank=2, adapter="two"), ValueError, "under the name 'two' yet"),
        (lambda m: inject(m, rank=2, adapter="a.b"), ValueError, "adapter must be a name .* 'a.b'"),
        (lambda m: inject(m, rank=2, adapter=""), ValueError, "adapter must be a name .* ''"),
        (lambda m: inject(m, rank=2, adapter=3), TypeError, "adapter must be a name, got 3"),
        (lambda m: set_adapter(m, "three"), ValueError, "one of 'default', 'two', got 'three'"),
        (lambda m: set_adapter(m, None), TypeError, "adapter must be a name, got None"),
        (lambda m: delete_adapter(m, "three"), ValueError, "one of 'default', 'two', got 'three'"),
        (lambda m: delete_adapter(m, "two"), ValueError, "adapter must not be the active one"),
        (lambda m: set_adapter(plain(), "two"), ValueError, "model must be adapted"),
    ],
)
def test_bad_calls_are_refused_and_change_nothing(call, error, message):
    model = both()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    output = model(X)
    with pytest.raises(error, match=message):
        call(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[n].requires_grad == grad for n, (grad, _) in before.items())
    assert torch.equal(model(X), output)


def test_a_name_that_would_hide_an_attribute_is_refused():
    model = plain()
    model.up.b_randlora_gamma = 3
    with pytest.raises(TypeError, match="'up' has an attribute 'b_randlora_gamma'"):
        inject(model, rank=2, adapter="b")
    assert type(model.attention) is nn.MultiheadAttention
