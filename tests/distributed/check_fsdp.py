"""FSDP2: ``fully_shard`` before and after ``inject``. Run by test_distributed.py."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import randlora
from randlora.modules.sharding import Groups, is_sharded, whole
from tests.distributed.models import (
    Block,
    Model,
    adapt,
    batches,
    loss_of,
    mean,
    numbers,
    shard,
    train,
)
from tests.support.quantised import SIZE, four_bits
from tests.support.situations import ROWS, close, input_of, make, results, trained

# Torch warns if a module that FSDP wraps returns a view, as any linear layer does.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")

ORDERS = "inject, shard", "shard, inject", "shard, run, inject"
orders = pytest.mark.parametrize("order", ORDERS)


def adapted(order, **keywords):
    """A model that is sharded before or after it is adapted, with numbers in float64."""
    if order == "inject, shard":
        return shard(adapt(Model()).double(), **keywords)
    model = shard(Model(), **keywords)
    if order == "shard, inject":
        return adapt(model).double()
    with torch.no_grad():
        model(batches()[0][0])
    return adapt(model)  # in float32: FSDP notes the dtypes in the first call


@pytest.fixture(scope="module")
def alone():
    """What one process gets from the joined batches, with numbers in float64 and float32."""
    models = {True: adapt(Model()).double(), False: adapt(Model())}
    return {wide: (train(m, batches()), numbers(m)) for wide, m in models.items()}


# --- training ------------------------------------------------------------------------------------


KEYWORDS = {
    "": {},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
@orders
def test_two_processes_equal_one(order, keywords, alone):
    model = adapted(order, **keywords)
    losses = train(model, batches(mine=True))
    assert all(is_sharded(p) for p in model.parameters())
    wide = order != "shard, run, inject"
    want_losses, want = alone[wide]
    # The processes add the halves of a gradient in another order than one process does.
    tolerance = 1e-12 if wide else 64 * torch.finfo(torch.float32).eps
    assert list(numbers(model)) == list(want)
    assert close(numbers(model).values(), want.values(), tolerance)
    assert close([losses], [want_losses], tolerance)


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
@orders
def test_hybrid_sharding(order, shape, alone):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    model = adapted(order, mesh=mesh)
    train(model, batches(mine=True))
    wide = order != "shard, run, inject"
    tolerance = 1e-12 if wide else 64 * torch.finfo(torch.float32).eps
    assert close(numbers(model).values(), alone[wide][1].values(), tolerance)


@orders
def test_clipped_gradients_and_accumulation(order):
    plain, model = adapt(Model()), adapted(order)
    if order != "shard, run, inject":
        plain.double()
    for one, mine in ((plain, False), (model, True)):
        for batch in batches(mine):
            loss_of(one, batch).backward()
    norms = [
        whole(torch.nn.utils.clip_grad_norm_(randlora.adapter_parameters(one), 0.01))
        for one in (plain, model)
    ]
    assert close([norms[1]], [norms[0]], 64 * torch.finfo(torch.float32).eps)
    grads = [[whole(p.grad) for p in randlora.adapter_parameters(one)] for one in (plain, model)]
    assert close(grads[1], grads[0], 64 * torch.finfo(torch.float32).eps)


@orders
def test_gathered_weights_in_low_precision(order):
    """The gradients are those of a model in that precision, averaged in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    narrow = adapt(Model().float()).bfloat16()
    model = Model().float()
    model = shard(adapt(model), mp_policy=policy) if order == ORDERS[0] else None
    if model is None:
        model = shard(Model().float(), mp_policy=policy)
        if order == ORDERS[2]:
            with torch.no_grad():
                model(batches()[0][0].float())
        adapt(model)
    x, y = (t.float() for t in batches(mine=True)[0])
    loss_of(model, (x, y)).backward()
    loss_of(narrow, (x.bfloat16(), y)).backward()
    for one, other in zip(*map(randlora.adapter_parameters, (model, narrow)), strict=True):
        want = other.grad.float()
        dist.all_reduce(want)
        assert one.dtype == torch.float32
        assert close([whole(one.grad)], [want / 2], torch.finfo(torch.float32).eps)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
@pytest.mark.parametrize("whole_model", [False, True])
def test_compiled(whole_model, alone):
    torch._dynamo.reset()
    model = adapt(Model()).double()
    for block in model.blocks:
        if not whole_model:
            block.compile(backend="aot_eager")
        fully_shard(block)
    fully_shard(model)
    if whole_model:
        model.compile(backend="aot_eager")
    train(model, batches(mine=True))
    assert close(numbers(model).values(), alone[True][1].values())


def test_checkpointed(alone):
    model = adapt(Model()).double()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    train(shard(model), batches(mine=True))
    assert close(numbers(model).values(), alone[True][1].values())


