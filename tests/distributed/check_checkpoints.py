"""Adapter files and distributed checkpoints of sharded models. Run by test_distributed.py."""

import hashlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import randlora
from randlora.files import checkpoint
from randlora.modules.sharding import is_sharded, whole
from tests.distributed.models import Model, adapt, batches, loss_of, numbers, shard, train
from tests.support.situations import close, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # in torch 2.9
    pytest.mark.filterwarnings("ignore:.*in a single process:UserWarning"),  # of no_dist=True
]


def make():
    return trained(adapt(Model()))


def same(got, want):
    assert list(got) == list(want)
    assert all(torch.equal(whole(got[name]), want[name]) for name in want)


# --- adapter files -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_all_processes_save_one_whole_file(shared_path, ending, monkeypatch):
    model, path = shard(make()), shared_path / f"a.{ending}"
    if dist.get_rank() != 0:
        monkeypatch.delattr(checkpoint, "replacing")  # only the first process writes
    randlora.save_adapter(model, path)
    assert path.exists()  # in every process, as soon as the call returns
    if dist.get_rank() == 0:
        randlora.save_adapter(make(), shared_path / f"alone.{ending}")
        one, other = (hashlib.sha256(p.read_bytes()).hexdigest() for p in shared_path.iterdir())
        assert one == other or ending == "pt"  # a zip file has its name in it
        same(numbers(randlora.load_adapter(Model(), path)), numbers(make()))


def test_a_file_that_cannot_be_written_is_an_error_in_every_process(shared_path):
    with pytest.raises(OSError, match="No such file"):
        randlora.save_adapter(shard(make()), shared_path / "missing" / "a.pt")


def test_files_of_peft(shared_path):
    model = shard(trained(adapt(Model(), basis="peft", exclude_modules=["embed", "attention"])))
    randlora.peft.save_adapter(model, shared_path)
    for loaded in (shard(Model()), Model()):
        randlora.peft.load_adapter(loaded, shared_path)
        x = batches()[0][0]
        assert close([loaded(x)], [model(x)])


@pytest.mark.parametrize("start", ["plain", "adapted", "other adapter"])
def test_all_processes_load(shared_path, start):
    path = shared_path / "a.pt"
    randlora.save_adapter(shard(make().double()), path)
    model = shard(Model())
    if start == "adapted":
        adapt(model).double()
    if start == "other adapter":
        adapt(model, adapter="other")
    randlora.load_adapter(model, path)
    randlora.set_adapter(model, "default")
    assert all(is_sharded(p) for p in model.parameters())
    want = make().double()
    same(numbers(model), numbers(want))
    x = batches()[0][0]
    assert close([model(x)], [want(x)])
    train(model, batches(mine=True))
    train(want, batches())
    assert close(numbers(model).values(), numbers(want).values())


def test_another_base_model_is_noticed(shared_path):
    randlora.save_adapter(shard(make()), shared_path / "a.pt")
    other = Model()
    with torch.no_grad():
        other.blocks[1].up.weight.mul_(2)
    with pytest.raises(randlora.BaseModelError, match=r"blocks\.1\.up"):
        randlora.load_adapter(shard(other), shared_path / "a.pt")


def test_what_was_trained_besides_is_gathered(shared_path):
    model = make().double()
    model.blocks[0].norm.requires_grad_(True)
    shard(model)
    with pytest.raises(ValueError, match=r"trains blocks\.0\.norm\.weight"):
        randlora.save_adapter(model, shared_path / "a.pt")
    randlora.save_adapter(model, shared_path / "a.pt", trained_besides=True)
    loaded = randlora.load_adapter(shard(Model()), shared_path / "a.pt")
    assert torch.equal(whole(loaded.blocks[0].norm.randlora_copy_weight), torch.ones(16).double())


