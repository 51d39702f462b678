"""An adapter is everything that its training changed, and nothing of it goes astray unnoticed.

Modules trained in full, statistics that move, what is disabled where, what is assigned, computed
again or trained besides.
"""

import _thread
import abc
import asyncio
import copy
import io
import threading
import typing
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointError, checkpoint

import randlora
from randlora import adapter_parameters, disabled, inject, load_adapter, save_adapter, set_adapter

X = torch.linspace(-2, 2, 8 * 3 * 6 * 6).reshape(8, 3, 6, 6).sin()
CLASSES = torch.arange(8) % 4


class Block(nn.Module):
    """A residual block that works in place, as torchvision's do."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += x
        return self.relu(h)


class Quantiser(nn.Module):
    """Moves a buffer by assigning to it, as exponential averages often do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(6), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
            self.calls += 1
        return x - self.mean.view(-1, 1, 1)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.quantiser = Quantiser()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        h = self.quantiser(self.blocks(self.stem(x)))
        return self.fc(h.mean((2, 3)))


def pretrained():
    torch.manual_seed(0)
    model = ResNet()
    for _ in range(3):
        model(X)
    return model.eval()


def finetune(model, steps=3, shift=1.0):
    model.train()
    optimiser = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(X + shift), CLASSES).backward()
        optimiser.step()
    return model.eval()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


# --- statistics that move ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_resnet_that_is_trained_saved_and_loaded_computes_the_same(suffix, tmp_path):
    base = pretrained()
    before, state = base(X), copy.deepcopy(base.state_dict())
    model = finetune(inject(copy.deepcopy(base), rank=2, modules_to_save="fc"))
    after = model(X)
    assert (after - before).abs().max() > 0.1
    path = tmp_path / f"adapter{suffix}"
    save_adapter(model, path)
    # A plain model, one that is adapted so, and one that has been trained to something else.
    others = [copy.deepcopy(base), inject(copy.deepcopy(base), rank=2, modules_to_save="fc")]
    others.append(finetune(copy.deepcopy(others[1]), shift=-1.0))
    for other in others:
        assert torch.equal(load_adapter(other, path).eval()(X), after)
        with disabled(other):
            assert torch.equal(other(X), before)
    # The plain model is there to the bit; merged, nothing of the adapter is lost.
    with disabled(model):
        assert torch.equal(model(X), before)
        model.train()(X + 3)  # what this moves is forgotten
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


def dumped(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


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
    # A checkpoint of all holds all, whichever is active where it is loaded.
    other = inject(inject(pretrained(), rank=2), rank=2, adapter="two")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), one)
    assert torch.equal(set_adapter(other, "two")(X), two)
    alone = inject(pretrained(), rank=2)  # a checkpoint of one leaves the other alone
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


# --- disabled ------------------------------------------------------------------------------------


def adapted(modules=None, **keywords):
    torch.manual_seed(0)
    model = modules or nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    inject(model, **{"rank": 2, **keywords})
    shuffle(model)
    return model


def shuffle(model):
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)


ROWS = torch.linspace(-1, 1, 18).reshape(3, 6)