def test_gathered_weights_are_not_kept():
    """What is saved for backward is no copy of a weight, whatever the choice."""
    model = adapt(Model(), exclude_modules=["embed", "attention"])
    for layer in model.modules():
        if isinstance(layer, randlora.RandLoRALinear):
            layer.choice = randlora.Choice(forward="weight", keep_weight=True)
    shapes = {tuple(block.up.base_weight.shape) for block in model.blocks}
    kept = []

    def pack(tensor):
        if tuple(tensor.shape) in shapes and not isinstance(tensor, nn.Parameter):
            kept.append(tensor)
        return tensor

    def run(one):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            one(batches()[0][0])
        return len(kept)

    assert run(model) > 0
    assert run(shard(model)) == 0


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_kind_of_layer_as_a_group_of_its_own(row, order):
    """FSDP then puts its class in front of the adapted one."""
    plain, want = make(row)
    trained(want).double()
    model = copy.deepcopy(want) if order == ORDERS[0] else plain
    fully_shard(model.inner)
    fully_shard(model)
    if order == ORDERS[1]:
        if not list(model.parameters()):
            with pytest.raises(ValueError, match="inject before fully_shard"):
                randlora.inject(model, **{"rank": 2, **row.keywords})
            return
        randlora.inject(model, **{"rank": 2, **row.keywords}).double()
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, want.state_dict(), options=options)
    x = input_of(row)
    leaf = x.detach().requires_grad_(x.is_floating_point())
    y = model(leaf)
    generator = torch.Generator().manual_seed(5)
    (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
    got = [y.detach(), *([leaf.grad] if leaf.requires_grad else [])]
    got += [whole(p.grad) for p in randlora.adapter_parameters(model)]
    assert close(got, results(want, x))
    with randlora.disabled(model), torch.no_grad():
        disabled = model(x)
    with randlora.disabled(want), torch.no_grad():
        assert close([disabled], [want(x)])
    randlora.unload(model)
    assert not any(name.count("randlora_") for name in model.state_dict())
    assert isinstance(model.inner, type(row.make()))
    assert not isinstance(model.inner, randlora.RandLoRALinear)
    assert close([model(x)], [disabled])


# --- adapters ------------------------------------------------------------------------------------


@orders
def test_a_second_adapter(order):
    model = adapted(order)
    x = batches()[0][0]
    train(model, batches(mine=True))
    first = model(x).detach()
    adapt(model, adapter="second", rank=2)
    assert torch.equal(model(x), first)
    randlora.set_adapter(model, "second")
    with torch.no_grad():
        plain = Model()(x)
        assert close([model(x)], [plain])  # the root is gathered after a call
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("second" in name for name in names)
    train(model, batches(mine=True))
    second = model(x).detach()
    assert not close([second], [plain])
    with randlora.disabled(model), torch.no_grad():
        assert close([model(x)], [plain])
    randlora.set_adapter(model, "default")
    assert close([model(x)], [first])
    randlora.delete_adapter(model, "second")
    assert close([model(x)], [first])
    assert not any("second" in name for name in model.state_dict())
    randlora.unload(model)
    with torch.no_grad():
        assert close([model(x)], [plain])
    assert not any("randlora" in name for name in model.state_dict())


def other_dtypes(path):
    """Files of adapters with numbers in float64 and in float32."""
    paths = {dtype: path / f"{dtype}.pt" for dtype in (torch.float64, torch.float32)}
    if dist.get_rank() == 0:
        for dtype, file in paths.items():
            model = adapt(Model(), modules_to_save=[])
            randlora.save_adapter(trained(model).to(dtype), file)
    dist.barrier()
    return paths.values()


@pytest.mark.parametrize("late", [False, True])
def test_adapters_of_two_dtypes(late, shared_path):
    """FSDP notes in its first run which dtypes are trained."""
    wide, narrow = other_dtypes(shared_path)
    want, model = Model(), shard(Model())
    for one, mine in ((want, False), (model, True)):
        for adapter, path in (("wide", wide), ("narrow", narrow)):
            randlora.load_adapter(one, path, adapter=adapter, check_base=False)
            if adapter == "wide" and late:
                train(one, batches(mine))
        for adapter in ("wide", "narrow", "wide"):
            randlora.set_adapter(one, adapter)
            train(one, batches(mine))
    got = numbers(model)
    assert {t.dtype for t in got.values()} == {torch.float64}
    assert close(got.values(), numbers(want).values())


def test_a_group_of_which_nothing_was_trained_at_first():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = Model().float()
    randlora.inject(model, rank=3, target_modules="head", adapter="head")
    randlora.inject(model, rank=3, target_modules=["up", "down"], adapter="blocks")
    shard(model, mp_policy=policy)
    x = batches(mine=True)[0][0].float()
    for adapter in ("head", "blocks"):
        randlora.set_adapter(model, adapter)
        model(x).sum().backward()
        assert {p.grad.dtype for p in randlora.adapter_parameters(model)} == {torch.float32}


def test_switching_drops_gradients_that_are_not_yet_shared_out():
    model = shard(adapt(adapt(Model()), adapter="second").double())
    first = randlora.adapter_parameters(model)
    batch = batches(mine=True)[0]
    model.set_requires_gradient_sync(False)
    loss_of(model, batch).backward()
    model.set_requires_gradient_sync(True)
    randlora.set_adapter(model, "second")
    loss_of(model, batch).backward()
    assert all(p.grad is None for p in first)
    assert all(p.grad is not None for p in randlora.adapter_parameters(model))


def test_after_unload_the_model_can_be_trained_in_full():
    model, want = shard(Model()), Model()
    adapt(model, modules_to_save=[])  # in float32
    train(model, batches(mine=True))
    randlora.unload(model).requires_grad_(True)
    loss_of(model, batches(mine=True)[0]).backward()
    loss_of(want, batches()[0]).backward()
    for one, other in zip(model.parameters(), want.parameters(), strict=True):
        assert close([whole(one.grad)], [other.grad])


def test_after_an_error_within_a_call(alone):
    model = adapted(ORDERS[0])
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.ones(2, 3, 5))
    assert all(map(is_sharded, randlora.adapter_parameters(model)))
    train(model, batches(mine=True))
    assert close(numbers(model).values(), alone[True][1].values())


