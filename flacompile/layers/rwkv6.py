"""RWKV-6, Finch (Peng et al. 2024, arXiv 2404.05892).

S_t = diag(e^w_t) S_{t-1} + k_t v_t^T         w_t = -exp(W_2 tanh(W_1 x^w_t) + b)
o_t = r_t (S_{t-1} + diag(u) k_t v_t^T)       y_t = W_o [GroupNorm(o_t) ⊙ swish(g_t)]

Every stream has an input of its own, x^i_t = x_t + δ_t ⊙ (m_i + A_i tanh(B_i (x_t + δ_t ⊙ μ))),
i one of r, w, k, v, g, from δ_t = x_{t-1} - x_t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import activation, at_least_fp32, token_shift
from flacompile.layers.base import Tokens
from flacompile.layers.rwkv import LowRank, RWKVAttention, bonus
from flacompile.ops import context, linear_attn, linear_attn_step
from flacompile.ops.heads import repeat_heads

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionWeights

FASTEST = 30.0  # the largest -w: e^-30 is 0 but for rounding, which e^w would blow up in gradients


class ShiftedLinear(nn.Module):
    """W (x + δ ⊙ μ)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out, bias=False)
        self.mu = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        """x [..., dim] and δ = x_{t-1} - x_t -> [..., out]."""
        return self.linear(torch.addcmul(x, delta, self.mu))


class RWKV6Attention(RWKVAttention):
    """w_t decays every key channel; u is what the current token counts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RWKVAttention.Config):
        expand_k: float = 0.5
        expand_v: float = 1.0
        gate_fn: str = "swish"
        proj_low_rank_dim: int = 32
        gate_low_rank_dim: int = 64

    config: Config
    weights_read = ("x_proj.2",)
    places: ClassVar[dict[str, str]] = {
        "q": "r_proj.linear", "k": "k_proj.linear", "v": "v_proj.linear", "o": "o_proj",
    }  # fmt: skip

    def __init__(self, config: Config) -> None:
        dims = config.head_dims(config.expand_k, config.expand_v)
        super().__init__(config, *dims, config.norm_eps)
        width, heads = config.hidden_size, config.num_heads
        rank = 5 * config.proj_low_rank_dim
        self.x_proj = nn.Sequential(
            ShiftedLinear(width, rank), nn.Tanh(), nn.Linear(rank, width, bias=False)
        )
        self.x_bias = nn.Parameter(torch.zeros(5, width))
        w = LowRank(width, config.gate_low_rank_dim, heads * self.key_dim, nn.Tanh())
        w.start_at(torch.linspace(-6, -1, heads * self.key_dim))  # from 280 tokens to 2
        self.w_proj = nn.ModuleDict({"linear": w})
        self.bonus = nn.Parameter(torch.zeros(heads, self.key_dim))
        self.gate_fn = activation(config.gate_fn)
        if config.use_output_gate:
            gate = nn.Linear(width, heads * self.value_dim, bias=False)
            self.g_proj = nn.ModuleDict({"linear": gate})

    def streams(self, x: Tensor, delta: Tensor) -> Sequence[Tensor]:
        """x^r, x^w, x^k, x^v and, for an output gate, x^g, each [B, T, D]."""
        low = self.x_proj[0](x, delta).tanh().unflatten(-1, (5, -1))
        weight = self.x_proj[2].get_parameter("weight").unflatten(1, (5, -1))
        m = torch.einsum("btir,dir->ibtd", low, weight)
        count = 4 + self.config.use_output_gate
        return [torch.addcmul(x, delta, self.x_bias[i] + m[i]) for i in range(count)]

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """r, k, v, w of all heads, and an output gate if there is one; k and w are 0 at padding."""
        before, last = token_shift(x, None if conv is None else conv[0], tokens)
        xr, xw, xk, xv, *xg = self.streams(x, before - x)
        mixed = {"q": xr, "k": xk, "v": xv}
        r, k, v = self.by_heads([self.projection(i)(y) for i, y in mixed.items()], tokens)
        k, v = (repeat_heads(i, self.config.num_heads) for i in (tokens.zero_padding(k), v))
        w = -at_least_fp32(self.decay(xw)).clamp(max=math.log(FASTEST)).exp()
        gate = [self.gate_fn(self.g_proj["linear"](i)) for i in xg]
        return (r, k, v, tokens.zero_padding(w).view_as(r), *gate), (last,)

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Reads r_t S_{t-1}: with r one token earlier that is a read after the write, o one later.

        The first token of a sequence reads the state that the sequence began with.
        """
        r, k, v, w = inputs[:4]
        first = None if state is None else state[0]
        if context.active():  # the state before these tokens is known to the op alone
            k, v, w = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (k, v, w))
            r = F.pad(r, (0, 0, 0, 0, 0, 1))
            o, last = linear_attn(r, k, v, w, scale=self.scale, state=first)
            return o[:, :-1], (last,)
        o, last = linear_attn(
            r.roll(-1, 1), k, v, w, scale=self.scale, state=first, cu_seqlens=cu_seqlens
        )
        start = torch.zeros_like(last) if first is None else first
        if cu_seqlens is None:
            before = self.read(r[:, :1], start[:, None])
            return torch.cat((before.to(o.dtype), o), 1)[:, : r.shape[1]], (last,)
        time = torch.arange(r.shape[1], device=r.device)
        sequence = torch.searchsorted(cu_seqlens, time, right=True) - 1
        is_first = cu_seqlens[sequence] == time
        firsts = cu_seqlens[:-1].clamp(max=r.shape[1] - 1)  # of an empty sequence any token
        before = self.read(r[0, firsts], start)[None, sequence]
        return torch.where(is_first[:, None, None], before.to(o.dtype), o.roll(1, 1)), (last,)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o = scale r S, and the state after k, v and w."""
        r, k, v, w = inputs[:4]
        o = self.read(r, state[0])
        return o.to(v.dtype), linear_attn_step(r, k, v, w, state=state[0])[1:]

    def read(self, r: Tensor, state: Tensor) -> Tensor:
        """scale r S: r [..., K], S [..., K, V]."""
        return self.scale * (r.to(state.dtype)[..., None, :] @ state)[..., 0, :]

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o [GroupNorm(o + scale (Σ r ⊙ u ⊙ k) v) ⊙ gate]."""
        r, k, v, _, *gate = inputs
        o = o + self.scale * bonus(r, k, self.bonus, v)
        o = self.g_norm(o) if self.config.output_norm else o.flatten(2)
        return self.o_proj(o * gate[0] if gate else o)

    @property
    def decay(self) -> LowRank:
        """The low-rank map whose result z decays by w = -e^z."""
        return self.w_proj["linear"]  # type: ignore[return-value]

    def decay_logit(self, rate: Tensor) -> Tensor:
        """log rate."""
        return rate.log()

    @torch.no_grad()
    def set_half_life(self, tokens: Tensor) -> None:
        """As the base class, with u = e^-w: the current token counts as the first of the decay."""
        super().set_half_life(tokens)
        self.bonus.copy_((2 ** (1 / tokens.double()))[:, None])

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class; no token looks at the one before it."""
        super().load_attention(weights)
        self.scale_heads(1 / self.bonus[:, 0])  # a read before the decay is e^-w times as large
        self.x_bias.zero_()
        self.x_proj[2].get_parameter("weight").zero_()
