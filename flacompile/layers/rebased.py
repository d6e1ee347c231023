"""ReBased: a learned quadratic kernel (Aksenov et al. 2024, arXiv 2402.10644).

    o_t = Σ_s a² v_s / (Σ_s a² + eps)        a = offset + scale φ(q_t)·φ(k_s),  s <= t
    φ(x) = γ ⊙ LayerNorm(x) + β              one φ for q and k and all heads

The state holds K (K + 1) / 2 products a head, and with an offset K + 1 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.layers.quadratic_attn import QuadraticAttention

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


def square_weights(scale: float, offset: float) -> tuple[float, float, float]:
    """Coefficients of (offset + scale q·k)² in q·k."""
    return offset * offset, 2 * offset * scale, scale * scale


class NormalisedAffine(nn.Module):
    """γ ⊙ LayerNorm(x) + β, each of the three where it is asked for."""

    def __init__(self, dim: int, use_gamma: bool, use_beta: bool, normalize: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim)) if use_gamma else None
        self.beta = nn.Parameter(torch.zeros(dim)) if use_beta else None
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim], the mean and variance over dim."""
        x = F.layer_norm(x, x.shape[-1:]) if self.normalize else x
        x = x if self.gamma is None else x * self.gamma
        return x if self.beta is None else x + self.beta


class ReBasedLinearAttention(QuadraticAttention):
    @dataclass(frozen=True, kw_only=True)
    class Config(QuadraticAttention.Config):
        """use_gamma, use_beta, normalize: what φ has of γ, β and LayerNorm.

        offset: not in the paper, where it is 0; that of a conversion is 2, as (2 + a)² / 4 is e^a
        to first order and never negative.
        """

        num_heads: int = 16
        use_gamma: bool = True
        use_beta: bool = True
        normalize: bool = True
        eps: float = 1e-5
        offset: float = 0.0

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, square_weights(config.factor, config.offset))
        self.feature_map = NormalisedAffine(
            config.feature_dim, config.use_gamma, config.use_beta, config.normalize
        )

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """All channels of the heads, a² near the exponential that the softmax saw, and a decay."""
        return cls.Config(
            **cls.site_fields(site),
            feature_dim=site.head_dim,
            normalize=False,
            offset=2.0,
            use_decay=True,
        )
