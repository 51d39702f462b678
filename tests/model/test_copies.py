"""An adapter's copies of modules trained in full and of moving buffers."""

import copy

import pytest
import torch
from torch import nn

import randlora
from randlora import disabled, inject, load_adapter, save_adapter, set_adapter
from tests.support.moving import ROWS, X, adapted, dumped, finetune, norms, pretrained, same


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_resnet_that_is_trained_saved_and_loaded_computes_the_same(suffix, tmp_path):
    base = pretrained()
    before, state = base(X), copy.deepcopy(base.state_dict())
    model = finetune(inject(copy.deepcopy(base), rank=2, modules_to_save="fc"))
    after = model(X)
    assert (after - before).abs().max() > 0.1
    path = tmp_path / f"adapter{suffix}"
    save_adapter(model, path)
    # A plain model, one with the same adapter untrained, and one with it trained to other values.
    others = [copy.deepcopy(base), inject(copy.deepcopy(base), rank=2, modules_to_save="fc")]
    others.append(finetune(copy.deepcopy(others[1]), shift=-1.0))
    for other in others:
        assert torch.equal(load_adapter(other, path).eval()(X), after)
        with disabled(other):
            assert torch.equal(other(X), before)
    # Disabled, it is the plain model bit for bit. Merged, it has all of the adapter.
    with disabled(model):
        assert torch.equal(model(X), before)
        model.train()(X + 3)  # the moved statistics are dropped
    assert torch.equal(model.eval()(X), after)
    with disabled(model):
        assert torch.equal(model(X), before)
    for copied in (copy.deepcopy(model), torch.load(dumped(model), weights_only=False)):
        assert torch.equal(copied(X), after)
        assert same(randlora.unload(copied).state_dict(), state)
    merged = randlora.unload(copy.deepcopy(model), merge=True)
    torch.testing.assert_close(merged(X), after)
    assert merged.state_dict().keys() == state.keys()
    assert type(merged.stem[1]) is nn.BatchNorm2d
    plain = copy.deepcopy(base)
    plain.load_state_dict(randlora.merged_state_dict(model))
    assert torch.equal(plain(X), merged(X))
    assert torch.equal(model(X), after)


def test_what_did_not_move_is_not_in_the_file(tmp_path):
    model = inject(pretrained(), rank=2)
    save_adapter(model, tmp_path / "a.pt")
    assert not randlora.checkpoint.read(tmp_path / "a.pt").saved
    finetune(model)
    save_adapter(model, tmp_path / "a.pt")
    moved = randlora.checkpoint.read(tmp_path / "a.pt").saved
    assert {name for name in moved if name.startswith("quantiser")} == {
        "quantiser.mean",
        "quantiser.calls",
    }
    assert "stem.1.running_mean" in moved
    load_adapter(model, tmp_path / "a.pt")


def test_each_adapter_has_its_own_statistics():
    base = pretrained()
    before = base(X)
    model = inject(base, rank=2)
    one = finetune(model)(X)
    inject(model, rank=2, adapter="two")
    assert torch.equal(set_adapter(model, "two")(X), before)
    two = finetune(model, shift=-2.0)(X)
    assert torch.equal(set_adapter(model, "default")(X), one)
    assert torch.equal(set_adapter(model, "two")(X), two)
    # A state_dict holds all adapters, whichever is active in the model that loads it.
    other = inject(inject(pretrained(), rank=2), rank=2, adapter="two")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), one)
    assert torch.equal(set_adapter(other, "two")(X), two)
    alone = inject(pretrained(), rank=2)  # its state_dict does not change the other adapter
    finetune(alone, shift=3.0)
    other.load_state_dict(alone.state_dict())
    assert torch.equal(other(X), two)
    assert torch.equal(set_adapter(other, "default")(X), alone(X))
    randlora.delete_adapter(model, "default")
    assert torch.equal(model(X), two)
    assert not any(name.endswith("bn1.randlora_copy_running_mean") for name in model.state_dict())