def test_disabled_may_be_left_in_any_order():
    model = adapted(modules_to_save="1")
    with disabled(model):
        plain = model(ROWS)
    want = model(ROWS)
    one, other = disabled(model), disabled(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(model(ROWS), plain)
    other.__exit__(None, None, None)
    assert torch.equal(model(ROWS), want)

    def twice():
        with disabled(model):
            yield model(ROWS)
            yield model(ROWS)

    first, second = twice(), twice()
    next(first)
    next(second)
    first.close()
    assert torch.equal(next(second), plain)
    second.close()
    assert torch.equal(model(ROWS), want)


def test_disabled_left_in_another_thread_is_left():
    model = adapted()
    want = model(ROWS)
    context = disabled(model)
    context.__enter__()
    run(lambda: context.__exit__(None, None, None))
    assert torch.equal(model(ROWS), want)


def run(what):
    results = []
    thread = threading.Thread(target=lambda: results.append(what()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_disabled_holds_in_its_context_and_goes_into_no_copy():
    model = adapted(modules_to_save="1")
    want = model(ROWS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with disabled(model):
        plain = model(ROWS)
        assert not torch.equal(plain, want)
        assert torch.equal(run(lambda: model(ROWS)), want)
        with torch.no_grad():
            assert torch.equal(compiled(ROWS), plain)
            assert torch.equal(run(lambda: torch.no_grad()(compiled)(ROWS)), want)
        copies = copy.deepcopy(model), torch.load(dumped(model), weights_only=False)
        assert all(torch.equal(copied(ROWS), want) for copied in copies)
    assert all(torch.equal(copied(ROWS), want) for copied in copies)
    with torch.no_grad():
        assert torch.equal(compiled(ROWS), want)

    async def task(wait, within):
        await asyncio.sleep(wait)
        if not within:
            return model(ROWS)
        with disabled(model):
            await asyncio.sleep(0)
            return model(ROWS)

    async def both():
        return await asyncio.gather(task(0, True), task(0, False), task(0, True))

    outputs = asyncio.run(both())
    assert [torch.equal(y, plain) for y in outputs] == [True, False, True]
    assert torch.equal(outputs[1], want)


# --- assigning -----------------------------------------------------------------------------------


def halve(model):
    model[0].weight = nn.Parameter(model[0].weight * 0.5)


def register(model):
    model[0].register_parameter("weight", nn.Parameter(model[0].weight.detach()))


def fuse(model):
    conv = nn.utils.fusion.fuse_linear_bn_eval(model[0], nn.BatchNorm1d(6).eval())
    return conv(ROWS)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("assign", [halve, register, fuse])
def test_a_weight_computed_from_the_effective_one_cannot_be_assigned(assign, merged):
    model = adapted().eval()
    if merged:
        randlora.merge(model)
    want = model(ROWS)
    with pytest.raises(RuntimeError, match=r"weight of a RandLoRALinear is W0 \+ ΔW"):
        assign(model)
    assert torch.equal(model(ROWS), want)
    randlora.unload(model, merge=True)
    assign(model)


@pytest.mark.parametrize("build", [lambda: nn.Linear(6, 6), lambda: nn.Conv1d(6, 6, 1)])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_adapted_cannot_be_parametrized_afterwards(build, name):
    model = adapted(nn.Sequential(build(), nn.Linear(6, 6)))
    inject(model, rank=2, modules_to_save="0", adapter="two")  # with a copy of the bias
    x = ROWS.T.expand(2, 6, 3)[:, :, :1] if isinstance(model[0], nn.Conv1d) else ROWS
    want = model[0](x)
    for put in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        with pytest.raises(RuntimeError, match=f"{name} of a .* cannot be deleted or parametrized"):
            put(model[0], name) if name == "weight" else delattr(model[0], name)
        assert torch.equal(model[0](x), want)


def test_what_torch_assigns_is_the_frozen_weight():
    model, other = adapted(), adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    shuffle(other)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(model(ROWS), other(ROWS))
    try:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch.testing.assert_close(model(ROWS.double()), other.double()(ROWS.double()))
    model[0].weight = model[0].base_weight  # it is what it is, as where weights are tied again
    with disabled(model):
        model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    assert torch.equal(model[0].base_weight, torch.zeros(6, 6).double())
    with pytest.raises(TypeError, match="cannot assign"):
        model[0].weight = torch.zeros(6, 6)


def test_a_parameter_assigned_to_a_module_trained_in_full_is_what_is_trained():
    model = adapted(modules_to_save="1")
    with disabled(model):
        plain = model(ROWS)
    model[1].weight = nn.Parameter(torch.zeros(6, 6))
    assert torch.equal(model(ROWS), model[1].bias.expand(3, 6))
    assert any(p is model[1].weight for p in adapter_parameters(model))
    with disabled(model):
        assert torch.equal(model(ROWS), plain)
    model[1].reset_parameters()
    with disabled(model):
        assert torch.equal(model[1].weight, model[1].randlora_copy_weight)


# --- computed again ------------------------------------------------------------------------------


def two():
    model = adapted(num_bases=1)
    inject(model, rank=2, num_bases=1, adapter="two")
    set_adapter(model, "two")
    shuffle(model)
    return set_adapter(model, "default")


@pytest.mark.parametrize("before", ["nothing", "the other"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_a_part_is_not_computed_again_with_another_adapter(reentrant, before, read):
    model = two()
    part = (lambda x: F.linear(x, model[1].weight)) if read else model
    x = ROWS.clone().requires_grad_()
    if before == "the other":  # which might be taken for what this part was computed with
        set_adapter(model, "two")
        checkpoint(part, x, use_reentrant=reentrant).sum().backward()
        set_adapter(model, "default")
    y = checkpoint(part, x, use_reentrant=reentrant)
    set_adapter(model, "two")
    with pytest.raises((RuntimeError, CheckpointError), match=r"computed again|metadata"):
        y.sum().backward()
    set_adapter(model, "default")
    y = checkpoint(part, x, use_reentrant=reentrant)
    with disabled(model), pytest.raises((RuntimeError, CheckpointError), match="computed again"):
        y.sum().backward()
    # And as it was it gives the gradients.
    x.grad = None
    checkpoint(part, x, use_reentrant=reentrant).sum().backward()
    (want,) = torch.autograd.grad(part(x).sum(), x)
    assert torch.equal(x.grad, want)


def test_a_reference_without_the_adapter_does_not_disturb_a_checkpoint():
    for reentrant in (False, True):
        model = adapted()
        x = ROWS.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant)
        with disabled(model), torch.no_grad():
            reference = checkpoint(model, x, use_reentrant=reentrant)
        (y - reference).square().sum().backward()
        assert x.grad.count_nonzero()


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimiser_does_not_move_what_was_switched_off(optimiser):
    model = two()
    parameters = adapter_parameters(model)
    step = optimiser(parameters, lr=0.1).step
    model(ROWS).sum().backward()
    before = [p.detach().clone() for p in parameters]
    set_adapter(model, "two")
    step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


# --- trained besides -----------------------------------------------------------------------------


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


# --- traps ---------------------------------------------------------------------------------------


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


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["bias", "randlora_gamma"])
def test_a_parametrization_of_another_tensor_comes_through_unloading(name, merge):
    model = adapted()
    parametrize = nn.utils.parametrize
    before = model(ROWS)
    with disabled(model):
        plain = model(ROWS)
    parametrize.register_parametrization(model[0], name, Double())
    want = model(ROWS)
    assert not torch.allclose(want, before)
    assert len({id(p) for p in adapter_parameters(model)}) == 4
    with disabled(model):
        assert torch.equal(model(ROWS), plain) == (name != "bias")
        plain = model(ROWS)
    randlora.unload(model, merge=merge)
    torch.testing.assert_close(model(ROWS), want if merge else plain)
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(model[0], randlora.adapted.Adapted)
    assert parametrize.is_parametrized(model[0]) == (name == "bias")
    if name == "bias":
        parametrize.remove_parametrizations(model[0], "bias")
        torch.testing.assert_close(model(ROWS), want if merge else plain)
    assert type(model[0]) is nn.Linear
    assert vars(model[0]).keys() == vars(nn.Linear(6, 6)).keys()


@pytest.mark.parametrize("basis", ["peft", "peft_sparse", "peft_very_sparse"])
def test_bases_that_cannot_be_normalised_are_refused(basis):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="basis must be of another kind for layers this small"):
        inject(model, rank=1, basis=basis)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


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
    with torch.no_grad():  # of which the compiler does not warn
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


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.ones(3, 12, 6)), nn.Parameter(torch.ones(3, 6))


def test_stacks_that_stay_frozen_are_named():
    model = nn.ModuleDict({"l": nn.Linear(6, 6), "a": Experts(), "b": Experts()})
    found = randlora.summary(inject(model, rank=2))
    why = "a stack of matrices, 3 x 12 x 6, which target_parameters adapts"
    assert found.left_out == {"a.gate_up": why, "b.gate_up": why}
    assert f"left out: a.gate_up ({why}), and 1 more such" in str(found)
    model = nn.ModuleDict({"l": nn.Linear(6, 6), "a": Experts()})
    found = randlora.summary(inject(model, rank=2, target_parameters="gate_up"))
    assert not found.left_out


def test_a_rank_report_can_be_of_some_layers():
    model = adapted()
    (layer,) = randlora.rank_report(model, "1")
    assert layer.name == "1"
    assert [layer.name for layer in randlora.rank_report(model)] == ["0", "1"]
    with pytest.raises(ValueError, match="target_modules='2' matches no module"):
        randlora.rank_report(model, "2")
    with pytest.raises(ValueError, match="target_modules must match an adapted layer, but"):
        randlora.rank_report(model, lambda name, module: False)


# --- what a review found -------------------------------------------------------------------------


def norms():
    torch.manual_seed(0)
    parts = nn.Linear(6, 6), nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Linear(6, 6)
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("names", [("1",), ("2",), ("3",)])
@pytest.mark.parametrize("other", ["another adapter", "none"])
def test_what_is_trained_in_full_is_not_computed_again_with_another_adapter(other, names):
    model = inject(norms(), 2, target_modules="0", modules_to_save=names)
    inject(model, 2, target_modules="0", modules_to_save=names, adapter="b")
    shuffle(set_adapter(model, "b"))
    part = model[int(names[0])]
    x = ROWS.clone().requires_grad_()
    set_adapter(model, "default")
    y = checkpoint(part, x, use_reentrant=False)
    if other == "none":
        with disabled(model):
            with torch.no_grad():
                checkpoint(part, x, use_reentrant=False)  # as a reference, which is no evidence
            with pytest.raises(CheckpointError, match=r"metadata|different number"):
                y.sum().backward()
        return
    set_adapter(model, "b")
    with torch.no_grad():
        part(x)
    with pytest.raises(CheckpointError, match="metadata"):
        y.sum().backward()
    checkpoint(part, x, use_reentrant=False).add_(1).sum().backward()
    (want,) = torch.autograd.grad(part(x).sum(), x)
    assert torch.equal(x.grad, want)


def test_a_hook_of_backward_may_look_at_the_plain_model():
    model, seen = adapted(), []

    def hook(parameter):
        with disabled(model), torch.no_grad():
            seen.append(model(ROWS))

    model[0].randlora_gamma.register_post_accumulate_grad_hook(hook)
    model(ROWS).sum().backward()
    with disabled(model):
        assert torch.equal(seen[0], model(ROWS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_disabled_is_so_in_threads_that_are_not_pythons(reentrant):
    model = adapted()
    x = ROWS.clone().requires_grad_()
    model(x)
    with disabled(model):
        (want,) = torch.autograd.grad(model(x).sum(), x)
        y = checkpoint(model, x, use_reentrant=reentrant)
        # As each device has one for its part of backward.
        done = threading.Event()
        _thread.start_new_thread(lambda: (y.sum().backward(), done.set()), ())
        assert done.wait(60)
    assert torch.equal(x.grad, want)


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
    """Moves statistics in place, by assigning and by counting, and reads them at once."""

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
    randlora.add_weighted_adapter(model, {"default": 1.0, "b": 1.0}, "c")
    for summed in (
        set_adapter(copy.deepcopy(model), "c"),
        randlora.unload(copy.deepcopy(model), merge={"default": 1.0, "b": 1.0}),
    ):
        torch.testing.assert_close(summed[2].running_var, torch.full((6,), 0.3))
        assert summed(ROWS).isfinite().all()


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
    possible = randlora.injection.can_become
    monkeypatch.setattr(
        randlora.injection, "can_become", lambda cls, made: cls is not Slots and possible(cls, made)
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


def test_a_placeholder_that_is_no_number_has_not_moved(tmp_path):
    model = norms()
    model.register_buffer("cache", torch.full((3,), torch.nan))
    save_adapter(inject(model, 2), tmp_path / "a.pt")
    assert not randlora.checkpoint.read(tmp_path / "a.pt").saved


def test_what_is_set_to_none_is_none():
    model = adapted(norms(), modules_to_save="3")
    with disabled(model):
        plain = model(ROWS)
    model[3].bias = None
    model[2].running_mean = model[2].running_var = None
    assert model[3].bias is None
    assert model(ROWS).isfinite().all()
    with disabled(model):
        assert torch.equal(model(ROWS), plain)
    with pytest.raises(ValueError, match=r"'2\.running_mean' was set to None"):
        save_adapter(model, "a.pt")


def test_a_buffer_registered_again_is_the_adapters():
    model = adapted(norms())
    with disabled(model):
        plain = model(ROWS)
    model[2].register_buffer("running_mean", torch.full((6,), 9.0))
    assert torch.equal(model[2].running_mean, torch.full((6,), 9.0))
    with disabled(model):
        assert torch.equal(model(ROWS), plain)


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


def test_a_module_made_of_an_adapted_ones_class_is_plain():
    model = inject(norms(), 2)
    made = type(model[2])(6).double()
    assert made.state_dict().keys() == nn.BatchNorm1d(6).state_dict().keys()
    assert torch.equal(made(ROWS.double()), nn.BatchNorm1d(6).double()(ROWS.double()))
    model[2] = made.float()
    assert randlora.unload(model)[2] is made


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = pretrained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'fc' looks like"):
            inject(model, 2)
    assert type(model.stem[0]) is nn.Conv2d
    assert all(p.requires_grad for p in model.parameters())
