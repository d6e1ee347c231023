"""Attention with bounded-memory control (Peng et al. 2021, arXiv 2110.02488).

H^k_t = Σ_{s<=t} α_s k_s^T        H^v_t = Σ_{s<=t} α_s v_s^T        [M, K] and [M, V], M slots
p_t = softmax(scale H^k_t q_t)    o_t = (H^v_t)^T p_t

α_s = softmax_{s<=t}(clamp(W_s x_s)) for every slot: each holds a mean of keys and one of values.
With the sums of weights apart (see ``running_softmax``), both are linear attention with decays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, Rotary
from flacompile.layers.base import RecurrentMixer, Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops import linear_attn, linear_attn_step
from flacompile.ops.heads import repeat_heads
from flacompile.running_softmax import RunningSoftmax, without_padding

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class ABCAttention(QKVMixer, RecurrentMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """num_slots: M, None is K; use_input_gate: silu on q, k and v before rotary.

        recency: whether each slot forgets old tokens, at a learned rate, as a conversion starts.
        """

        expand_k: float = 0.5
        expand_v: float = 1.0
        use_short_conv: bool = False
        conv_size: int = 4
        conv_bias: bool = False
        num_slots: int | None = None
        elementwise_affine: bool = True
        norm_eps: float = 1e-5
        use_rope: bool = True
        use_input_gate: bool = False
        use_output_gate: bool = True
        use_norm: bool = True
        clamp_min: float | None = -32
        clamp_max: float | None = 32
        recency: bool = False

    config: Config

    def __init__(self, config: Config) -> None:
        key_dim, value_dim = config.head_dims(config.expand_k, config.expand_v)
        rotary = config.rotary
        if rotary is None and config.use_rope:
            rotary = Rotary.Config.from_theta(10000.0, key_dim)
        super().__init__(config, key_dim, value_dim, rotary, config.qk_norm)
        if config.use_short_conv:
            self.add_convolutions(config.conv_size, config.conv_bias)
        self.num_slots = config.num_slots or key_dim
        self.s_proj = nn.Linear(config.hidden_size, config.num_heads * self.num_slots, bias=False)
        self.running = RunningSoftmax(config.num_heads, self.num_slots, config.recency)
        if config.use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, self.o_proj.in_features, bias=False)
        if config.use_norm:
            self.g_norm = RMSNorm(value_dim, config.norm_eps, affine=config.elementwise_affine)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """H^k, H^v, and the maximum and the sum of each slot's weights."""
        heads, slots = self.config.num_heads, self.num_slots
        return (heads, self.key_dim, slots), (heads, slots, self.value_dim), *[(heads, slots)] * 2

    def by_heads(self, streams: Sequence[Tensor], tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """As the base class, behind silu where ``use_input_gate``."""
        if self.config.use_input_gate:
            streams = [F.silu(stream) for stream in streams]
        return super().by_heads(streams, tokens)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """q [B, T, H, K], k, v of all heads, and s = W_s x [B, T, H, M], clamped."""
        q, k, v, conv = self.qkv(x, conv, tokens)
        s = self.s_proj(x).unflatten(-1, (-1, self.num_slots))
        if self.config.clamp_min is not None or self.config.clamp_max is not None:
            s = s.clamp(self.config.clamp_min, self.config.clamp_max)
        k, v = (repeat_heads(i, self.config.num_heads) for i in (k, v))
        return (q, k, v, without_padding(s, tokens)), conv

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(q, k, v, s) -> o: a read of H^k by q, a softmax over slots, a read of H^v."""
        packed = partial(linear_attn, cu_seqlens=cu_seqlens)
        weigh = partial(self.running, cu_seqlens=cu_seqlens)
        return self._attend(inputs, state, packed, weigh)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``mix``, for inputs [B, H, *]."""
        return self._attend(inputs, state, linear_attn_step, self.running.step)

    def _attend(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        attend: Callable[..., Any],
        weigh: Callable[..., Any],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v, s = inputs
        keys, values, *sums = (None, None) if state is None else state
        weight, g, total, sums = weigh(s, tuple(sums) or None)
        weight = weight.to(v.dtype)
        scores, keys = attend(q, k, weight, gv=g, scale=self.scale, state=keys)
        p = (scores / total).softmax(-1) / total
        o, values = attend(p.to(v.dtype), weight, v, gk=g, scale=1.0, state=values)
        return o, (keys, values, *sums)

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o [RMSNorm(o) ⊙ silu(W_g x)], each where the config has it."""
        if self.config.use_norm:
            o = self.g_norm(o)
        o = o.flatten(2)
        if self.config.use_output_gate:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o)

    @property
    def neutral_half_life(self) -> Tensor:
        """64 tokens, of the slowest slot of each head."""
        return torch.full((self.output_heads,), 64.0)

    def set_half_life(self, tokens: Tensor) -> None:
        """The slots of head h forget half in 1 to tokens[h] tokens."""
        self.running.set_half_life(tokens)

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class; slot m fills where channel m of the key is large, half-lives to 64.

        So p starts as attention over means of keys that stand near, or are alike.
        """
        super().load_attention(weights)
        k = self.projection("k").weight.unflatten(0, (self.kv_heads, -1))
        slots = torch.arange(self.num_slots, device=k.device) % self.key_dim
        groups = self.config.num_heads // self.kv_heads
        self.s_proj.weight.copy_(k[:, slots].repeat_interleave(groups, 0).flatten(0, 1))
        self.set_half_life(self.neutral_half_life)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """Nothing between q, k, v and o but the slots: no gate and no norm."""
        fields = cls.site_fields(site)
        return cls.Config(
            **fields, use_rope=False, use_output_gate=False, use_norm=False, recency=True
        )
