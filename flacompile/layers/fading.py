"""What the linear attentions without a decay of their own share: one for conversions.

    S_t = e^-r S_{t-1} + φ(k_t) v_t^T        r > 0, which each head learns

It is in no paper. Without it, most of what a softmax leaves out stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flacompile.blocks import at_least_fp32
from flacompile.layers.base import RecurrentMixer, Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.validate import check_shape


class FadingAttention(QKVMixer, RecurrentMixer):
    """Attention whose weights may fall off with distance.

    Args:
        config: as of any mixer with the projections of attention.
        key_dim: channels of a head of q and k.
        value_dim: channels of a head of v.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """use_decay: whether weights fall off with distance."""

        use_decay: bool = False

    config: Config

    def __init__(self, config: Config, key_dim: int, value_dim: int) -> None:
        super().__init__(config, key_dim, value_dim, config.rotary, config.qk_norm)
        if config.use_decay:
            self.log_rate = nn.Parameter(torch.empty(config.num_heads))
            self.set_half_life(self.neutral_half_life)

    def decay(self, q: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
        """-r for every token of q [B, T, H, K], [B, T, H], where heads decay; zero at padding."""
        if not self.config.use_decay:
            return ()
        g = -at_least_fp32(self.log_rate).exp().expand(q.shape[:3])
        return (tokens.zero_padding(g),)

    @property
    def neutral_half_life(self) -> Tensor:
        """1024 tokens, all but no decay."""
        return torch.full((self.config.num_heads,), 1024.0)

    @torch.no_grad()
    def set_half_life(self, tokens: Tensor) -> None:
        """Makes the decay of head h halve the state every tokens[h] tokens: r = ln 2 / tokens.

        Without a decay it does nothing.

        Args:
            tokens: [H], > 0.
        """
        check_shape("tokens", tokens, (self.config.num_heads,))
        if self.config.use_decay:
            self.log_rate.copy_((math.log(2) / tokens.double()).log())
