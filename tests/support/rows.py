"""The table of modules for the contract test, and how a row is made, adapted and called.

A row is a module in one situation: its inputs, which weights are adapted, and what it cannot do.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.modules.weight_update import A_START

# --- modules -------------------------------------------------------------------------------------


class Twice(nn.Linear):
    """A linear layer with its own forward, which reads the weight twice."""

    def forward(self, input):
        return F.linear(input, self.weight, self.bias) + F.linear(2 * input, self.weight)


class Scaled(nn.Embedding):
    def forward(self, input):
        return 3 * super().forward(input)


class Kernel(nn.Module):
    """A hand-written layer, registered below."""

    def __init__(self, in_, out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(in_, out) / in_**0.5)

    def forward(self, x):
        return x @ self.kernel


class Experts(nn.Module):
    """A mixture of experts. It holds stacks of weights and reads them once for each expert."""

    def __init__(self, experts=3, d=8, hidden=12):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, hidden, d) / d**0.5)
        self.down = nn.Parameter(torch.randn(experts, d, hidden) / hidden**0.5)

    def forward(self, x):
        experts = range(len(self.up))
        return sum(F.linear(F.gelu(F.linear(x, self.up[e])), self.down[e]) for e in experts)


class Opaque(nn.Module):
    """A linear layer with an unreadable weight: 8-bit integers and a scale."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.randint(-128, 128, (out_features, in_features)).char())

    def forward(self, x):
        return F.linear(x, self.codes.to(x.dtype) / 500)


class Repacked(Opaque):
    """Like 4-bit layers of bitsandbytes on processors with bfloat16. The first inference call packs
    the weight. From then on the layer computes in bfloat16, also in training, and gives its input
    no gradient. Reading its state unpacks the weight, with a loss of precision."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("scale", torch.tensor(1 / 500))
        self.packed = False

    def forward(self, x):
        if not self.training and not x.requires_grad:
            self.packed = True
        x, dtype = (x.detach().bfloat16() if self.packed else x), x.dtype
        return F.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype)).to(dtype)

    def _save_to_state_dict(self, *args):
        if self.packed:
            self.scale, self.packed = self.scale.bfloat16().float(), False
        super()._save_to_state_dict(*args)


randlora.register(Kernel, "kernel", transposed=True)
randlora.register(Opaque)


class Call(nn.Module):
    """Calls a module by the function ``call``."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *inputs):
        return self.call(self.inner, *inputs)


class Shared(nn.Module):
    """One layer with two names, used twice."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.other = self.one

    def forward(self, x):
        return self.other(F.gelu(self.one(x)))


class Tied(nn.Module):
    """An embedding that shares its weight with the output head."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.body(self.embed(tokens)))


class Hooked(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 12))
        self[0].register_forward_pre_hook(double)
        self[0].register_forward_hook(negative)


def double(module, inputs):
    return (2 * inputs[0],)


def negative(module, inputs, output):
    return -output


class Normed(nn.Sequential):
    """A parametrized layer, which is left alone, before one that is adapted."""

    def __init__(self):
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        super().__init__(normed, nn.Linear(8, 8))


def recomputed(inner, x):
    return checkpoint(inner, x, use_reentrant=False)


def packed(inner, x):
    lengths = torch.tensor([5, 2])
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    return inner(rows)[0].data


PADDING = torch.tensor([[False, False, False, False, True], [False] * 5])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)


def attend(inner, x, *more, **keywords):
    output, weights = inner(x, *(more or (x, x)), **keywords)
    parts = (output, output) if weights is None else (output, weights)
    return torch.cat([part.flatten() for part in parts])


def attention(**keywords):
    return partial(attend, **keywords)


def cell(inner, x, h, c):
    return torch.cat(inner(x, (h, c)))


def unpadded(inner, x):
    """The outputs of an encoder without padded places, where fast and slow path differ."""
    output = inner(x, src_key_padding_mask=PADDING)
    return output[~PADDING[:, : output.shape[1]]]


