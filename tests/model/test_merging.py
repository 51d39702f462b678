"""Merging, unmerging, disabling and unloading are exact and atomic."""

import copy
import pickle

import pytest
import torch
from torch import nn

import randlora
from randlora import RandLoRALinear
from tests.support.cases import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Scaled(nn.Linear):
    """A linear layer with its own forward (which reads ``weight``), buffer and attribute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("gain", torch.tensor(2.0))
        self.note = "kept"

    def forward(self, input):
        return nn.functional.linear(input, self.weight) * self.gain.to(input.dtype)


class Tied(nn.Module):
    """An embedding that shares its weight with the output head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.body(self.embed(tokens)))


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), Scaled(20, 12), nn.Linear(12, 12)).to(dtype)


def adapted(dtype=torch.float32, **keywords):
    """An adapted model whose updates are as large as its weights."""
    model = randlora.inject(plain(dtype), rank=5, **keywords)
    for layer in layers(model):
        nn.init.normal_(layer.randlora_gamma, std=0.2)
    return model


def layers(model):
    return [m for m in model.modules() if isinstance(m, RandLoRALinear)]


def bits(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_output_is_the_adapted_one_within_rounding(dtype):
    model = adapted(dtype).eval()
    x = torch.randn(30, 12, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        for layer in layers(model):  # the other order of the products, too
            layer.choice = randlora.planning.Choice("activations")
        through = model(x)
        assert randlora.merge(model) is model
        after = model(x)
    assert all(layer.merged for layer in layers(model))
    # Three layers; the weight and the output of each are rounded. Values grow to some tens.
    tolerance = 8 * torch.finfo(dtype).eps * before.abs().max()
    assert (after - before).abs().max() <= tolerance
    assert (after - through).abs().max() <= tolerance
    with torch.no_grad():
        assert not torch.allclose(plain(dtype)(x), after, rtol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_cycles_leave_every_bit(dtype):
    model = adapted(dtype).eval()
    x = torch.randn(3, 12, dtype=dtype)
    before, output = bits(model), model(x)
    for _ in range(100):
        randlora.merge(model)
        model(x)
        randlora.unmerge(model)
    assert same(bits(model), before)
    assert torch.equal(model(x), output)


def test_merging_and_unmerging_are_idempotent():
    model = adapted().eval()
    x = torch.randn(3, 12)
    once = randlora.merge(model)(x)
    assert not once.requires_grad
    assert torch.equal(randlora.merge(model)(x), once)
    assert randlora.unmerge(randlora.unmerge(model)) is model
    assert not any(layer.merged for layer in layers(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", [randlora.merge, lambda m: randlora.unload(m, merge=True)])
def test_an_update_that_is_not_finite_in_the_last_layer_changes_nothing(bad, act):
    model = adapted().eval()
    with torch.no_grad():
        layers(model)[-1].randlora_gamma[0, 0] = bad
    before = bits(model)
    with pytest.raises(ValueError, match="weight of '3' must be finite"):
        act(model)
    assert not any(layer.merged for layer in layers(model))
    assert len(layers(model)) == 3
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_a_state_dict_is_the_same_merged_or_not_and_loads_into_either():
    model, other = adapted().eval(), adapted(seed=0).eval()
    x = torch.randn(3, 12)
    for layer in layers(other):
        nn.init.normal_(layer.randlora_gamma)
    randlora.merge(model)
    assert same(bits(model), bits(randlora.unmerge(copy.deepcopy(model))))
    want = model(x)
    randlora.merge(other)
    assert not torch.allclose(other(x), want)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), want)
    assert torch.equal(randlora.unload(other)(x), plain()(x))


def updated(layer, way):
    """Write into Γ in a way that autograd may not notice."""
    gamma = layer.randlora_gamma
    if way == "fused AdamW":
        gamma.grad = torch.ones_like(gamma)
        torch.optim.AdamW([gamma], lr=1.0, fused=True).step()
    elif way == "copy into data":
        gamma.data.copy_(gamma.detach() + 1)
    elif way == "lerp of data":
        gamma.data.lerp_(gamma.detach() + 1, 0.5)
    elif way == "numpy":
        gamma.detach().numpy()[:] += 1
    elif way == "in place":
        with torch.no_grad():
            gamma.mul_(2)


WRITES = ("fused AdamW", "copy into data", "lerp of data", "numpy", "in place")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", WRITES)
def test_a_merged_layer_holds_its_weight_until_told_otherwise(way, compiled):
    model = adapted().eval()
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(model, backend="eager", fullgraph=True)
    else:
        run = model
    x = torch.randn(3, 12)
    first = randlora.merge(model) and run(x)
    assert layers(model)[0].weight is layers(model)[0].weight
    updated(layers(model)[0], way)
    assert torch.equal(run(x), first)  # no way of writing changes the merged weight
    second = randlora.merge(model) and run(x)
    assert not torch.allclose(first, second)
    randlora.unmerge(model)
    assert_close(run(x).detach(), second, 1e-5)
    assert_close(randlora.unload(model, merge=True)(x), second, 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_merged_model_computes_with_what_it_loads(compiled, assign):
    model, other = randlora.merge(adapted().eval()), adapted().eval()
    for layer in layers(other):
        nn.init.normal_(layer.randlora_gamma)
        layer.base_weight.data.mul_(2)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    x = torch.randn(3, 12)
    run(x)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_close(run(x), other(x), 1e-5)
    model.double()
    assert_close(run(x.double()), other(x).double(), 1e-5)


def test_a_merged_model_does_not_train_in_silence():
    model = randlora.merge(adapted()).train()
    x = torch.randn(3, 12)
    with pytest.raises(RuntimeError, match="merged, so its update gets no gradient"):
        model(x)
    with torch.no_grad():
        model(x)
    x.requires_grad_()
    model.eval()(x).sum().backward()  # the input gets a gradient
    assert x.grad.isfinite().all()
    randlora.unmerge(model).train()(x).sum().backward()
    assert all(layer.randlora_gamma.grad is not None for layer in layers(model))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_disabled_is_the_plain_model_to_the_bit(merged, training):
    model = adapted(dropout=0.5).train(training)
    if merged:
        randlora.merge(model)
    x = torch.randn(3, 12)
    with randlora.disabled(model) as inner:
        assert inner is model
        assert torch.equal(model(x), plain()(x))
        with randlora.disabled(model):
            pass
        assert torch.equal(model(x), plain()(x))
        assert layers(model)[0].weight is layers(model)[0].base_weight
    model.eval()
    assert not torch.allclose(model(x), plain()(x))


def test_an_error_inside_disabled_enables_again():
    model = adapted()
    with pytest.raises(KeyError), randlora.disabled(model):
        raise KeyError
    assert all(layer._randlora.is_enabled() for layer in layers(model))


def test_a_tied_weight_does_not_move():
    torch.manual_seed(0)
    model = randlora.inject(Tied(), rank=2, target_modules=["body", "out"]).eval()
    for layer in layers(model):
        nn.init.normal_(layer.randlora_gamma)
    embedding, tokens = model.embed.weight.detach().clone(), torch.tensor([1, 5])
    want = model(tokens)
    randlora.merge(model)
    assert torch.allclose(model(tokens), want, atol=1e-5)
    assert torch.equal(model.embed.weight, embedding)
    randlora.unload(model, merge=True)
    assert torch.allclose(model(tokens), want, atol=1e-5)
    assert torch.equal(model.embed.weight, embedding)
    assert model.out.weight is not model.embed.weight


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_unloading_gives_back_what_was_there(merge, merged):
    model = adapted(modules_to_save="3").eval()
    model[2].register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(3, 12)
    want = model(x)
    if merged:
        randlora.merge(model)
    assert randlora.unload(model, merge=merge) is model
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, Scaled, nn.Linear]
    assert model.state_dict().keys() == plain().state_dict().keys()
    assert vars(model[0]).keys() == vars(plain()[0]).keys()
    assert vars(model[3]).keys() == vars(plain()[3]).keys()
    assert model[2].note == "kept"
    assert len(model[2]._forward_hooks) == 1
    assert not model[0].weight.requires_grad
    if merge:
        assert torch.allclose(model(x), want, atol=1e-5)
    else:
        assert torch.equal(model[0].weight, plain()[0].weight)
    model[2]._forward_hooks.clear()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    randlora.inject(model, rank=3)  # it can be adapted again


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles_keep_whether_they_are_merged(merged):
    model = adapted().eval()
    x = torch.randn(3, 12)
    want = model(x)
    if merged:
        randlora.merge(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [layer.merged for layer in layers(other)] == [merged] * 3
        assert torch.allclose(other(x), want, atol=1e-5)
        randlora.unmerge(other)
    assert all(layer.merged == merged for layer in layers(model))


def test_merging_under_inference_mode_serves_after_it():
    model = adapted().eval()
    x = torch.randn(3, 12)
    with torch.inference_mode():
        randlora.merge(model)
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_merged_model_works_under_autocast_and_compiled():
    model = randlora.merge(adapted().eval())
    x = torch.randn(3, 12)
    want = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).abs().max() <= 0.05 * want.abs().max()
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model[0](x), atol=1e-6)


@pytest.mark.parametrize("act", [randlora.merge, randlora.unmerge, randlora.unload])
def test_what_is_not_adapted_is_refused(act):
    with pytest.raises(ValueError, match="model must be adapted"):
        act(plain())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        act(3)


def test_bad_arguments_of_unload_are_refused():
    class Own(RandLoRALinear):
        pass

    with pytest.raises(TypeError, match="merge must be True or False"):
        randlora.unload(adapted(), merge="yes")
    model = nn.Sequential(RandLoRALinear(4, 4, rank=2), Own(4, 4, rank=2))
    with pytest.raises(TypeError, match="'1' is a Own, a subclass"):
        randlora.unload(model)
    assert len(layers(model)) == 2
