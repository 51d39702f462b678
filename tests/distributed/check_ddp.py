"""``DistributedDataParallel``. Run by test_distributed.py."""

import contextlib
import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import randlora
from tests.distributed.models import Model, adapt, batches, loss_of, mean, numbers, train
from tests.support.cases import KINDS
from tests.support.quantised import QUANTISE, SIZE
from tests.support.situations import close, trained


def counted(model, **keywords):
    """The wrapped model, and a list of the sizes of what it averages."""
    wrapped, sizes = DistributedDataParallel(model, **keywords), []

    def hook(state, bucket):
        sizes.append(bucket.buffer().numel())
        return (
            dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    wrapped.register_comm_hook(None, hook)
    return wrapped, sizes


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, static_graph):
    want, model = (adapt(Model(), basis=kind).double() for _ in range(2))
    wrapped, sizes = counted(model, static_graph=static_graph)
    losses = train(model, batches(mine=True), wrapped)
    assert close([losses], [train(want, batches())])
    assert close(numbers(model).values(), numbers(want).values())
    # Each step averages the gradients of the adapter, and nothing else.
    assert sum(sizes) == 3 * sum(p.numel() for p in randlora.adapter_parameters(model))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated")
@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32")  # of torchao
@pytest.mark.parametrize("name", QUANTISE)
def test_quantised_layers(name):
    """The gradients of two processes are the mean of what each has by itself."""

    quantise = QUANTISE[name]

    def make():
        torch.manual_seed(0)
        layers = quantise(nn.Linear(SIZE, SIZE))[0], nn.ReLU(), quantise(nn.Linear(SIZE, SIZE))[0]
        return trained(randlora.inject(nn.Sequential(*layers), rank=8))

    x = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(dist.get_rank()))
    alone, model = make(), make()
    alone(x).square().mean().backward()
    # DDP cannot send tensors of torchao at its start.
    wrapped = DistributedDataParallel(model, init_sync="torchao" not in name)
    wrapped(x).square().mean().backward()
    for one, other in zip(*map(randlora.adapter_parameters, (model, alone)), strict=True):
        # A library may choose another kernel when it is called again (see test_quantised.py).
        assert close([one.grad], [mean(other.grad)], 1e-3)


def test_bases_are_no_buffers():
    wrapped = DistributedDataParallel(adapt(Model()))
    assert list(wrapped.named_buffers()) == []


def test_accumulated_gradients_without_synchronisation():
    want, model = (adapt(Model()).double() for _ in range(2))
    wrapped, sizes = counted(model)
    whole, mine = batches(), batches(mine=True)
    for i in range(3):
        loss_of(want, whole[i]).backward()
        with wrapped.no_sync() if i < 2 else contextlib.nullcontext():
            loss_of(wrapped, mine[i]).backward()
        assert bool(sizes) == (i == 2)
    parameters = zip(*map(randlora.adapter_parameters, (model, want)), strict=True)
    assert all(close([one.grad], [other.grad]) for one, other in parameters)


def test_layers_that_are_not_used():
    def skipping(model):
        model.blocks = torch.nn.ModuleList(model.blocks)
        model.forward = lambda x: model.head(model.blocks[0](model.embed(x)))
        return model

    want, model = (skipping(adapt(Model()).double()) for _ in range(2))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    train(model, batches(mine=True), wrapped)
    train(want, batches())
    assert close(numbers(model).values(), numbers(want).values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks(use_reentrant):
    def checkpointed(model):
        for block in model.blocks:
            forward = block.forward
            block.forward = partial(checkpoint, forward, use_reentrant=use_reentrant)
        model.embed.register_forward_hook(lambda _, args, y: y.requires_grad_())
        return model

    want = adapt(Model()).double()
    model = checkpointed(adapt(Model()).double())
    wrapped = DistributedDataParallel(model, static_graph=use_reentrant)
    train(model, batches(mine=True), wrapped)
    train(want, batches())
    assert close(numbers(model).values(), numbers(want).values())


def test_files(shared_path):
    model = trained(adapt(Model()))
    wrapped, path = DistributedDataParallel(model), shared_path / "a.pt"
    if dist.get_rank() == 0:  # as usual; it does not wait for the others
        randlora.save_adapter(wrapped, path)
    dist.barrier()
    loaded = DistributedDataParallel(adapt(Model()))
    randlora.load_adapter(loaded, path)
    assert all(map(torch.equal, numbers(loaded).values(), numbers(model).values()))


def test_replicate(shared_path):
    """It puts a class in front of the model's, as FSDP does."""
    module = pytest.importorskip("torch.distributed._composable.replicate")
    want, model = (adapt(adapt(Model()), adapter="second").double() for _ in range(2))
    module.replicate(model)
    train(model, batches(mine=True))
    train(want, batches())
    assert close(numbers(model).values(), numbers(want).values())
    with pytest.raises(ValueError, match="must not be inside of DDP to change"):
        randlora.set_adapter(model, "second")
    if dist.get_rank() == 0:
        randlora.save_adapter(model, shared_path / "a.pt")


def test_a_change_of_what_is_trained_is_refused():
    model = adapt(Model())
    adapt(model, adapter="second")
    wrapped = DistributedDataParallel(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="must not be inside of DistributedDataParallel to change"):
        randlora.set_adapter(wrapped, "second")
    with pytest.raises(ValueError, match="must not be inside of DistributedDataParallel to get"):
        adapt(wrapped, adapter="third")
    with pytest.raises(ValueError, match="must not be inside of DistributedDataParallel to get"):
        adapt(DistributedDataParallel(Model()))
    assert list(model.state_dict()) == list(before)
    randlora.set_adapter(wrapped, "default")
    randlora.set_adapter(wrapped.module, "second")  # to be wrapped again