def encoder(layers=2, **keywords):
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, **keywords)
    nested = not keywords.get("norm_first", False)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)


def decoder_layer():
    return nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True)


def first(inner, *inputs):
    return inner(*inputs)[0]


def channels_last(inner, x):
    return inner(x.to(memory_format=torch.channels_last))


class Still(nn.BatchNorm2d):
    """A BatchNorm with fixed statistics. `tests/model/test_copies.py` tests moving ones."""

    def train(self, mode=True):
        return super().train(False)


def normalised():
    return nn.Sequential(nn.Conv2d(4, 6, 3), Still(6), nn.ReLU(inplace=True))


def conv_last():
    return nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)


# --- the table -----------------------------------------------------------------------------------


def normal(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens(*shape, high=20):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(high, shape, generator=generator)


X = normal(2, 5, 8)


@dataclass(frozen=True)
class Row:
    """A module, its inputs, what is to be adapted, and how its parameters are laid out."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[torch.Tensor, ...] = (X,)
    adapted: tuple[str, ...] = ("weight",)
    call: Callable[..., Any] | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    unreadable: Callable[[nn.Module], torch.Tensor] | None = None  # gives the dense weight
    dtype: torch.dtype = torch.float64
    pickles: bool = True  # whether the plain module can be pickled without a warning
    loads: bool = True  # whether the plain module can load its own state_dict


ATTENTION = ("in_proj_weight", "out_proj.weight")
APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
MLP = ("linear1.weight", "linear2.weight")
LAYER = (*(f"self_attn.{n}" for n in ATTENTION), *MLP)
CROSS = (*(f"multihead_attn.{n}" for n in ATTENTION),)
DECODER = (*LAYER[:2], *CROSS, *MLP)


def within(prefix, names):
    return tuple(f"{prefix}.{name}" for name in names)


def recurrent(*suffixes):
    return tuple(f"weight_{kind}_{suffix}" for suffix in suffixes for kind in ("ih", "hh"))


def heads(**keywords):
    return lambda: nn.MultiheadAttention(8, 2, batch_first=True, **keywords)


def quantised_dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 12)))


def quantised_weight():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.float32))
    config = quantization.Int8WeightOnlyConfig(version=2)  # torchao 0.17 has 1 by default
    quantization.quantize_(model, config)
    return model


def four_bits():
    linear = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 32)
    return nn.Sequential(linear).to("cpu")  # which quantises it


def four_bits_weight(module):
    weight = module[0]._parameters["weight"]
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.dequantize_4bit(weight.data, weight.quant_state)


def gpt(in_, out):
    def make():
        return pytest.importorskip("transformers.pytorch_utils").Conv1D(out, in_)

    return make


EMBED = {"target_modules": [r".*|"]}
STACK = {"target_parameters": ["up", "down"]}
ROWS = [
    Row("linear, tall", lambda: nn.Linear(8, 20)),
    Row("linear, wide", lambda: nn.Linear(8, 5)),
    Row("linear, square", lambda: nn.Linear(8, 8, bias=False)),
    Row("linear, rank of one", lambda: nn.Linear(8, 8), keywords={"rank": 1}),
    Row("linear, alpha", lambda: nn.Linear(8, 12), keywords={"alpha": 7.0}),
    Row("linear, few bases", lambda: nn.Linear(8, 12), keywords={"num_bases": 1}),
    Row("linear, isometric", lambda: nn.Linear(8, 12), keywords={"basis": "isometric"}),
    Row("linear, sparse", lambda: nn.Linear(8, 12), keywords={"basis": "sparse"}),
    Row("linear, very sparse", lambda: nn.Linear(8, 12), keywords={"basis": "very_sparse"}),
    Row("linear, float32", lambda: nn.Linear(8, 12), dtype=torch.float32),
    Row("linear that reads its weight", lambda: Twice(8, 12)),
    Row("linear by two names", Shared, adapted=("one.weight",)),
    Row("linear with hooks", Hooked, adapted=("0.weight",)),
    Row("linear recomputed in backward", lambda: nn.Linear(8, 12), call=recomputed),
    Row("linear after a parametrized one", Normed, adapted=("1.weight",), pickles=False),
    Row("linear tied to an embedding", Tied, (tokens(2, 5),), ("body.weight",)),
    Row(
        "tied embedding, its head adapted",
        Tied,
        (tokens(2, 5),),
        ("out.weight",),
        keywords={"target_modules": "out"},
    ),
    Row(
        "tied embedding, adapted",
        Tied,
        (tokens(2, 5),),
        ("embed.weight",),
        keywords={"target_modules": "embed"},
    ),
    Row("attention", heads(), adapted=ATTENTION, call=attention()),
    Row("attention, no weights", heads(), (X,), ATTENTION, attention(need_weights=False)),
    Row(
        "attention, padded",
        heads(),
        (X,),
        ATTENTION,
        attention(key_padding_mask=PADDING.double().mul(-9)),
    ),
    Row(
        "attention, masked",
        heads(),
        (X,),
        ATTENTION,
        attention(attn_mask=CAUSAL, need_weights=False),
    ),
    Row("attention, no bias", heads(bias=False), (X,), ATTENTION, attention()),
    Row(
        "attention, more keys",
        heads(add_bias_kv=True, add_zero_attn=True),
        (X,),
        ATTENTION,
        attention(),
    ),
    Row("attention across", heads(), (X, normal(2, 3, 8), normal(2, 3, 8)), ATTENTION, attention()),
    Row(
        "attention of three sizes",
        heads(kdim=6, vdim=10),
        (X, normal(2, 3, 6), normal(2, 3, 10)),
        APART,
        attention(),
    ),
    Row(
        "attention, sequence first",
        lambda: nn.MultiheadAttention(8, 2),
        (X,),
        ATTENTION,
        attention(),
    ),
    Row(
        "attention, part of it",
        heads(),
        (X,),
        ATTENTION[1:],
        attention(),
        {"target_modules": "out_proj"},
    ),
    Row(
        "encoder layer",
        lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True),
        adapted=LAYER,
    ),
    Row(
        "encoder layer, norm first",
        lambda: nn.TransformerEncoderLayer(
            8, 2, 12, 0.0, "gelu", norm_first=True, batch_first=True
        ),
        adapted=LAYER,
    ),
    Row("encoder", encoder, adapted=tuple(f"layers.{i}.{n}" for i in (0, 1) for n in LAYER)),
    Row(
        "encoder, nested by its padding",
        encoder,
        (X,),
        tuple(f"layers.{i}.{n}" for i in (0, 1) for n in LAYER),
        unpadded,
    ),
    Row(
        "encoder, norm first, padded",
        lambda: encoder(norm_first=True),
        (X,),
        tuple(f"layers.{i}.{n}" for i in (0, 1) for n in LAYER),
        unpadded,
    ),
    Row("decoder layer", decoder_layer, (X, normal(2, 3, 8)), DECODER),
    Row(
        "transformer",
        lambda: nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True),
        (X, normal(2, 3, 8)),
        (*within("encoder.layers.0", LAYER), *within("decoder.layers.0", DECODER)),
    ),
    Row("convolution 1d", lambda: nn.Conv1d(5, 7, 3, padding=1), (X,)),
    Row("convolution 1d, wide", lambda: nn.Conv1d(5, 40, 3), (X,)),
    Row("convolution 2d", lambda: nn.Conv2d(4, 6, 3, stride=2), (normal(2, 4, 7, 7),)),
    Row("convolution 2d, groups", lambda: nn.Conv2d(4, 6, 3, groups=2), (normal(2, 4, 5, 5),)),
    Row(
        "convolution 2d, depthwise, circular",
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"),
        (normal(2, 4, 5, 5),),
    ),
    Row("convolution 2d, channels last", conv_last, (normal(2, 4, 5, 5),), call=channels_last),
    Row("convolution 3d", lambda: nn.Conv3d(2, 3, 2, dilation=2), (normal(1, 2, 4, 4, 4),)),
    Row("transposed convolution 1d", lambda: nn.ConvTranspose1d(5, 3, 3), (X,)),
    Row(
        "transposed convolution 2d, groups",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        (normal(2, 4, 5, 5),),
    ),
    Row("transposed convolution 3d", lambda: nn.ConvTranspose3d(3, 2, 2), (normal(1, 3, 3, 3, 3),)),
    Row("convolution beside a BatchNorm", normalised, (normal(2, 4, 5, 5),), ("0.weight",)),
    Row("embedding", lambda: nn.Embedding(20, 8), (tokens(2, 5),), keywords=EMBED),
    Row("embedding, many tokens", lambda: nn.Embedding(20, 8), (tokens(5, 9),), keywords=EMBED),
    Row("embedding, wide", lambda: nn.Embedding(6, 8), (tokens(4, high=6),), keywords=EMBED),
    Row(
        "embedding, padded",
        lambda: nn.Embedding(20, 8, padding_idx=tokens(2, 5)[0, 0].item()),
        (tokens(2, 5),),
        keywords=EMBED,
    ),
    Row(
        "embedding, sparse gradients",
        lambda: nn.Embedding(20, 8, sparse=True),
        (tokens(5, 9),),
        keywords=EMBED,
    ),
    Row("embedding with a forward", lambda: Scaled(20, 8), (tokens(2, 5),), keywords=EMBED),
    *(
        Row(
            f"embedding, {kind}",
            lambda: nn.Embedding(90, 30),
            (tokens(2, 5, high=90),),
            keywords={**EMBED, "basis": kind},
        )
        for kind in ("sparse", "very_sparse", "isometric")
    ),
    Row("lstm", lambda: nn.LSTM(8, 6, batch_first=True), (X,), recurrent("l0"), first),
    Row(
        "lstm, deep, both ways",
        lambda: nn.LSTM(8, 6, 2, bidirectional=True),
        (X,),
        recurrent("l0", "l0_reverse", "l1", "l1_reverse"),
        first,
    ),
    Row(
        "lstm, projected",
        lambda: nn.LSTM(8, 6, proj_size=4),
        (X,),
        (*recurrent("l0"), "weight_hr_l0"),
        first,
    ),
    Row("lstm, packed", lambda: nn.LSTM(8, 6, batch_first=True), (X,), recurrent("l0"), packed),
    Row("gru", lambda: nn.GRU(8, 6, bias=False), (X,), recurrent("l0"), first),
    Row("rnn", lambda: nn.RNN(8, 6, nonlinearity="relu"), (X,), recurrent("l0"), first),
    Row(
        "lstm cell",
        lambda: nn.LSTMCell(8, 6),
        (X[0], normal(5, 6), normal(5, 6)),
        ("weight_ih", "weight_hh"),
        cell,
    ),
    Row("gru cell", lambda: nn.GRUCell(8, 6), (X[0], normal(5, 6)), ("weight_ih", "weight_hh")),
    Row("conv1d of transformers, tall", gpt(8, 20), transposed=True),
    Row("conv1d of transformers, wide", gpt(8, 5), transposed=True),
    Row("conv1d of transformers, square", gpt(8, 8), transposed=True),
    Row("registered", lambda: Kernel(8, 12), adapted=("kernel",), transposed=True),
    Row("experts", Experts, adapted=("up", "down"), keywords=STACK),
    Row(
        "experts, one of two",
        Experts,
        adapted=("down",),
        keywords={"target_parameters": r".*down|down", "rank": {"down": 2}},
    ),
    Row(
        "opaque, registered",
        lambda: Opaque(8, 12),
        unreadable=lambda module: module.codes.double() / 500,
    ),
    Row(
        "opaque, repacked at its first call",
        lambda: Repacked(8, 12),
        (X.float(),),
        unreadable=lambda module: module.codes * module.scale,
        dtype=torch.float32,
        loads=False,
    ),
    Row(
        "opaque, torch.ao dynamic int8",
        quantised_dynamic,
        (X.float(),),
        ("0.weight",),
        unreadable=lambda module: module[0].weight().dequantize(),
        dtype=torch.float32,
        pickles=False,
    ),
    Row(
        "opaque, torchao int8 weights",
        quantised_weight,
        (normal(2, 5, 64).float(),),
        ("0.weight",),
        unreadable=lambda module: module[0]._parameters["weight"].dequantize(),
        dtype=torch.float32,
        pickles=False,
    ),
    Row(
        "opaque, bitsandbytes 4 bits",
        four_bits,
        (normal(2, 5, 64).float(),),
        ("0.weight",),
        unreadable=four_bits_weight,
        dtype=torch.float32,
        pickles=False,
        loads=False,
    ),
]

# Of these there is a second row, in which each update trains an A of its own.
_TRAIN_A = (
    *("linear, tall", "linear, wide", "linear, rank of one", "linear, few bases"),
    *("linear, isometric", "linear, very sparse", "linear, float32"),
    *("linear that reads its weight", "linear by two names", "linear recomputed in backward"),
    *("tied embedding, adapted", "attention, no weights", "attention of three sizes"),
    *("encoder layer", "convolution 1d, wide", "convolution 2d, channels last"),
    *("transposed convolution 2d, groups", "embedding", "embedding, many tokens"),
    *("embedding, wide", "embedding, padded", "embedding, isometric"),
    *("lstm", "lstm, projected", "gru cell"),
    *("conv1d of transformers, tall", "conv1d of transformers, wide", "registered"),
    *("experts", "experts, one of two", "opaque, registered", "opaque, torch.ao dynamic int8"),
)
_NAMED = {row.name: row for row in ROWS}
ROWS += [
    replace(
        _NAMED[name], name=f"{name}, A trained", keywords={**_NAMED[name].keywords, "train_a": True}
    )
    for name in _TRAIN_A
]


# --- the test ------------------------------------------------------------------------------------


def make(row):
    torch.manual_seed(0)
    module = row.make()
    module = module if row.unreadable else module.to(row.dtype)
    for m in module.modules():  # biases that start at zero would hide a mistake
        if isinstance(m, nn.MultiheadAttention) and m.in_proj_bias is not None:
            nn.init.normal_(m.in_proj_bias)
    # Frozen, because torch orders products differently if weights require gradients.
    return Call(module, row.call or nn.Module.__call__).train().requires_grad_(False)


def inject(row, model):
    keywords = {"rank": 3, **row.keywords}
    if "target_parameters" in keywords:
        keywords["target_modules"] = []
    elif "target_modules" not in keywords:
        keywords["target_modules"] = r".*"
        keywords["exclude_modules"] = embeddings(model)
    return randlora.inject(model, **keywords)


def embeddings(model):
    return lambda name, module: (
        isinstance(module, nn.Embedding | nn.Linear)
        and (isinstance(module, nn.Embedding) or name.endswith("out"))
    )


def shuffled(model):
    """Fill all that updates train with random numbers, and return these parameters by name."""
    generator = torch.Generator().manual_seed(2)
    numbers = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("randlora_lambda", "randlora_gamma", "randlora_a")):
            # The default scaling is larger if A is trained: so ΔW is as large as other ones.
            size = 0.3 * (A_START if name.endswith("randlora_a") else 1.0)
            with torch.no_grad():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            numbers[name] = parameter
    return numbers


def inputs_of(row, requires_grad=False):
    return tuple(
        x.detach().to(row.dtype, copy=True).requires_grad_(requires_grad)
        if x.is_floating_point()
        else x
        for x in row.inputs
    )


def loss_of(y):
    generator = torch.Generator().manual_seed(3)
    return (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum()
