"""Models that PEFT and this package both adapt, and PEFT's adapters of them."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.support.tiny import GPT, LLAMA, TEXT, sizes

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FLAGS = {
    "peft": {},
    "peft_sparse": {"sparse": True},
    "peft_very_sparse": {"very_sparse": True},
}
# PEFT multiplies x by B', then by A'; we add ΔW to the weight first: some tens of roundings.
CLOSE = 1e-5


class Mlp(nn.Module):
    """A tall, a square, a wide and a narrow layer, and a head to be trained in full."""

    def __init__(self):
        super().__init__()
        self.tall, self.square = nn.Linear(10, 24), nn.Linear(24, 24)
        self.wide, self.narrow = nn.Linear(24, 12, bias=False), nn.Linear(12, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = self.square(self.tall(x).relu()).relu()
        return self.head(self.narrow(self.wide(x).relu()))


def make(config, cls, keywords):
    def build():
        torch.manual_seed(0)
        return getattr(transformers, cls)(getattr(transformers, config)(**keywords)).eval()

    return build


def mlp():
    torch.manual_seed(0)
    return Mlp().eval()


# By name: the model, its inputs, its targets as a list and as a pattern, and how to read outputs.
MODELS = {
    "mlp": (
        mlp,
        {"x": torch.linspace(-1, 1, 70).view(7, 10)},
        (["tall", "square", "wide", "narrow"], r"(tall|square|wide|narrow)"),
        lambda out: out,
    ),
    "bert": (
        make("BertConfig", "BertForSequenceClassification", sizes()),
        TEXT,
        (["query", "value", "dense"], r".*layer\.\d+.*\.(query|value|dense)|bert.pooler.dense"),
        lambda out: out.logits,
    ),
    "gpt2": (
        make("GPT2Config", "GPT2LMHeadModel", GPT),
        TEXT,
        (["c_attn", "c_proj", "c_fc"], r"transformer\.h\.\d+\..*c_\w+"),
        lambda out: out.logits,
    ),
    "llama": (
        make("LlamaConfig", "LlamaForCausalLM", LLAMA),
        TEXT,
        (["q_proj", "k_proj", "up_proj", "down_proj"], r".*\.[qk]_proj|.*(up|down)_proj"),
        lambda out: out.logits,
    ),
}
RANKS = 4, 5, 20  # divides most sizes; divides no size; larger than some sizes


def outputs(name, model):
    _, inputs, _, read = MODELS[name]
    return read(model(**inputs) if name != "mlp" else model(inputs["x"]))


def theirs(name, rank, kind="peft", pattern=False, **keywords):
    """A model that PEFT adapted, with random values in the adapter."""
    config = peft.RandLoraConfig(
        r=rank, target_modules=MODELS[name][2][pattern], **FLAGS[kind], **keywords
    )
    model = peft.get_peft_model(MODELS[name][0](), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "randlora_lambda" in parameter_name:
                parameter.normal_()
            elif "randlora_gamma" in parameter_name:
                parameter.add_(0.02 * torch.randn_like(parameter))
            elif "modules_to_save" in parameter_name:
                parameter.add_(0.1)
    return model.eval()


def close(one, other):
    """Whether two tensors are equal up to rounding."""
    return (one - other).norm() <= CLOSE * other.norm()


def back(name, folder):
    """The model that PEFT loads from a folder."""
    return peft.PeftModel.from_pretrained(MODELS[name][0](), folder).eval()


TALL = "base_model.model.tall.randlora_"


def edit(folder, change):
    """Change the configuration and the tensors of a PEFT folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
