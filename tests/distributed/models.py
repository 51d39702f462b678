"""A model for tests in two processes, and its training."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import randlora
from randlora.modules.sharding import whole


class Block(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, 2, batch_first=True)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two blocks with attention, and sizes that two processes cannot share evenly."""

    def __init__(self, d=16, hidden=49):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, d)
        self.blocks = nn.ModuleList([Block(d, hidden), Block(d, hidden)])
        self.head = nn.Linear(d, 3)
        self.double()

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapt(model, **keywords):
    return randlora.inject(
        model, **{"rank": 3, "modules_to_save": "head", "exclude_modules": "embed", **keywords}
    )


def shard(model, **keywords):
    for block in model.blocks:
        fully_shard(block, **keywords)
    return fully_shard(model, **keywords)


def batches(mine=False, steps=3):
    """Inputs and targets of some steps: of four samples, or the two of this process."""
    generator = torch.Generator().manual_seed(1)
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2) if mine else slice(None)
    made = [torch.randn(4, 6, 8, generator=generator).double()[part] for _ in range(steps)]
    return [(one[..., :5], one[..., 5:]) for one in made]


def loss_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def mean(loss):
    """The mean of a number over the processes."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def train(model, batches, call=None):
    """Train the adapter; return the losses, averaged over the processes."""
    optimizer = torch.optim.AdamW(randlora.adapter_parameters(model), lr=1e-2)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(call or model, batch)
        loss.backward()
        optimizer.step()
        losses.append(mean(loss))
    return torch.stack(losses)


def numbers(model):
    """The adapter's tensors, gathered."""
    return {name: whole(t).clone() for name, t in randlora.adapter_state_dict(model).items()}
