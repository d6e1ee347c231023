"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635) with one decay a head.

S_t = e^g_t S_{t-1} + k_t v_t^T        g_t = log σ(w x_t + b) / normalizer, a number a head
o_t = scale q_t S_t                    y_t = W_o [RMSNorm(o_t) ⊙ swish(W_g x_t)]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import at_least_fp32
from flacompile.layers.gla import DecayedAttention


class SimpleGatedLinearAttention(DecayedAttention):
    @dataclass(frozen=True, kw_only=True)
    class Config(DecayedAttention.Config):
        use_short_conv: bool = True

    config: Config
    gk_proj: nn.Linear

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gk_proj = nn.Linear(config.hidden_size, config.num_heads)

    def decay(self, x: Tensor) -> Tensor:
        """g = log σ(W x + b) / normalizer, [B, T, H]."""
        return F.logsigmoid(at_least_fp32(self.gk_proj(x))) / self.config.gate_logit_normalizer

    @property
    def decay_layer(self) -> nn.Linear:
        """W and b, of every head."""
        return self.gk_proj
