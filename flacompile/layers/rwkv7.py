"""RWKV-7, Goose (Peng et al. 2025, arXiv 2503.14456).

S_t = (diag(e^w_t) - (κ_t ⊙ a_t) κ_t^T) S_{t-1} + k'_t v_t^T    w_t = -e^(-1/2) σ(lora_w)
κ_t = norm(k_t ⊙ k_k)    k'_t = k_t ⊙ (1 + (a_t - 1) ⊙ k_a)     a_t = σ(lora_a)
o_t = GroupNorm(r_t S_t) + (Σ r_t ⊙ k'_t ⊙ r_k) v_t             y_t = W_o [o_t ⊙ lora_g]

Every stream reads x_t + (x_{t-1} - x_t) ⊙ x_i, i one of r, w, k, v, a, g. A layer after the first
moves its v_t towards that of the first, v_t + σ(lora_v) ⊙ (v_first - v_t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from flacompile.blocks import at_least_fp32, l2norm, token_shift
from flacompile.layers.base import RecurrentState, Tokens, in_order
from flacompile.layers.rwkv import LowRank, RWKVAttention, bonus
from flacompile.ops import dplr, dplr_step
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import check_shape, expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionWeights

FASTEST = math.exp(-0.5)  # the largest -w


class RWKV7Attention(RWKVAttention):
    """A decay, a key to remove and a rate of removal for every channel."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RWKVAttention.Config):
        """num_heads: None is hidden_size / head_dim; a rank of None follows from the sizes.

        layer_idx: place of the layer in its model; those after 0 take ``v_first``.
        value_dim: of all heads together, None is that of the keys.
        num_hidden_layers: of the model; the first weights depend on both.
        """

        num_heads: int = None  # type: ignore[assignment]
        decay_low_rank_dim: int | None = None
        gate_low_rank_dim: int | None = None
        a_low_rank_dim: int | None = None
        v_low_rank_dim: int | None = None
        layer_idx: int = 0
        value_dim: int | None = None
        num_hidden_layers: int | None = None

        def __post_init__(self) -> None:
            if self.num_heads is None:
                object.__setattr__(self, "num_heads", self.hidden_size // (self.head_dim or 64))

        def dims(self) -> tuple[int, int]:
            """(K, V) of a head."""
            key = self.head_dim or self.hidden_size // self.num_heads
            return key, key if self.value_dim is None else self.value_dim // self.num_heads

        def rank(self, given: int | None, factor: float) -> int:
            """factor sqrt(D) in steps of 32, where none is given."""
            steps = round(factor * math.sqrt(self.hidden_size) / 32)
            return max(1, steps) * 32 if given is None else given

    config: Config
    replaced: tuple[float, ...] = (0.1, 0.3)  # of a
    places: ClassVar[dict[str, str]] = {"q": "r_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

    def __init__(self, config: Config) -> None:
        K, V = config.dims()
        super().__init__(config, K, V, K * config.norm_eps)
        width, keys, values = config.hidden_size, config.num_heads * K, config.num_heads * V
        self.mixes = [f"x_{name}" for name in ("rwkvag" if config.use_output_gate else "rwkva")]
        for name in self.mixes:
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, width)))
        self.k_k, self.k_a = nn.Parameter(torch.ones(keys)), nn.Parameter(torch.ones(keys))
        self.r_k = nn.Parameter(torch.zeros(config.num_heads, K))
        wide = K / 64  # the ranks of wider heads are larger
        rank = config.rank(config.decay_low_rank_dim, 2.5 * wide)
        self.w_lora = LowRank(width, rank, keys, nn.Tanh())
        rank = config.rank(config.a_low_rank_dim, 2.5 * wide)
        self.a_lora = LowRank(width, rank, keys, nn.Identity())
        if config.layer_idx > 0:
            rank = config.rank(config.v_low_rank_dim, 1.7 * wide)
            self.v_lora = LowRank(width, rank, values, nn.Identity())
        if config.use_output_gate:
            rank = config.rank(config.gate_low_rank_dim, 5)
            self.g_lora = LowRank(width, rank, values, nn.Sigmoid(), bias=False)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """The first weights of the paper, spread over channels and layers."""
        layer, layers = self.config.layer_idx, self.config.num_hidden_layers
        layers = layer + 1 if layers is None else layers
        depth, ahead = layer / max(layers - 1, 1), 1 - layer / layers

        def ramp(count: int) -> Tensor:
            """[count] from 0 to 1."""
            return torch.linspace(0, 1, count, device=self.k_k.device)

        width = self.config.hidden_size
        for name, power in zip(self.mixes, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=False):
            channel = torch.arange(width, device=self.k_k.device) / width
            self.get_parameter(name).copy_(1 - channel ** (power * ahead))
        key, in_head = ramp(self.k_k.numel()), 2 * ramp(self.key_dim) - 1
        in_head = (in_head * in_head.abs()).repeat(self.config.num_heads)
        self.k_k.copy_(0.71 - 0.1 * (key - 0.5))
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        self.w_lora.start_at(6 * key ** (1 + depth**0.3) - 5.5 + 2.5 * in_head)
        self.a_lora.start_at(-0.19 + 0.3 * in_head + 0.4 * (key - 0.5))
        if layer > 0:
            value = ramp(self.v_lora.up.out_features)
            self.v_lora.start_at(0.73 - 0.4 * (value - 0.5))

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        v_first: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """As the base class; v_first [B, T, H V] is ``values`` of layer 0, for those after it."""
        self.validate(x, state, mask, cu_seqlens)
        if x.shape[1] == 0:
            return self.without_tokens(x, state, cu_seqlens)
        x = self._beside(x, v_first)
        return in_order(self.sequence, x, state, mask, cu_seqlens)

    def step(
        self, x: Tensor, state: RecurrentState, v_first: Tensor | None = None
    ) -> tuple[Tensor, RecurrentState]:
        """As the base class, with v_first [B, H V]."""
        self.validate_step(x, state)
        return self.advance(self._beside(x, v_first), state)

    def values(
        self,
        x: Tensor,
        state: RecurrentState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """v [B, T, H V] of layer 0, the ``v_first`` of the layers after it; as ``forward``."""
        expect(self.config.layer_idx == 0, "layer_idx", "0", self.config.layer_idx)
        self.validate(x, state, mask, cu_seqlens)

        def project(x: Tensor, state: RecurrentState | None, tokens: Tokens) -> tuple[Tensor, None]:
            """v [B, T, H V] of the shifted x; no state."""
            before, _ = token_shift(x, None if state is None else state.conv[0], tokens)
            v = self.projection("v")(torch.addcmul(x, before - x, self.get_parameter("x_v")))
            v = v.unflatten(-1, (-1, self.value_dim))
            return repeat_heads(v, self.config.num_heads).flatten(2), None

        return in_order(project, x, state, mask, cu_seqlens)[0]

    def _beside(self, x: Tensor, v_first: Tensor | None) -> Tensor:
        """x with v_first behind its channels, so that both move alike."""
        layer = self.config.layer_idx
        if layer == 0:
            expect(v_first is None, "v_first", "None in layer 0", "a tensor")
            return x
        width = self.config.num_heads * self.value_dim
        expect(v_first is not None, "v_first", f"the values of layer 0 in layer {layer}", None)
        assert v_first is not None
        check_shape("v_first", v_first, (*x.shape[:-1], width))
        return torch.cat((x, v_first), -1)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """r, k', v, w, -κ, κ ⊙ a of all heads and, for an output gate, its value."""
        x, v_first = x[..., : self.config.hidden_size], x[..., self.config.hidden_size :]
        before, last = token_shift(x, None if conv is None else conv[0], tokens)
        delta, mixes = before - x, [self.get_parameter(name) for name in self.mixes]
        xr, xw, xk, xv, xa, *xg = (torch.addcmul(x, delta, mix) for mix in mixes)
        mixed = {"q": xr, "k": xk, "v": xv}
        r, k, v = self.by_heads([self.projection(i)(y) for i, y in mixed.items()], tokens)
        k, v = (repeat_heads(i, self.config.num_heads) for i in (k, v))
        if self.config.layer_idx > 0:
            v = torch.lerp(v, v_first.view_as(v), self.v_lora(xv).sigmoid().view_as(v))
        w = tokens.zero_padding(-FASTEST * at_least_fp32(self.w_lora(xw)).sigmoid()).view_as(k)
        a = self.a_lora(xa).sigmoid().view_as(k)
        removed = l2norm(k * self.k_k.view(k.shape[2:]))
        k = k * (1 + (a - 1) * self.k_a.view(k.shape[2:]))
        written, rate = tokens.zero_padding(k), tokens.zero_padding(removed * a)
        gate = [self.g_lora(i) for i in xg]
        return (r, written, v, w, -removed, rate, *gate), (last,)

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """o = dplr(r, k', v, w, -κ, κ ⊙ a)."""
        first = None if state is None else state[0]
        o, last = dplr(*inputs[:6], scale=self.scale, state=first, cu_seqlens=cu_seqlens)
        return o, (last,)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``mix``, for inputs [B, H, *]."""
        o, last = dplr_step(*inputs[:6], scale=self.scale, state=state[0])
        return o, (last,)

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o [(GroupNorm(o) + (Σ r ⊙ k' ⊙ r_k) v) ⊙ gate]."""
        r, k, v, _, _, _, *gate = inputs
        o = self.g_norm(o) if self.config.output_norm else o.flatten(2)
        o = o + bonus(r, k, self.r_k, v).flatten(2)
        return self.o_proj(o * gate[0] if gate else o)

    @property
    def decay(self) -> LowRank:
        """The low-rank map whose result z decays by w = -e^(-1/2) σ(z)."""
        return self.w_lora

    def decay_logit(self, rate: Tensor) -> Tensor:
        """No state falls faster than by e^-FASTEST a token; a higher rate comes near it."""
        return torch.logit((rate / FASTEST).clamp(max=0.99))

    def set_replaced(self, share: Tensor) -> None:
        """Makes a of head h share[h], whatever the input.

        Args:
            share: [H], in (0, 1).
        """
        check_shape("share", share, (self.config.num_heads,))
        self.a_lora.start_at(share.double().logit().repeat_interleave(self.key_dim))

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class; a key replaces little, and no token looks at the one before it."""
        super().load_attention(weights)
        self.set_replaced(torch.full((self.config.num_heads,), self.replaced[0]))
        self.k_k.fill_(1)
        for parameter in (self.k_a, self.r_k, *(self.get_parameter(name) for name in self.mixes)):
            parameter.zero_()
