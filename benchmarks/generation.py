"""Seconds a token when text is generated: one token at a time, with a cache, next to PEFT.

The model has the sizes of SmolLM2-135M and random weights. All methods generate in one process, in
turn; what counts are ratios of medians.

    python benchmarks/generation.py [--methods NAME ...] [--dtype D] [--tokens N] [--rounds N]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import randlora

LAYERS = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
RANK, LORA_RANK = 9, 19


def small_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(kind: str, merged: bool = False) -> Callable[[LlamaForCausalLM], nn.Module]:
    def prepare(model: LlamaForCausalLM) -> nn.Module:
        randlora.inject(model, RANK, basis=kind)
        for name, parameter in model.named_parameters():
            if name.endswith("randlora_gamma"):
                nn.init.normal_(parameter, std=0.1)
        return randlora.merge(model) if merged else model

    return prepare


def peft(method: str) -> Callable[[LlamaForCausalLM], nn.Module]:
    def prepare(model: LlamaForCausalLM) -> nn.Module:
        from peft import LoraConfig, RandLoraConfig, get_peft_model

        if method == "lora":
            return get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=list(LAYERS)))
        return get_peft_model(model, RandLoraConfig(r=RANK, target_modules=list(LAYERS)))

    return prepare


METHODS: dict[str, Callable[[LlamaForCausalLM], nn.Module]] = {
    "plain": lambda model: model,
    "isometric": adapted("isometric"),
    "dense": adapted("dense"),
    "sparse": adapted("sparse"),
    "very_sparse": adapted("very_sparse"),
    "merged": adapted("isometric", merged=True),
    "peft-lora": peft("lora"),
    "peft-randlora": peft("randlora"),
}


@torch.inference_mode()
def generate(model: nn.Module, tokens: int) -> float:
    """Seconds a token."""
    token, cache = torch.tensor([[1]]), None
    start = time.perf_counter()
    for _ in range(tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    return (time.perf_counter() - start) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    plain = small_llama(getattr(torch, options.dtype))
    models = {name: METHODS[name](copy.deepcopy(plain)).eval() for name in options.methods}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in tqdm(range(options.rounds + 1), desc="rounds"):
        for name, model in models.items():
            seconds = generate(model, options.tokens)
            if number:  # the first one warms up
                times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    first = medians[options.methods[0]]
    for name, seconds in medians.items():
        print(f"{name:<16}{1e3 * seconds:8.1f} ms a token{seconds / first:8.2f}")


if __name__ == "__main__":
    main()