READS = {
    "summary": randlora.summary,
    "rank_report": randlora.rank_report,
    "adapter_parameters": randlora.adapter_parameters,
    "adapter_state_dict": randlora.adapter_state_dict,
}
CHANGES = {
    "inject": lambda model: adapt(model, adapter="third"),
    "set_adapter": lambda model: randlora.set_adapter(model, "second"),
    "delete_adapter": lambda model: randlora.delete_adapter(model, "second"),
    "unload": randlora.unload,
}


@pytest.mark.parametrize("call", READS.values(), ids=READS)
def test_hooks_in_a_backward_may_read(call, alone):
    model, called = adapted(ORDERS[0]), []

    def hook(*_):
        called.append(call(model) is not None)

    model.blocks[0].down.register_full_backward_hook(hook)
    train(model, batches(mine=True))
    assert called == [True] * 3
    assert close(numbers(model).values(), alone[True][1].values())


@pytest.mark.parametrize("call", CHANGES.values(), ids=CHANGES)
def test_hooks_in_a_backward_change_nothing(call, alone):
    model, called = shard(adapt(adapt(Model()), adapter="second").double()), []

    def hook(*_):
        called.append(refused(call, model, ValueError, "in a backward"))

    model.blocks[0].down.register_full_backward_hook(hook)
    train(model, batches(mine=True))
    assert len(called) == 3
    assert close(numbers(model).values(), alone[True][1].values())


def refused(call, model, error=TypeError, match="is sharded"):
    before = dict(model.named_parameters())
    with pytest.raises(error, match=match):
        call(model)
    assert {name: id(t) for name, t in model.named_parameters()} == {
        name: id(t) for name, t in before.items()
    }


@orders
def test_what_is_refused(order):
    model = adapted(order)
    train(model, batches(mine=True))
    refused(randlora.merge, model)
    refused(randlora.merged_state_dict, model)
    refused(lambda m: randlora.unload(m, merge=True), model)
    refused(lambda m: randlora.unload(m, merge={"default": 0.5}), model)
    refused(lambda m: randlora.unload(m.blocks[0].up), model, ValueError, "fully_shard was given")
    refused(
        lambda m: randlora.inject(m.blocks[0].up, adapter="second"),
        model,
        ValueError,
        "fully_shard was given",
    )
    refused(copy.deepcopy, model, AssertionError, "FSDP does not support deepcopy")
    refused(lambda m: m.blocks[0].up(torch.ones(2, 16).double()), model, RuntimeError, "is sharded")


def test_adapters_join_the_group_of_their_weight():
    """A module may have several, for example one for its experts, whose gradients are apart."""
    common = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_common")
    if not hasattr(common, "ShardPlacementResult"):
        pytest.skip("torch 2.9 has one group for each module")
    group = dist.new_group([0, 1])
    info = common.FSDPMeshInfo(DeviceMesh.from_group(group, "cpu"), shard_mesh_dim=0)
    model = Model()
    experts = {model.blocks[0].down.weight, model.blocks[0].down.bias}

    def placement(parameter):
        other = info if parameter in experts else None
        return other and common.ShardPlacementResult(placement=Shard(0), mesh_info=other)

    fully_shard(model, shard_placement_fn=placement)
    adapt(model, modules_to_save=[])
    groups = {
        name: Groups(model).new_member(torch.zeros(2), module, "weight").group
        for name, module in model.blocks[0].named_children()
        if name in ("up", "down")
    }
    assert groups["up"] is not groups["down"]
    for name, group in groups.items():
        names = {member._module_info.param_name for member in group.fsdp_params}
        modules = [member._module_info.module for member in group.fsdp_params]
        assert names >= {"weight", "randlora_lambda", "randlora_gamma"}
        assert modules.count(getattr(model.blocks[0], name)) == 4
    model(batches()[0][0]).sum().backward()


