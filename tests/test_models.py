"""Whole models of the library transformers, small and random, must keep the module contract."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from randlora import reference
from randlora.model.index import adapted_modules
from tests.support.tiny import GPT, LLAMA, TEXT, TOKENS, VOCABULARY, D, sizes

transformers = pytest.importorskip("transformers")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
SOUND = torch.linspace(-1, 1, 2 * 8 * 20).reshape(2, 8, 20)


@dataclass(frozen=True)
class Model:
    """How to make a model and call it, and how many of its weights are adapted."""

    name: str
    config: str
    cls: str
    sizes: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    count: int
    left_out: tuple[str, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    output: Callable[[Any], torch.Tensor] = lambda out: out.logits


WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": D,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

T5 = {
    "vocab_size": VOCABULARY,
    "d_model": D,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.1,
}
VISION = {"image_size": 8, "patch_size": 4}
CLIP = {
    "text_config": sizes(max_position_embeddings=16, eos_token_id=2, bos_token_id=1),
    "vision_config": {**sizes(), **VISION},
    "projection_dim": 12,
}
EXPERTS = {"target_parameters": ["gate_up_proj", "down_proj"]}
MODELS = [
    Model("bert", "BertConfig", "BertForMaskedLM", sizes(), TEXT, 13, ("cls.predictions.decoder",)),
    Model(
        "bert, untied",
        "BertConfig",
        "BertForMaskedLM",
        sizes(tie_word_embeddings=False),
        TEXT,
        13,
        ("cls.predictions.decoder",),
    ),
    Model(
        "bert, classifying",
        "BertConfig",
        "BertForSequenceClassification",
        sizes(num_labels=3),
        TEXT,
        13,
        (),
        {"modules_to_save": "classifier"},
    ),
    Model("gpt-2", "GPT2Config", "GPT2LMHeadModel", GPT, TEXT, 8, ("lm_head",)),
    Model(
        "gpt-2, untied",
        "GPT2Config",
        "GPT2LMHeadModel",
        {**GPT, "tie_word_embeddings": False},
        TEXT,
        8,
        ("lm_head",),
    ),
    Model(
        "gpt-2, embeddings too",
        "GPT2Config",
        "GPT2LMHeadModel",
        GPT,
        TEXT,
        9,
        ("lm_head",),
        {"target_modules": ["wte", "h"]},
    ),
    Model("llama", "LlamaConfig", "LlamaForCausalLM", LLAMA, TEXT, 14, ("lm_head",)),
    Model(
        "llama, tied",
        "LlamaConfig",
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": True},
        TEXT,
        14,
        ("lm_head",),
    ),
    Model(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        T5,
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
        16,
        ("lm_head",),
    ),
    Model(
        "t5, untied",
        "T5Config",
        "T5ForConditionalGeneration",
        {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
        18,
        ("lm_head",),
    ),
    Model(
        "vit",
        "ViTConfig",
        "ViTForImageClassification",
        {**sizes(num_labels=3), **VISION},
        {"pixel_values": IMAGES},
        13,
        ("classifier",),
    ),
    Model(
        "clip",
        "CLIPConfig",
        "CLIPModel",
        CLIP,
        {"input_ids": TOKENS, "pixel_values": IMAGES},
        27,
        output=lambda out: out.logits_per_image,
    ),
    Model(
        "whisper",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        WHISPER,
        {"input_features": SOUND, "decoder_input_ids": TOKENS},
        18,
        ("proj_out",),
    ),
    Model(
        "mamba",
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 2, "state_size": 4},
        TEXT,
        10,
        ("lm_head",),
    ),
    Model(
        "mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2},
        TEXT,
        12,
        ("lm_head",),
        EXPERTS,
    ),
    Model(
        "mixtral, tied",
        "MixtralConfig",
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 3, "tie_word_embeddings": True},
        TEXT,
        12,
        ("lm_head",),
        EXPERTS,
    ),
]


def encoder_decoder():
    return nn.Transformer(D, 2, 1, 1, 24, 0.1, batch_first=True)


SEQUENCES = {
    "src": torch.linspace(-1, 1, 2 * 7 * D).reshape(2, 7, D),
    "tgt": torch.linspace(1, -1, 2 * 5 * D).reshape(2, 5, D).sin(),
}


MODELS.append(
    Model("torch's transformer", "", "", {}, SEQUENCES, 10, output=lambda out: out),
)


def make(case, dtype=torch.float64):
    torch.manual_seed(0)
    if not case.cls:
        return encoder_decoder().to(dtype).eval().requires_grad_(False)
    config = getattr(transformers, case.config)(**case.sizes)
    if dtype == torch.float64:  # grouped products of experts do not support it
        config._experts_implementation = "eager"
    model = getattr(transformers, case.cls)(config)
    # Frozen, because torch orders products differently if weights require gradients.
    return model.to(dtype).eval().requires_grad_(False)


def call(case, model):
    dtype = next(model.parameters()).dtype
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case.inputs.items()}
    return case.output(model(**inputs))


def inject(case, model):
    return randlora.inject(model, rank=3, **case.keywords)


def shuffle(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("randlora_lambda", "randlora_gamma")):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                parameter.copy_(0.1 * noise)


def by_hand(case, model):
    """``W0 + ΔW`` of every adapted parameter from the oracle, the oracle's and the model's Λ, Γ."""
    weights, leaves, parameters = {}, [], []
    for path, module in adapted_modules(model).items():
        for name, adapter in module._randlora.active_updates.items():
            base, (lam, gamma) = module._parameters[name], adapter.parameters(module)
            pair = [t.detach().clone().requires_grad_() for t in (lam, gamma)]
            r, p, q, m = adapter.sizes
            a, b = adapter.bank.a(r, p).double(), adapter.bank.b(q, m, torch.float64)
            shape = base.shape
            stack = "target_parameters" in case.keywords and len(shape) == 3
            transposed = type(module)._randlora_base.__name__ == "Conv1D"
            rows, columns = shape[-2:] if stack else (shape[0], shape[1:].numel())
            # For a square transposed weight, ΔW is stored transposed, as for a wide one.
            wide = rows < columns or (transposed and rows == columns)
            make = partial(
                reference.delta_weight, a, b, scaling=adapter.settings.scaling, wide=wide
            )
            deltas = [make(*each) for each in (zip(*pair, strict=True) if stack else [pair])]
            delta = torch.stack(deltas) if stack else deltas[0]
            weights[f"{path}.{name}"] = base.detach() + delta.reshape(shape)
            leaves += pair
            parameters += [lam, gamma]
    return weights, leaves, parameters


def loss_of(y):
    rows = y.flatten(0, -2)
    return F.cross_entropy(rows, torch.arange(len(rows)) % rows.shape[1])


def close(one, other):
    # Some models always compute norms, softmax and scans in float32.
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


@pytest.mark.filterwarnings("ignore")  # warnings of transformers
@pytest.mark.parametrize("case", MODELS, ids=[case.name for case in MODELS])
def test_a_whole_model(case):
    plain, model = make(case), make(case)
    classes, before = [type(m) for m in model.modules()], call(case, plain)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    inject(case, model)
    with torch.no_grad():
        assert torch.equal(call(case, model), before)
    summary = randlora.summary(model)
    assert len(summary.layers) == case.count
    heads = [name for name, why in summary.left_out.items() if why.startswith("output head")]
    assert tuple(heads) == case.left_out
    assert names <= {name for name, _ in model.named_parameters(remove_duplicate=False)}

    # Outputs and gradients equal autograd's for a dense ΔW that is added by hand.
    shuffle(model.double())
    weights, leaves, parameters = by_hand(case, model)
    inner = _Called(case, plain)
    weights = {f"model.{name}": weight for name, weight in weights.items()}
    want = torch.func.functional_call(inner, weights, (), tie_weights=False)
    got = call(case, model)
    assert close(got, want)
    assert not close(got, before)
    want_grads = torch.autograd.grad(loss_of(want), leaves)
    got_grads = torch.autograd.grad(loss_of(got), parameters)
    for one, other in zip(got_grads, want_grads, strict=True):
        assert one.isfinite().all()
        assert one.count_nonzero()
        assert close(one, other)

    # Merging, loading and unloading.
    with torch.no_grad():
        other = inject(case, make(case)).double()
        other.load_state_dict(model.state_dict())
        assert torch.equal(call(case, other), call(case, model))
        assert close(call(case, randlora.merge(other)), got)
        folded = randlora.unload(copy.deepcopy(model), merge=True)
        assert close(call(case, folded), got)
        assert [type(m) for m in folded.modules()] == classes
        with randlora.disabled(model):
            assert torch.equal(call(case, model), before)
        randlora.unload(model)
    assert [type(m) for m in model.modules()] == classes
    assert {n: t for n, t in model.state_dict().items() if not torch.equal(t, state[n])} == {}
    with torch.no_grad():
        assert torch.equal(call(case, model), before)


class _Called(nn.Module):
    """Calls a model as its row of the table says."""

    def __init__(self, case, model):
        super().__init__()
        self.case, self.model = case, model

    def forward(self):
        return call(self.case, self.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MODELS, ids=[case.name for case in MODELS])
def test_a_few_steps_lower_the_loss(case):
    model = inject(case, make(case, torch.float32)).train()
    optimiser = torch.optim.AdamW(randlora.adapter_parameters(model), lr=1e-3)
    model.eval()
    before = loss_of(call(case, model)).item()
    model.train()
    for _ in range(6):
        optimiser.zero_grad()
        loss_of(call(case, model)).backward()
        optimiser.step()
    model.eval()
    assert loss_of(call(case, model)).item() < before
