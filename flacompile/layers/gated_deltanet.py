"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464).

    S_t = R_t + β_t k_t (v_t - k_t R_t)^T      R_t = e^g_t S_{t-1}      o_t = scale q_t S_t
    β_t = σ(W_b x_t)                           g_t = -e^A softplus(W_a x_t + b)
    y_t = W_o [RMSNorm(o_t) ⊙ swish(W_g x_t)]

q and k have length one; they and v come through silu, after a short convolution where there is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, activation, at_least_fp32, inverse_softplus, l2norm
from flacompile.layers.base import RecurrentMixer, Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops import delta_rule, delta_rule_step
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import check_shape, expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class GatedDeltaRule(QKVMixer, RecurrentMixer):
    """The delta rule with decay, output norm and output gate; Gated DeltaNet and DeltaProduct.

    Args:
        config: the fields that both have.
        steps: keys, values and betas that a head has for every token.
        forget: whether there is a decay.
        gate: name of the output gate's activation; None leaves the gate out.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """head_dim: of q and k; v's is expand_v as large. num_v_heads: a multiple of num_heads.

        activation, of q, k and v without convolution, and output_norm are left out by a
        conversion; beta_bias is what it adds.
        """

        hidden_size: int = 2048
        num_heads: int = 6
        num_v_heads: int | None = None
        head_dim: int = 256
        expand_v: float = 2.0
        use_short_conv: bool = True
        conv_size: int = 4
        conv_bias: bool = False
        allow_neg_eigval: bool = False
        norm_eps: float = 1e-5
        activation: str = "silu"
        output_norm: bool = True
        beta_bias: bool = False

    config: Config
    replaced: tuple[float, ...] = (0.5, 0.1)  # of β

    def __init__(self, config: Config, steps: int, forget: bool, gate: str | None) -> None:
        value_dim = int(config.head_dim * config.expand_v)
        super().__init__(config, config.head_dim, value_dim, config.rotary, config.qk_norm)
        self.heads = config.num_v_heads or config.num_heads
        multiple = f"a multiple of {config.num_heads}"
        expect(self.heads % config.num_heads == 0, "num_v_heads", multiple, self.heads)
        width, value_heads = config.hidden_size, config.num_v_heads or self.kv_heads
        self.k_proj = nn.Linear(width, steps * self.kv_heads * self.key_dim, config.qkv_bias)
        self.v_proj = nn.Linear(width, steps * value_heads * value_dim, config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * value_dim, width, config.o_bias)
        self.b_proj = nn.Linear(width, steps * self.heads, config.beta_bias)
        self.steps, self.forget = steps, forget
        if forget:
            self.a_proj = nn.Linear(width, self.heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(0, 16).log())
            first = torch.empty(self.heads).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.dt_bias = nn.Parameter(inverse_softplus(first))
        if config.use_short_conv:
            self.add_convolutions(config.conv_size, config.conv_bias)
        self.activation = activation("identity" if config.use_short_conv else config.activation)
        self.gate = None if gate is None else activation(gate)
        if gate is not None:
            self.g_proj = nn.Linear(width, self.heads * value_dim, bias=False)
        self.o_norm = RMSNorm(value_dim, config.norm_eps) if config.output_norm else nn.Identity()

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, one [K, V] a head of v."""
        return ((self.heads, self.key_dim, self.value_dim),)

    @property
    def layers_by_head(self) -> list[nn.Linear]:
        """Of several steps, the rows of k, v and b are those of all heads, step by step."""
        by_step = [self.k_proj, self.v_proj, self.b_proj] if self.steps > 1 else []
        return [layer for layer in super().layers_by_head if layer not in by_step]

    @property
    def output_heads(self) -> int:
        """Those of v."""
        return self.heads

    def beta(self, x: Tensor) -> Tensor:
        """How much of what k recalls is replaced by v, [B, T, steps H] in fp32."""
        beta = at_least_fp32(self.b_proj(x)).sigmoid()
        return 2 * beta if self.config.allow_neg_eigval else beta

    def decay(self, x: Tensor) -> Tensor:
        """g [B, T, H], the log decay in fp32."""
        if not self.forget:
            return at_least_fp32(x.new_zeros(*x.shape[:2], self.heads))
        A_log, dt = at_least_fp32(self.A_log), at_least_fp32(self.a_proj(x))
        return -A_log.exp() * F.softplus(dt + self.dt_bias)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """q, k of length one [B, T, *, K], v, g and β; of n steps k, v and β have n H heads."""
        q, k, v, conv = self.qkv(x, conv, tokens)
        q, k, v = self.activation(q), self.activation(k), self.activation(v)
        g, beta = tokens.zero_padding(self.decay(x)), tokens.zero_padding(self.beta(x))
        q = repeat_heads(l2norm(q), self.heads)
        k, v = (repeat_heads(i, beta.shape[2]) for i in (l2norm(k), v))
        return (q, k, v, g, beta), conv

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o = delta_rule(q, k, v, g, β)."""
        first = None if state is None else state[0]
        o, last = delta_rule(*inputs, scale=self.scale, state=first, cu_seqlens=cu_seqlens)
        return o, (last,)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``mix``, for inputs [B, H, *]."""
        o, last = delta_rule_step(*inputs, scale=self.scale, state=state[0])
        return o, (last,)

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o [RMSNorm(o) ⊙ gate(W_g x)], each where the config has it."""
        o = self.o_norm(o).flatten(2)
        return self.o_proj(o if self.gate is None else o * self.gate(self.g_proj(x)))

    @torch.no_grad()
    def set_half_life(self, tokens: Tensor) -> None:
        """Makes the decay of head h halve the state every tokens[h] tokens, whatever the input.

        softplus(b) = ln 2 / tokens, with A = 0 and W_a = 0. Without a decay it does nothing.

        Args:
            tokens: [H], > 0.
        """
        check_shape("tokens", tokens, (self.heads,))
        if self.forget:
            self.A_log.zero_()
            self.a_proj.weight.zero_()
            self.dt_bias.copy_(inverse_softplus(math.log(2) / tokens.double()))

    @torch.no_grad()
    def set_replaced(self, share: Tensor) -> None:
        """Makes β of head h share[h], whatever the input; of several steps, that of the last.

        Args:
            share: [H], in (0, 1).
        """
        check_shape("share", share, (self.heads,))
        expect(self.b_proj.bias is not None, "beta_bias", "True in the config", False)
        share = share.double() / (2 if self.config.allow_neg_eigval else 1)
        self.b_proj.weight[-self.heads :].zero_()
        self.b_proj.bias[-self.heads :].copy_(share.logit())

    def attention_rows(self, name: str, parameter: Tensor) -> Tensor:
        """Of k and v the rows of the last step, which writes as the attention did."""
        return parameter.unflatten(0, (self.steps, -1))[-1] if name in ("k", "v") else parameter

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class, with half-lives from 8 to 128 tokens and β = 1/2.

        Of several steps the last one takes over the attention. Those before it add nothing yet
        (v = 0) and erase 1/20 of what lies along some direction.
        """
        super().load_attention(weights)
        self.v_proj.weight.unflatten(0, (self.steps, -1))[:-1].zero_()
        beta = 0.025 if self.config.allow_neg_eigval else 0.05
        self.b_proj.weight.zero_()
        self.b_proj.bias.fill_(math.log(beta / (1 - beta)))
        self.set_replaced(torch.full((self.heads,), self.replaced[0]))
        self.set_half_life(self.neutral_half_life)

    @classmethod
    def conversion_fields(cls, site: AttentionSite) -> dict[str, Any]:
        """Nothing between q, k, v and o but the delta rule, whose β has a bias to start from.

        q and k keep their length of one, without which the rule diverges: scale is 1.
        """
        return cls.site_fields(site) | {
            "scale": 1.0,
            "expand_v": 1.0,
            "use_short_conv": False,
            "activation": "identity",
            "output_norm": False,
            "beta_bias": True,
        }


class GatedDeltaNet(GatedDeltaRule):
    @dataclass(frozen=True, kw_only=True)
    class Config(GatedDeltaRule.Config):
        use_gate: bool = True
        output_gate_activation: str = "swish"

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(
            config, 1, True, config.output_gate_activation if config.use_gate else None
        )

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """``conversion_fields``, and no output gate."""
        return cls.Config(**cls.conversion_fields(site), use_gate=False)
