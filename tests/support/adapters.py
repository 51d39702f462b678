"""A model with weights of many kinds, plain and adapted, and functions to change its file."""

import json
from dataclasses import replace

import safetensors.torch
import torch
from torch import nn

from randlora import (
    inject,
)
from randlora.files import checkpoint, storage
from tests.support.rows import Experts, shuffled

TOKENS = torch.arange(10).reshape(2, 5)


class Net(nn.Module):
    """Weights of many kinds, and a head to be trained in full, with a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts, self.conv = Experts(), nn.Conv1d(8, 6, 1)
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.experts(x + self.attention(x, x, x)[0])
        return self.head(self.norm(self.conv(x.transpose(1, 2))).mean(2))


def plain(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


CHOICES = {
    "rank": {"attention": 3, ".*": 2},
    "target_modules": ["embed", "attention", "conv"],
    "target_parameters": ["up", "down"],
    "modules_to_save": ["norm", "head"],
    "basis": "sparse",
    "alpha": 3,
    "seed": 5,
}


def trained(**keywords):
    model = inject(plain(), **{**CHOICES, **keywords})
    shuffled(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "randlora_copy" in name:
                tensor.add_(1)
    return model


def snapshot(model):
    return (
        {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()},
        {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()},
        {n: t.clone() for n, t in model.state_dict().items()},
    )


def same(one, other):
    return one[:2] == other[:2] and all(torch.equal(t, other[2][n]) for n, t in one[2].items())


def rewrite(path, change):
    """Rewrite an adapter file with changed data and a correct checksum."""
    contents = checkpoint.read(path)
    contents = change(contents)
    header = contents.header()
    tensors = {name: t.contiguous() for name, t in contents.tensors().items()}
    write(path, header, tensors)


def write(path, header, tensors, checksum=None):
    header["checksum"] = checksum or checkpoint._checksum(header, tensors)
    text = json.dumps(header)
    if path.suffix == ".pt":
        torch.save({"randlora": text, **storage._packed(tensors)}, path)
    else:
        safetensors.torch.save_file(tensors, path, {"randlora": text})


def with_bank(bank):
    return lambda path: rewrite(path, lambda c: replace(c, banks=(bank,)))