def test_a_part_of_a_sharded_model_is_not_adapted_by_itself():
    """Not even while it is gathered, as the root is after a call."""
    model = shard(Model())
    with torch.no_grad():
        model(batches()[0][0])
    assert not is_sharded(model.head.weight)
    refused(lambda m: randlora.inject(m.head, rank=2), model, ValueError, "fully_shard was given")


def test_modules_trained_in_full_have_the_dtype_of_their_group():
    model = shard(Model().bfloat16())
    refused(lambda m: randlora.inject(m, modules_to_save="norm"), model, ValueError, "one dtype")
    randlora.inject(model, modules_to_save="head", exclude_modules="embed")
    x = batches(mine=True)[0][0].bfloat16()
    model(x).sum().backward()


def test_read_outside_of_calls():
    model = shard(trained(adapt(Model())))
    whole_model = trained(adapt(Model()))
    up, want = model.blocks[1].up, whole_model.blocks[1].up
    assert up.weight is up.base_weight  # FSDP reads the parameter by this name
    assert close([up.delta_weight()], [want.delta_weight()])
    assert str(randlora.rank_report(model)) == str(randlora.rank_report(whole_model))
    assert str(randlora.summary(model)) == str(randlora.summary(whole_model))
    inside = []
    model.blocks[1].register_forward_pre_hook(lambda *_: inside.append(up.weight))
    model(batches()[0][0])
    assert close(inside, [want.weight])


def test_a_merged_model_that_is_sharded_then():
    want = trained(adapt(Model()).double())
    model = shard(randlora.merge(copy.deepcopy(want)).eval())
    x = batches()[0][0]
    with torch.no_grad():
        assert close([model(x)], [want(x)])
        for one in (model, want):
            one.load_state_dict({name: 2 * t for name, t in one.state_dict().items()})
        assert close([model(x)], [want(x)])
    train(randlora.unmerge(model).train(), batches(mine=True))
    train(want.train(), batches())
    assert close(numbers(model).values(), numbers(want).values())


def test_a_layer_that_was_sharded_is_not_copied():
    """FSDP would not gather the weights of the copy."""
    linear = fully_shard(nn.Linear(8, 8))
    with pytest.raises(TypeError, match="it is distributed"):
        randlora.RandLoRALinear.from_linear(linear, rank=2)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("order", ORDERS[:2])
def test_quantised_layers(order, shared_path):
    """Those of bitsandbytes put their weight in order in each call."""

    def make():
        torch.manual_seed(0)
        # With integers in a group, FSDP of torch 2.9 fails.
        layer, _ = four_bits(nn.Linear(SIZE, SIZE), quant_storage=torch.float32)
        return nn.Sequential(layer, nn.ReLU(), nn.Linear(SIZE, SIZE)).requires_grad_(False)

    x = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(dist.get_rank()))
    alone, model = randlora.inject(make(), rank=8), make()
    if order == ORDERS[0]:
        randlora.inject(model, rank=8)
    fully_shard(model)
    if order == ORDERS[1]:
        randlora.inject(model, rank=8)
    for _ in range(2):
        for one in (alone, model):
            one(x).square().mean().backward()
    parameters = list(zip(*map(randlora.adapter_parameters, (model, alone)), strict=True))
    assert len(parameters) == 4
    for one, other in parameters:
        # A library may choose another kernel when it is called again (see test_quantised.py).
        assert close([whole(one.grad)], [mean(other.grad)], 1e-3)
    randlora.save_adapter(model, shared_path / "a.pt")
    for loaded in (make(), fully_shard(make())):
        randlora.load_adapter(loaded, shared_path / "a.pt")


def test_it_starts_on_the_meta_device(alone):
    state = Model().state_dict()
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="on the meta device"):
        adapt(model)
    shard(model)
    with pytest.raises(ValueError, match="on the meta device"):
        adapt(model)
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state if dist.get_rank() == 0 else {}, options=options)
    adapt(model).double()
    train(model, batches(mine=True))
    assert close(numbers(model).values(), alone[True][1].values())


def test_adapted_first_it_may_be_emptied_and_loaded():
    want = trained(adapt(Model()))
    model = shard(adapt(Model()))
    model.to_empty(device="cpu")
    set_model_state_dict(model, want.state_dict(), options=StateDictOptions(full_state_dict=True))
    x = batches()[0][0]
    assert close([model(x)], [want(x)])
