"""Arguments of transformers configurations for small models."""

import torch

VOCABULARY, D = 40, 16
TOKENS = torch.arange(3, 17).reshape(2, 7)


def sizes(**more):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        **more,
    }


TEXT = {"input_ids": TOKENS}
LLAMA = sizes(num_key_value_heads=1, max_position_embeddings=32)
GPT = {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 32}