def test_a_checkpoint_of_the_plain_model_is_what_adapters_start_from_again():
    base, other = pretrained(), pretrained()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.mul_(2)
    want = other(X)
    model = inject(base, rank=2, modules_to_save="fc")
    assert model.load_state_dict(other.state_dict()).missing_keys == []
    assert torch.equal(model(X), want)
    with disabled(model):
        assert torch.equal(model(X), want)
    assert torch.equal(model.fc.weight, other.fc.weight)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_moves_the_statistics_of_its_adapter():
    model, reference = (inject(pretrained(), rank=2).train() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            compiled(X)
            reference(X)
    assert same(model.state_dict(), reference.state_dict())


def test_statistics_around_layers_put_in_by_hand_are_saved(tmp_path):
    def build():
        torch.manual_seed(0)
        layer = randlora.RandLoRALinear(6, 6, rank=2)
        return nn.Sequential(layer, nn.BatchNorm1d(6, affine=False))

    model = build()
    nn.init.normal_(model[0].randlora_gamma)
    model(ROWS)
    save_adapter(model, tmp_path / "a.pt")
    other = load_adapter(build(), tmp_path / "a.pt")
    assert torch.equal(other.eval()(ROWS), model.eval()(ROWS))


def test_a_trained_adapter_is_not_half_reset_by_a_plain_checkpoint():
    model = adapted(norms(), modules_to_save="3")
    before = {n: t.clone() for n, t in randlora.adapter_state_dict(model).items()}
    model.load_state_dict(norms().double().state_dict())
    assert same(randlora.adapter_state_dict(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_assigned_checkpoint_brings_its_dtype_to_what_it_starts(dtype):
    plain = norms().to(dtype)
    model = inject(norms(), 2, modules_to_save="3")
    model.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(model(ROWS.to(dtype)), plain(ROWS.to(dtype)))
    assert model[3].weight.requires_grad


class Moving(nn.Module):
    """Changes statistics in place, by assignment and by counting, and reads them at once."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("square", torch.ones(6))
        self.register_buffer("count", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.square.mul_(0.9).add_(0.1 * x.detach().square().mean(0))
            self.count += 1
        return (x - self.mean) / self.square.sqrt() * (1 + self.count)


@pytest.mark.parametrize("moving", [Moving, lambda: nn.BatchNorm1d(6, momentum=None)])
def test_disabled_a_module_moves_what_it_reads_as_the_plain_model_does(moving):
    base = nn.Sequential(nn.Linear(6, 6), moving())
    model = adapted(copy.deepcopy(base))
    for _ in range(2):
        plain = copy.deepcopy(base)
        with disabled(model):
            for training in (True, True, False):
                got, want = (m.train(training)(ROWS) for m in (model, plain))
                assert torch.equal(got, want)
    assert same(randlora.unload(model).state_dict(), base.state_dict())


def test_a_sum_of_adapters_averages_statistics():
    model = adapted(norms(), modules_to_save="1")
    model[2].running_var.fill_(0.2)
    inject(model, 2, adapter="b", modules_to_save="1")
    set_adapter(model, "b")[2].running_var.fill_(0.4)
    randlora.unload(model, merge={"default": 1.0, "b": 1.0})
    torch.testing.assert_close(model[2].running_var, torch.full((6,), 0.3))
    assert model(ROWS).isfinite().all()


def test_a_placeholder_that_is_no_number_has_not_moved(tmp_path):
    model = norms()
    model.register_buffer("cache", torch.full((3,), torch.nan))
    save_adapter(inject(model, 2), tmp_path / "a.pt")
    assert not randlora.checkpoint.read(tmp_path / "a.pt").saved


def test_a_buffer_made_when_it_is_needed_comes_along(tmp_path):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", None)

        def forward(self, x):
            if self.mean is None:
                self.mean = x.detach().mean(0)
            return x - self.mean

    build = lambda: nn.Sequential(nn.Linear(6, 6), Late())  # noqa: E731
    torch.manual_seed(0)
    base = build()
    model = adapted(copy.deepcopy(base))
    want = model(ROWS)
    save_adapter(model, tmp_path / "a.pt")
    assert torch.equal(load_adapter(base, tmp_path / "a.pt")(2 * ROWS), model(2 * ROWS))
    assert not torch.equal(model(2 * ROWS), want)
