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

import torch.nn.functional as F
from torch import Tensor

from flacompile.blocks import RMSNorm, activation, low_rank
from flacompile.layers.base import RecurrentMixer, Tokens, repeat_heads
from flacompile.layers.qkv import QKVMixer
from flacompile.ops import linear_attn, linear_attn_step
from flacompile.ops.validate import expect
from flacompile.running_softmax import running_softmax, running_softmax_step, without_padding

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class LightNetAttention(QKVMixer, RecurrentMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """expand_ratio: K of a head; num_heads: None is hidden_size / expand_ratio.

        feature_map: of q; use_output_gate, output_norm: False as a conversion starts.
        """

        num_heads: int | None = None  # type: ignore[assignment]
        expand_ratio: int | None = 128
        use_short_conv: bool = False
        conv_size: int = 4
        conv_bias: bool = False
        gate_low_rank_dim: int = 128
        elementwise_affine: bool = True
        norm_eps: float = 1e-5
        feature_map: str = "silu"
        use_output_gate: bool = True
        output_norm: bool = True

    config: Config

    def __init__(self, config: Config) -> None:
        width, heads, key_dim = config.hidden_size, config.num_heads, config.expand_ratio
        expect(heads is not None or key_dim is not None, "num_heads", "a number", None)
        heads = width // key_dim if heads is None else heads  # type: ignore[operator]
        config = dataclasses.replace(config, num_heads=heads)
        value_dim = config.head_dim or width // heads
        super().__init__(
            config,
            config.head_dim or key_dim or value_dim,
            value_dim,
            config.rotary,
            config.qk_norm,
        )
        if config.use_short_conv:
            self.add_convolutions(config.conv_size, config.conv_bias, activation=None)
        self.feature_map = activation(config.feature_map)
        inner = heads * value_dim
        if config.use_output_gate:
            self.g_proj = low_rank(width, config.gate_low_rank_dim, inner, bias=False)
        if config.output_norm:
            self.g_norm = RMSNorm(inner, config.norm_eps, affine=config.elementwise_affine)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, and the maximum and the sum of each channel's weights."""
        heads, key_dim = self.config.num_heads, self.key_dim
        return (heads, key_dim, self.value_dim), (heads, key_dim), (heads, key_dim)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        q, k, v, conv = self.qkv(x, conv, tokens)
        k, v = (repeat_heads(i, self.config.num_heads) for i in (without_padding(k, tokens), v))
        return (self.feature_map(q), k, v), conv

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = inputs
        first, *sums = (None,) if state is None else state
        k, g, total, sums = running_softmax(k, tuple(sums) or None, cu_seqlens)
        q, k = (q / total).to(v.dtype), k.to(v.dtype)
        o, last = linear_attn(q, k, v, g, scale=self.scale, state=first, cu_seqlens=cu_seqlens)
        return o, (last, *sums)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = inputs
        k, g, total, sums = running_softmax_step(k, state[1:])
        q, k = (q / total).to(v.dtype), k.to(v.dtype)
        o, last = linear_attn_step(q, k, v, g, scale=self.scale, state=state[0])
        return o, (last, *sums)

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        o = o.flatten(2)
        if self.config.output_norm:
            o = self.g_norm(o)
        if self.config.use_output_gate:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """q as it is, and nothing between v and o but the mean over time: no gate and no norm."""
        return cls.Config(
            **cls.site_fields(site),
            feature_map="identity",
            use_output_gate=False,
            output_norm=False,
        )
