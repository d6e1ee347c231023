"""Models and attentions written by hand, of which tests/models.py makes its tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, DIM, LAYERS, HEADS, TIME = 64, 32, 2, 4, 20


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
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(x).relu()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class InlineSoftmax(InlineBlock):
    """The same written out, with a mask of the size of the scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


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


class Funnel(nn.Module):
    """An attention right before another linear layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.after = PackedAttention(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


class WrittenOut(PackedAttention):
    """Softmax of a product, by hand."""

    def __init__(self, normed: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1)):
        super().__init__()
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = torch.ones(time, time, dtype=torch.bool).triu(1)
        y = self.normed(scores.masked_fill(hidden, -math.inf)) @ v
        return self.out(y.transpose(1, 2).flatten(-2))


class Einsum(PackedAttention):
    """The same as sums over letters, capped, masked by addition."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # [B, T, H, K]
        scores = torch.tanh(torch.einsum("bjhd, bihd -> bhij", k, q) * 0.1) * 3.0
        mask = torch.full((x.shape[1],) * 2, -math.inf).triu(1)
        y = torch.einsum("bhij, bjhd -> bihd", torch.softmax(scores + mask, 3), v)
        return self.out(y.flatten(-2))


class Multihead(nn.Module):
    """PyTorch's own layer with a mask that hides what is to come."""

    def __init__(self, **options: Any):
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.inner(x, x, x, attn_mask=hidden, **self.options)[0]


class Encoder(GPT):
    """nn.TransformerEncoder with a causal mask."""

    def __init__(self, batch_first: bool = True):
        super().__init__(nn.Identity)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, 0.0, batch_first=batch_first)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=batch_first)
        self.batch_first = batch_first

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        assert self.positions is not None
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        if not self.batch_first:
            return self.head(self.blocks(x.transpose(0, 1), mask, padding).transpose(0, 1))
        return self.head(self.blocks(x, mask, padding))
