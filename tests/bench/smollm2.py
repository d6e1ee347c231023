"""Models of SmolLM2-135M's shape at random weights: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers

import flacompile

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


def transformer(layers: int, dtype: str, *, tiny: bool = False) -> transformers.LlamaForCausalLM:
    """On the CPU; of few and narrow layers to try a bench out."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, tie_word_embeddings=True, max_position_embeddings=2**20,
        **(TINY if tiny else SHAPE),
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def converted(
    mixer: str, layers: int, dtype: str, *, tiny: bool = False
) -> transformers.LlamaForCausalLM:
    """The same with this mixer in every layer."""
    model = flacompile.convert(transformer(layers, dtype, tiny=tiny), mixer, init="neutral")
    return flacompile.finalize(model)
