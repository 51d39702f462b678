"""Assigning, registering and parametrizing tensors of an adapted module."""

import pytest
import torch
from torch import nn

import randlora
from randlora import adapter_parameters, disabled, inject, save_adapter
from tests.support.moving import ROWS, adapted, norms, shuffle


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
    model[0].weight = model[0].base_weight  # assigning the same tensor is allowed, as tying does
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


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["bias", "randlora_gamma", "randlora_a"])
def test_a_parametrization_of_another_tensor_comes_through_unloading(name, merge):
    model = adapted(train_a=name == "randlora_a")
    count = len(adapter_parameters(model))
    parametrize = nn.utils.parametrize
    before = model(ROWS)
    with disabled(model):
        plain = model(ROWS)
    parametrize.register_parametrization(model[0], name, Double())
    want = model(ROWS)
    assert not torch.allclose(want, before)
    assert len({id(p) for p in adapter_parameters(model)}) == count
    with disabled(model):
        assert torch.equal(model(ROWS), plain) == (name != "bias")
        plain = model(ROWS)
    randlora.unload(model, merge=merge)
    torch.testing.assert_close(model(ROWS), want if merge else plain)
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(model[0], randlora.modules.adapted.AdaptedModule)
    assert parametrize.is_parametrized(model[0]) == (name == "bias")
    if name == "bias":
        parametrize.remove_parametrizations(model[0], "bias")
        torch.testing.assert_close(model(ROWS), want if merge else plain)
    assert type(model[0]) is nn.Linear
    assert vars(model[0]).keys() == vars(nn.Linear(6, 6)).keys()


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


def test_a_module_made_of_an_adapted_ones_class_is_plain():
    model = inject(norms(), 2)
    made = type(model[2])(6).double()
    assert made.state_dict().keys() == nn.BatchNorm1d(6).state_dict().keys()
    assert torch.equal(made(ROWS.double()), nn.BatchNorm1d(6).double()(ROWS.double()))
    model[2] = made.float()
    assert randlora.unload(model)[2] is made
