"""A small transformer with a tied head, a shared gate and layers of many shapes."""

import torch
from torch import nn

from randlora import RandLoRALinear


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.attn = Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    """A small transformer with a tied output head, a shared gate, and layers of many shapes."""

    def __init__(self, d=16, vocabulary=30, depth=2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.pool = nn.EmbeddingBag(3, d)
        self.blocks = nn.Sequential(*(Block(d) for _ in range(depth)))
        self.gate = nn.Linear(d, 4, bias=False)
        self.gate_alias = self.gate
        self.lm_head = nn.Linear(d, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.blocks(self.embed(tokens))
        return self.lm_head(x) + self.gate_alias(x).sum(-1, keepdim=True)


TOKENS = torch.arange(12).reshape(2, 6)
LAYERS = [f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]


def adapted_layers(model):
    """The names of the linear layers that are adapted."""
    return [n for n, m in model.named_modules() if isinstance(m, RandLoRALinear)]
