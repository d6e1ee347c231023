"""LightNet: linear attention that normalises over time, once (Qin et al. 2024, arXiv 2405.21022).

S_t = Σ_{s<=t} softmax_{s<=t}(k_s) v_s^T        o_t = scale silu(q_t) S_t
y_t = W_o [RMSNorm(o_t) ⊙ swish(W_2 W_1 x_t)]

The softmax is over time, for every key channel. With its sums apart (see ``running_softmax``) it is
linear attention with decays; the norm is over all heads together.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.blocks import RMSNorm, low_rank
from flacompile.layers.base import RecurrentMixer, Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops import linear_attn, linear_attn_step
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import expect
from flacompile.running_softmax import RunningSoftmax, without_padding

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class LightNetAttention(QKVMixer, RecurrentMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """expand_ratio: K of a head; num_heads: None is hidden_size / expand_ratio.

        The last four are for conversions. mirrored: [k, -k] for k, softmax([q, -q]) for silu(q);
        recency: whether each channel of k forgets old tokens, at a learned rate.
        """

        num_heads: int | None = None
        expand_ratio: int | None = 128
        use_short_conv: bool = False
        conv_size: int = 4
        conv_bias: bool = False
        gate_low_rank_dim: int = 128
        elementwise_affine: bool = True
        norm_eps: float = 1e-5
        mirrored: bool = False
        use_output_gate: bool = True
        output_norm: bool = True
        recency: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        width, heads, key_dim = config.hidden_size, config.num_heads, config.expand_ratio
        if heads is None:
            expect(key_dim is not None, "num_heads", "a number where expand_ratio is None", None)
            heads = width // (key_dim or width)
            config = dataclasses.replace(config, num_heads=heads)
        value_dim = config.head_dim or width // heads
        key_dim = config.head_dim or key_dim or value_dim
        super().__init__(config, key_dim, value_dim, config.rotary, config.qk_norm)
        if config.use_short_conv:
            self.add_convolutions(config.conv_size, config.conv_bias, activation=None)
        self.num_slots = self.key_dim * (1 + config.mirrored)
        self.running = RunningSoftmax(heads, self.num_slots, config.recency)
        inner = heads * value_dim
        if config.use_output_gate:
            self.g_proj = low_rank(width, config.gate_low_rank_dim, inner, bias=False)
        if config.output_norm:
            self.g_norm = RMSNorm(inner, config.norm_eps, affine=config.elementwise_affine)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, and the maximum and the sum of each channel's weights."""
        heads, slots = self.output_heads, self.num_slots
        return (heads, slots, self.value_dim), (heads, slots), (heads, slots)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """silu(q), k with no weight at padding, and v; mirrored, softmax([q, -q]) and [k, -k]."""
        q, k, v, conv = self.qkv(x, conv, tokens)
        if self.config.mirrored:
            q, k = torch.cat((q, -q), -1).softmax(-1), torch.cat((k, -k), -1)
        else:
            q = F.silu(q)
        k, v = (repeat_heads(i, self.output_heads) for i in (without_padding(k, tokens), v))
        return (q, k, v), conv

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o = scale (q / Σ e^k) S with S_t = e^g S_{t-1} + e^k v^T, by ``running_softmax``."""
        q, k, v = inputs
        first, *sums = (None,) if state is None else state
        k, g, total, sums = self.running(k, tuple(sums) or None, cu_seqlens)
        q, k = (q / total).to(v.dtype), k.to(v.dtype)
        o, last = linear_attn(q, k, v, g, scale=self.scale, state=first, cu_seqlens=cu_seqlens)
        return o, (last, *sums)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``mix``, for inputs [B, H, *]."""
        q, k, v = inputs
        k, g, total, sums = self.running.step(k, state[1:])
        q, k = (q / total).to(v.dtype), k.to(v.dtype)
        o, last = linear_attn_step(q, k, v, g, scale=self.scale, state=state[0])
        return o, (last, *sums)

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o [RMSNorm(o) ⊙ swish(W_2 W_1 x)], each where the config has it."""
        o = o.flatten(2)
        if self.config.output_norm:
            o = self.g_norm(o)
        if self.config.use_output_gate:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o)

    @property
    def neutral_half_life(self) -> Tensor:
        """64 tokens, of the slowest channel of each head."""
        return torch.full((self.output_heads,), 64.0)

    def set_half_life(self, tokens: Tensor) -> None:
        """The channels of head h forget half in 1 to tokens[h] tokens."""
        self.running.set_half_life(tokens)

    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class; half-lives to 64 tokens."""
        super().load_attention(weights)
        self.set_half_life(self.neutral_half_life)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """o is a mean of v under weights of sum one, to which no gate or norm is applied."""
        fields = cls.site_fields(site)
        fields["scale"] = 1.0
        return cls.Config(
            **fields, mirrored=True, recency=True, use_output_gate=False, output_norm=False
        )
