"""Models and tokenizers in the format of llama2.c (github.com/karpathy/llama2.c), for tests."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 1


def load_model(path: Path) -> LlamaForCausalLM:
    """A version 0 checkpoint: seven int32, then fp32 tensors, each of all layers in a row."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", raw[:28])
    if vocab < 0:
        raise ValueError(f"path: expected a shared classifier, got a separate one in {path}")
    data, position = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return data[position - count : position].view(shape)

    width = dim // heads * kv_heads
    state = {"model.embed_tokens.weight": take(vocab, dim)}
    shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (width, dim),
        "self_attn.v_proj": (width, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for name, shape in shapes.items():
        for i, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = _halves(weight, dim // heads)
            state[f"model.layers.{i}.{name}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from rotary pairs (0, 1), (2, 3), ... to first halves, second halves."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class Tokenizer:
    """Byte-pair merges, the best score first, as llama2.c's ``encode``."""

    bos_token_id = BOS

    def __init__(self, path: Path, vocab: int) -> None:
        raw, position = path.read_bytes(), 4
        self.ids: dict[bytes, int] = {}
        self.scores: list[float] = []
        for i in range(vocab):
            score, length = struct.unpack_from("fi", raw, position)
            position += 8 + length
            self.ids.setdefault(raw[position - length : position], i)
            self.scores.append(score)
        self.words: dict[str, list[int]] = {}

    def __call__(self, texts: list[str], add_special_tokens: bool = False) -> dict[str, list]:
        return {"input_ids": [self.encode(text) for text in texts]}

    def encode(self, text: str) -> list[int]:
        """No merge of this vocabulary crosses a space that begins a word, so words are cached."""
        found: list[int] = []
        for word in (" " + text).replace(" ", "\0 ").split("\0")[1:]:
            if word not in self.words:
                self.words[word] = self._merge(word)
            found += self.words[word]
        return found

    def _merge(self, text: str) -> list[int]:
        pieces: list[bytes] = []
        for character in text:
            whole = character.encode()
            pieces += [whole] if whole in self.ids else [bytes([b]) for b in whole]
        while True:
            pairs = [a + b for a, b in itertools.pairwise(pieces)]
            best = max(
                (i for i, pair in enumerate(pairs) if pair in self.ids),
                key=lambda i: (self.scores[self.ids[pairs[i]]], -i),
                default=None,
            )
            if best is None:
                return [self.ids.get(p, p[0] + 3) for p in pieces]
            pieces[best : best + 2] = [pairs[best]]
