"""Tensor parallelism is refused, whichever comes first. Run by test_distributed.py."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import randlora
from tests.distributed.models import Model, adapt, batches, numbers, train
from tests.support.situations import ROWS, close, make, trained

STYLES = {"column": ColwiseParallel, "row": RowwiseParallel, "sequence": SequenceParallel}
styles = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def mesh():
    return init_device_mesh("cpu", (2,))


def unchanged(call, model, error, match):
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        call()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity
        assert torch.equal(after[name], value)


@styles
@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("layer", ["up", "down"])
def test_adapted_layers_cannot_be_parallelised(layer, disabled, style):
    model = trained(adapt(Model()))
    x = batches()[0][0]
    want = model(x)

    def parallelise():
        parallelize_module(model.blocks[0], mesh(), {layer: style()})

    if disabled:
        with randlora.disabled(model):
            unchanged(parallelise, model, RuntimeError, "cannot be distributed")
    else:
        unchanged(parallelise, model, RuntimeError, "cannot be distributed")
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_no_kind_of_layer_is_distributed(row):
    model = trained(make(row)[1])
    inner = model.inner
    unchanged(
        lambda: distribute_module(inner, mesh()), model, RuntimeError, "cannot be distributed"
    )


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
def test_parallel_layers_cannot_be_adapted(style):
    model = Model()
    parallelize_module(model.blocks[0], mesh(), {"up": style()})
    with pytest.raises(ValueError, match=r"'blocks\.0\.up' is distributed otherwise"):
        adapt(model)
    assert not any("randlora" in name for name in model.state_dict())


def test_the_other_layers_of_a_parallel_model_can_be_adapted(shared_path):
    """With the same batch in each process, as usual, the adapters get the same gradients.

    The adapter is whole, so that one process may save it by itself.
    """
    want, model = Model(hidden=48), Model(hidden=48)  # an even share for each process
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh(), plan)
    for one in (want, model):
        adapt(one, target_modules="attention").double()
    train(want, batches())
    train(model, batches())
    assert close(numbers(model).values(), numbers(want).values())
    if dist.get_rank() == 0:
        randlora.save_adapter(model, shared_path / "a.pt")


def test_distributed_inputs_are_an_error():
    model = nn.Sequential(nn.Linear(8, 8).double())
    randlora.inject(model, rank=2)
    from torch.distributed.tensor import Replicate

    layouts = PrepareModuleInput(
        input_layouts=Replicate(), desired_input_layouts=Replicate(), use_local_output=False
    )
    parallelize_module(model, mesh(), layouts)
    with pytest.raises((RuntimeError, TypeError)):
        model(torch.ones(2, 8).double())
