"""Attention by a polynomial of second order, of which Based and ReBased choose the coefficients.

o_t = Σ_s w_ts v_s / (eps + Σ_s w_ts)        w = c0 + c1 a + c2 a²,  a = φ(q_t)·φ(k_s),  s <= t
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from flacompile.layers.base import Tokens
from flacompile.layers.fading import FadingAttention
from flacompile.ops.heads import repeat_heads
from flacompile.ops.quadratic_attn import num_features, quadratic_attn, quadratic_attn_step


class QuadraticAttention(FadingAttention):
    """Means of v under such weights; φ is 1 unless a subclass sets ``feature_map``.

    Args:
        config: as of any mixer with the projections of attention.
        weights: c0, c1 and c2.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FadingAttention.Config):
        """feature_dim: channels K of a head of q and k; eps: added to the sum of the weights."""

        feature_dim: int = 16
        eps: float = 1e-12

        @property
        def factor(self) -> float:
            """On q·k: scale, or K^-0.5."""
            return self.feature_dim**-0.5 if self.scale is None else self.scale

    config: Config

    def __init__(self, config: Config, weights: tuple[float, float, float]) -> None:
        value_dim = config.head_dim or config.hidden_size // config.num_heads
        super().__init__(config, config.feature_dim, value_dim)
        self.weights, self.num_inputs = weights, 3 + config.use_decay
        self.feature_map: nn.Module = nn.Identity()

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Sums of products of channels by v, and by one for the sum of the weights."""
        features = num_features(self.key_dim, self.weights)
        return ((self.config.num_heads, features, self.value_dim + 1),)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """φ(q), φ(k), v, -r where heads decay, and which tokens are real where some are not."""
        q, k, v, conv = self.qkv(x, conv, tokens)
        q, k = self.feature_map(q), self.feature_map(k)
        k, v = (repeat_heads(i, self.config.num_heads) for i in (k, v))
        return (q, k, v, *self.decay(q, tokens), *tokens.real(x)), conv

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``quadratic_attn``; the input after the others is a mask."""
        tensors, mask = inputs[: self.num_inputs], inputs[self.num_inputs :]
        o, last = quadratic_attn(
            *tensors,
            weights=self.weights,
            eps=self.config.eps,
            state=None if state is None else state[0],
            mask=mask[0] if mask else None,
            cu_seqlens=cu_seqlens,
        )
        return o, (last,)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``mix`` for one token."""
        o, last = quadratic_attn_step(
            *inputs, weights=self.weights, eps=self.config.eps, state=state[0]
        )
        return o, (last,)

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o o."""
        return self.o_proj(o.flatten(2))
