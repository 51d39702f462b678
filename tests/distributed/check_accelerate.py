"""accelerate, which applies FSDP2 itself. Run by test_distributed.py."""

import pytest
import torch

import randlora
from randlora.modules.sharding import is_sharded
from tests.distributed.models import Model, adapt, batches, loss_of, mean, numbers
from tests.support.situations import close

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")


def prepared(**keywords):
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        **keywords,
    )
    accelerator = accelerate.Accelerator(cpu=True)
    # accelerate offers FSDP on accelerators only, but its code runs here as well.
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = adapt(Model()).double()
    optimizer = torch.optim.AdamW(randlora.adapter_parameters(model, lr=1e-2), weight_decay=0.1)
    return (accelerator, *accelerator.prepare(model, optimizer))


@pytest.mark.parametrize("efficient", [False, True])
def test_fsdp2(efficient, shared_path):
    accelerator, model, optimizer = prepared(cpu_ram_efficient_loading=efficient)
    assert all(is_sharded(p) for p in model.parameters())
    losses = []
    for batch in batches(mine=True):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        losses.append(mean(loss))
    want = adapt(Model()).double()
    groups = randlora.adapter_parameters(want, lr=1e-2)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for batch, got in zip(batches(), losses, strict=True):
        loss = loss_of(want, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert close([got], [loss.detach()])
    assert close(numbers(model).values(), numbers(want).values())
    randlora.save_adapter(model, shared_path / "a.pt")
    loaded = randlora.load_adapter(Model(), shared_path / "a.pt")
    assert close(numbers(loaded).values(), numbers(want).values())