@pytest.mark.parametrize("run", [False, True])
def test_what_was_trained_besides_has_the_dtype_of_its_group(run, shared_path):
    def make():
        return adapt(Model().bfloat16(), modules_to_save=[])

    model = make()
    model.blocks[0].norm.requires_grad_(True)
    if dist.get_rank() == 0:
        randlora.save_adapter(model, shared_path / "a.pt", trained_besides=True)
    dist.barrier()
    model = shard(make())
    x = batches(mine=True)[0][0].bfloat16()
    if run:
        model(x)
    before = model.state_dict()
    with pytest.raises(ValueError, match="one dtype"):
        randlora.load_adapter(model, shared_path / "a.pt")
    assert list(model.state_dict()) == list(before)
    model(x).sum().backward()


# --- state dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
def test_a_full_state_dict_has_the_names_and_values_of_one_process(offload):
    want = make().state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    got = get_model_state_dict(shard(make()), options=options)
    assert sorted(got) == (sorted(want) if not offload or dist.get_rank() == 0 else [])
    assert all(torch.equal(t, want[name]) for name, t in got.items())


def test_without_frozen_parameters_it_holds_the_adapter_alone():
    model = shard(make())
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    got = get_model_state_dict(model, options=options)
    same({name: got[name] for name in numbers(make())}, numbers(make()))
    assert got.keys() == numbers(make()).keys()
    other = shard(adapt(Model()))
    set_model_state_dict(other, got, options=StateDictOptions(full_state_dict=True, strict=False))
    same(numbers(other), numbers(make()))


def test_a_state_dict_is_broadcast_from_the_first_process():
    model, want = shard(adapt(Model())), make()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = want.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=options)
    same(numbers(model), numbers(want))
    x = batches()[0][0]
    assert close([model(x)], [want(x)])


def test_a_plain_checkpoint_loads_into_an_adapted_model():
    other = Model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    options = StateDictOptions(full_state_dict=True, strict=False)
    model = shard(adapt(Model()))
    set_model_state_dict(model, other.state_dict(), options=options)
    x = batches()[0][0]
    with torch.no_grad(), randlora.disabled(model):
        assert close([model(x)], [other(x)])


def test_the_optimizer_resumes():
    def stepped(model, state=None):
        optimizer = torch.optim.AdamW(randlora.adapter_parameters(model), lr=1e-2)
        options = StateDictOptions(full_state_dict=True)
        if state is not None:
            set_model_state_dict(model, state[0], options=options)
            set_optimizer_state_dict(model, optimizer, state[1], options=options)
        for batch in batches(mine=True)[:2] if state is None else batches(mine=True)[2:]:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        return (
            get_model_state_dict(model, options=options),
            get_optimizer_state_dict(model, optimizer, options=options),
        )

    want = adapt(Model()).double()
    train(want, batches())
    half = stepped(shard(adapt(Model()).double()))
    got, _ = stepped(shard(adapt(Model()).double()), half)
    assert close([got[name] for name in numbers(want)], numbers(want).values())


# --- torch.distributed.checkpoint ----------------------------------------------------------------


def test_a_checkpoint_of_two_processes_loads_in_one(shared_path):
    model = shard(make())
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=shared_path)
    if dist.get_rank() == 0:
        alone = adapt(Model())
        state = {"model": alone.state_dict()}
        dcp.load(state, checkpoint_id=shared_path, no_dist=True)
        alone.load_state_dict(state["model"])
        same(numbers(alone), numbers(make()))


def test_a_checkpoint_of_one_process_loads_in_two(shared_path):
    if dist.get_rank() == 0:
        dcp.save({"model": make().state_dict()}, checkpoint_id=shared_path, no_dist=True)
    dist.barrier()
    model = shard(adapt(Model()))
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=shared_path)
    set_model_state_dict(model, state["model"])
    same(numbers(model), numbers(make()))


def test_a_checkpoint_of_the_adapter_alone(shared_path):
    options = StateDictOptions(ignore_frozen_params=True)
    state = {"model": get_model_state_dict(shard(make()), options=options)}
    dcp.save(state, checkpoint_id=shared_path)
    model = shard(adapt(Model()))
    state = {"model": get_model_state_dict(model, options=options)}
    dcp.load(state, checkpoint_id=shared_path)
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    same(numbers(model), numbers(make()))
