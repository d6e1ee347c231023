"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635).

S_t = diag(e^g_t) S_{t-1} + k_t v_t^T        g_t = log σ(W_2 W_1 x_t + b) / normalizer
o_t = scale q_t S_t                          y_t = W_o [RMSNorm(o_t) ⊙ swish(W_g x_t)]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, activation, at_least_fp32, low_rank
from flacompile.layers.base import RecurrentMixer, Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import check_shape

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class DecayedAttention(QKVMixer, RecurrentMixer):
    """Linear attention with a learned decay, output norm and output gate; GLA and its relatives.

    Subclasses set ``gk_proj`` and define ``decay`` and ``decay_layer``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """output_norm: False leaves out the norm of o, as a conversion starts."""

        expand_k: float = 1.0
        expand_v: float = 1.0
        feature_map: str | None = None
        use_short_conv: bool = False
        conv_size: int = 4
        conv_bias: bool = False
        use_output_gate: bool = True
        gate_fn: str = "swish"
        elementwise_affine: bool = True
        norm_eps: float = 1e-5
        gate_logit_normalizer: float = 16
        output_norm: bool = True

    config: Config
    gk_proj: nn.Module

    def __init__(self, config: Config) -> None:
        dims = config.head_dims(config.expand_k, config.expand_v)
        super().__init__(config, *dims, config.rotary, config.qk_norm)
        if config.use_short_conv:
            self.add_convolutions(config.conv_size, config.conv_bias)
        self.feature_map = activation(config.feature_map or "identity")
        self.gate_fn = activation(config.gate_fn)
        if config.use_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, self.o_proj.in_features, bias=False)
        fused = config.use_output_gate and config.gate_fn == "swish"
        self.norm_name = "g_norm_swish_gate" if fused else "g_norm"
        if config.output_norm:
            norm = RMSNorm(self.value_dim, config.norm_eps, affine=config.elementwise_affine)
            setattr(self, self.norm_name, norm)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, one [K, V] a head."""
        return ((self.config.num_heads, self.key_dim, self.value_dim),)

    def decay(self, x: Tensor) -> Tensor:
        """g [B, T, H] or [B, T, H, K], the log decay in fp32."""
        raise NotImplementedError

    @property
    def decay_layer(self) -> nn.Linear:
        """The layer whose bias is the logit of the decay."""
        raise NotImplementedError

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """φ(q), φ(k), v and the decay g, of all heads; k and g are zero at padding."""
        q, k, v, conv = self.qkv(x, conv, tokens)
        q, k = self.feature_map(q), tokens.zero_padding(self.feature_map(k))
        g = tokens.zero_padding(self.decay(x))
        k, v, g = (repeat_heads(i, self.config.num_heads) for i in (k, v, g))
        return (q, k, v, g), conv

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o [RMSNorm(o) ⊙ gate(W_g x)], each where the config has it."""
        if self.config.output_norm:
            o = self.get_submodule(self.norm_name)(o)
        o = o.flatten(2)
        if self.config.use_output_gate:
            o = o * self.gate_fn(self.g_proj(x))
        return self.o_proj(o)

    @torch.no_grad()
    def set_half_life(self, tokens: Tensor) -> None:
        """Makes the decay of head h halve the state every tokens[h] tokens, whatever the input.

        log σ(b) / normalizer = -ln 2 / tokens. Heads that share a decay take the geometric mean.

        Args:
            tokens: [H], > 0.
        """
        check_shape("tokens", tokens, (self.config.num_heads,))
        layer, decays = self.decay_layer, len(self.decay_groups)
        tokens = tokens.double().log().view(decays, -1).mean(1).exp()
        log_sigmoid = -math.log(2) * self.config.gate_logit_normalizer / tokens
        bias = log_sigmoid - torch.log(-torch.expm1(log_sigmoid))
        layer.weight.zero_()
        layer.bias.copy_(bias.repeat_interleave(layer.out_features // decays))

    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class; half-lives spread from 8 to 128 tokens over the heads.

        Each head is scaled by 1 - e^g, so that the decays it sums over add up to one: the size of
        what a softmax would give, which q·k alone does not have.
        """
        super().load_attention(weights)
        self.set_half_life(self.neutral_half_life)
        self.scale_heads(1 - 2 ** (-1 / self.neutral_half_life))

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """Nothing between q, k, v and o but the decayed sum: no conv, no gate, no norm."""
        return cls.Config(
            **cls.site_fields(site), use_short_conv=False, use_output_gate=False, output_norm=False
        )


class GatedLinearAttention(DecayedAttention):
    """A decay for every key channel, from a low-rank map of x."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DecayedAttention.Config):
        expand_k: float = 0.5
        gate_low_rank_dim: int = 16
        clamp_min: float | None = None

    config: Config
    gk_proj: nn.Sequential

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gk_proj = low_rank(
            config.hidden_size, config.gate_low_rank_dim, self.kv_heads * self.key_dim
        )

    def decay(self, x: Tensor) -> Tensor:
        """g = log σ(W_2 W_1 x + b) / normalizer, [B, T, H_kv, K]."""
        g = F.logsigmoid(at_least_fp32(self.gk_proj(x))) / self.config.gate_logit_normalizer
        g = g if self.config.clamp_min is None else g.clamp(min=self.config.clamp_min)
        return g.unflatten(-1, (self.kv_heads, self.key_dim))

    @property
    def decay_layer(self) -> nn.Linear:
        """W_2 and b, of every key channel."""
        return self.gk_proj[1]  # type: ignore[return-value]

    @property
    def decay_groups(self) -> list[range]:
        """Heads with one key have one decay."""
        return self.heads_by_key
