"""Parameters trained beside an adapter are saved with it, or named in an error."""

import copy

import pytest
import torch
from torch import nn

import randlora
from randlora import adapter_parameters, disabled, inject, load_adapter, save_adapter, set_adapter
from tests.support.moving import ROWS, adapted, dumped, norms
from tests.support.small import scripted


def test_what_is_trained_besides_is_not_left_out_in_silence(tmp_path):
    path = tmp_path / "a.safetensors"
    base = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    model = adapted(copy.deepcopy(base))
    model[0].bias.requires_grad_(True)
    model[1].weight.requires_grad_(True)
    with torch.no_grad():
        model[0].bias += 1
        model[1].weight += 1
    with pytest.raises(ValueError, match=r"trains 0\.bias, 1\.weight besides; trained_bes"):
        save_adapter(model, path)
    assert not path.exists()
    save_adapter(model, path, trained_besides=True)
    other = load_adapter(copy.deepcopy(base), path)
    assert torch.equal(other(ROWS), model(ROWS))
    trained = {id(p) for p in adapter_parameters(other)}
    assert {id(other[0].bias), id(other[1].weight)} < trained
    with disabled(other):
        assert torch.equal(other(ROWS), base(ROWS))
    save_adapter(other, path)  # now it is the adapter's own
    again = load_adapter(adapted(copy.deepcopy(base)), path)
    assert torch.equal(again(ROWS), model(ROWS))
    for copied in (copy.deepcopy(again), torch.load(dumped(again), weights_only=False)):
        assert torch.equal(copied(ROWS), model(ROWS))
    merged = randlora.unload(again, merge=True)
    torch.testing.assert_close(merged(ROWS), model(ROWS))
    assert [type(m) for m in merged] == [type(m) for m in base]
    save_adapter(model, path, trained_besides=False)
    assert not torch.allclose(load_adapter(copy.deepcopy(base), path)(ROWS), model(ROWS))
    model[0].base_weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trains 0\.weight beside an update of it"):
        save_adapter(model, path, trained_besides=True)
    with pytest.raises(TypeError, match="trained_besides must be True, False or None, got 'x'"):
        save_adapter(model, path, trained_besides="x")


def test_parts_with_different_active_adapters_are_not_saved_as_one(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inject(nn.Sequential(model[0]), 2, adapter="a")
    inject(nn.Sequential(model[1]), 2, adapter="b")
    calls = (
        lambda: save_adapter(model, tmp_path / "a.pt"),
        lambda: randlora.adapter_state_dict(model),
        lambda: adapter_parameters(model),
        lambda: randlora.merged_state_dict(model),
        lambda: inject(model, 2, adapter="c"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"one active adapter, but has 'a' .*'0'.*'b'.*'1'"):
            call()
    assert [layer.adapter for layer in randlora.summary(model).layers] == ["a", "b"]
    save_adapter(model, tmp_path / "a.pt", adapter="a")
    load_adapter(set_adapter(model, "a"), tmp_path / "a.pt", adapter="a")


def test_what_was_trained_besides_is_remembered_when_another_adapter_comes(tmp_path):
    base = norms()
    model = inject(copy.deepcopy(base), 2)
    model[1].weight.requires_grad_(True)
    with torch.no_grad():
        model[1].weight += 1
    inject(model, 2, adapter="b")
    assert not model[1].weight.requires_grad
    with pytest.raises(ValueError, match=r"trains 1\.weight besides"):
        save_adapter(model, tmp_path / "a.pt", adapter="default")
    save_adapter(model, tmp_path / "a.pt", adapter="b")
    save_adapter(model, tmp_path / "a.pt", adapter="default", trained_besides=True)
    other = load_adapter(copy.deepcopy(base), tmp_path / "a.pt")
    assert torch.equal(other(ROWS), model(ROWS))
    assert not any("besides" in n for m in randlora.unload(model).modules() for n in vars(m))


def test_parts_compiled_by_torchscript_are_left_alone(tmp_path):
    model, other = (nn.Sequential(scripted(), nn.Linear(8, 4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    inject(model, 2, target_modules="1")
    nn.init.normal_(model[1].randlora_gamma)
    save_adapter(model, tmp_path / "a.pt")
    load_adapter(other, tmp_path / "a.pt")
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))
    assert list(randlora.merged_state_dict(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
