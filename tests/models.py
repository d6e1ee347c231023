"""Tiny models with random weights: MODELS can be converted, REJECTED must be left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

VOCAB, DIM, LAYERS, HEADS, TIME = 64, 32, 2, 4, 20


class Case(NamedTuple):
    """A model in evaluation mode and the inputs of one call."""

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]


class Block(nn.Module):
    """x + attention(norm(x)), then the same with an MLP."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A language model written by hand over any block."""

    def __init__(self, block: Callable[[], nn.Module], positions: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Embedding(128, DIM) if positions else None
        self.blocks = nn.ModuleList(block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PackedAttention(nn.Module):
    """One nn.Linear for queries, keys and values; options that make it convertible or not."""

    def __init__(
        self,
        is_causal: bool = True,
        dropout: float = 0.0,
        mask: Callable[[int], Tensor] | None = None,
        factor: float = 1.0,
        per_head: bool = False,
    ):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.is_causal, self.dropout, self.mask = is_causal, dropout, mask
        self.factor, self.per_head = factor, per_head

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        if self.per_head:  # rows of a head stand together: q, k, v of head 0, then of head 1
            qkv = self.qkv(x).view(batch, time, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            qkv = self.qkv(x).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(
            q * self.factor,
            k,
            v,
            attn_mask=self.mask(time) if self.mask else None,
            dropout_p=self.dropout,
            is_causal=self.is_causal,
        )
        return self.out(y.transpose(1, 2).reshape(batch, time, DIM))


class RotaryAttention(nn.Module):
    """In the manner of llama2.c: separate weights, interleaved rotation, repeated key heads."""

    def __init__(self, form: str = "complex", kv_heads: int = 2):
        super().__init__()
        self.form, self.kv_heads, self.head_dim = form, kv_heads, DIM // HEADS
        kv_dim = kv_heads * self.head_dim
        self.wq, self.wo = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.wk, self.wv = nn.Linear(DIM, kv_dim, bias=False), nn.Linear(DIM, kv_dim, bias=False)
        freq = 1.0 / (10000.0 ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim))
        angle = torch.outer(torch.arange(128).float(), freq)  # [T, K/2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = (t[: x.shape[1], None] for t in (self.cos, self.sin))
        if self.form == "complex":
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(3).type_as(x)
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.rotate(self.wq(x).view(batch, time, HEADS, -1))
        k = self.rotate(self.wk(x).view(batch, time, self.kv_heads, -1))
        v = self.wv(x).view(batch, time, self.kv_heads, -1)
        group = HEADS // self.kv_heads
        if self.form == "complex":
            k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.form != "complex"
        )
        return self.wo(y.transpose(1, 2).reshape(batch, time, -1))


class InlineBlock(nn.Module):
    """Attention and MLP in one module."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(x).relu()


class CrossAttention(nn.Module):
    """Keys and values from a second input."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.v, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            layer(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class CrossModel(nn.Module):
    """One cross-attention between two float inputs."""

    def __init__(self):
        super().__init__()
        self.attention = CrossAttention()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, memory))


class WrittenOut(PackedAttention):
    """Softmax of a product, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = torch.ones(time, time, dtype=torch.bool).triu(1)
        y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(-2))


def _ids(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def _sharpen(model: nn.Module) -> nn.Module:
    """Weights large enough, and biases and norms unlike their start, for attention to matter."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.copy_(noise * 1.5 / math.sqrt(DIM))
        elif parameter.dim() == 1:
            parameter.data.add_(0.2 * noise)
    return model.eval()


def _hf(config_class: type, model_class: type, **options: Any) -> Callable[[], Case]:
    def build() -> Case:
        torch.manual_seed(0)
        config = config_class(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **options)
        return Case(_sharpen(model_class(config)), (_ids(),), {})

    return build


def llama(name: str = "Llama", model: str | None = None, **options: Any) -> Callable[[], Case]:
    """Builder of a model of the Llama family, grouped heads unless an option says otherwise."""
    shape = {
        "hidden_size": DIM,
        "intermediate_size": 2 * DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    config = getattr(transformers, name + "Config")
    return _hf(config, getattr(transformers, (model or name) + "ForCausalLM"), **(shape | options))


def _gpt2(**options: Any) -> Callable[[], Case]:
    shape = {"n_embd": DIM, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
    return _hf(transformers.GPT2Config, transformers.GPT2LMHeadModel, **(shape | options))


def _own(attention: Callable[[], nn.Module], positions: bool = True) -> Callable[[], Case]:
    def build() -> Case:
        torch.manual_seed(0)
        return Case(_sharpen(GPT(lambda: Block(attention()), positions)), (_ids(),), {})

    return build


def _inline() -> Case:
    torch.manual_seed(0)
    return Case(_sharpen(GPT(InlineBlock)), (_ids(),), {})


def _inline_root() -> Case:
    torch.manual_seed(0)
    return Case(_sharpen(InlineBlock()), (torch.randn(2, TIME, DIM),), {})


def _cross() -> Case:
    torch.manual_seed(0)
    x, memory = torch.randn(2, TIME, DIM), torch.randn(2, TIME, DIM)
    return Case(_sharpen(CrossModel()), (x, memory), {})


def _bert() -> Case:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    return Case(_sharpen(transformers.BertModel(config)), (_ids(),), {})


def _dilated(time: int) -> Tensor:
    """Every second of the earlier tokens, and the token itself."""
    distance = torch.arange(time)[:, None] - torch.arange(time)
    return (distance >= 0) & (distance % 2 == 0)


def _alibi(time: int) -> Tensor:
    distance = torch.arange(time)[:, None] - torch.arange(time)
    return torch.where(distance >= 0, -0.5 * distance, -math.inf)


MODELS: dict[str, Callable[[], Case]] = {
    "llama": llama(),
    "llama_mha": llama(num_key_value_heads=HEADS),
    "llama_mqa": llama(num_key_value_heads=1),
    "llama_tied": llama(tie_word_embeddings=True),
    "llama_bias": llama(attention_bias=True),
    "llama_yarn": llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "qwen2": llama("Qwen2"),
    "qwen3": llama("Qwen3", head_dim=16),
    "mistral": llama("Mistral", sliding_window=8),
    "olmo2": llama("Olmo2"),
    "gpt2": _gpt2(),
    "gpt_neox": _hf(
        transformers.GPTNeoXConfig,
        transformers.GPTNeoXForCausalLM,
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
    ),
    "handwritten": _own(PackedAttention),
    "handwritten_per_head": _own(lambda: PackedAttention(per_head=True, factor=0.5)),
    "handwritten_rope": _own(RotaryAttention, positions=False),
    "handwritten_even_odd": _own(lambda: RotaryAttention("even_odd"), positions=False),
    "handwritten_inline": _inline,
}

REJECTED: dict[str, tuple[Callable[[], Case], str]] = {
    "bert": (_bert, "bidirectional"),
    "bidirectional": (_own(lambda: PackedAttention(is_causal=False)), "bidirectional"),
    "inline_root": (_inline_root, "attention is inline in InlineBlock (the model itself)"),
    "cross": (_cross, "cross-attention: keys come from another input than queries"),
    "dropout": (_own(lambda: PackedAttention(dropout=0.1)), "dropout 0.1 is active"),
    "dilated": (
        _own(lambda: PackedAttention(is_causal=False, mask=_dilated)),
        "other mask: neither causal nor a causal sliding window",
    ),
    "alibi": (
        _own(lambda: PackedAttention(is_causal=False, mask=_alibi)),
        "the mask adds a bias to the scores",
    ),
    "written_out": (_own(WrittenOut), "attention is written out as a softmax"),
}
