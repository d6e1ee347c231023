"""ReBased: a learned quadratic kernel (Aksenov et al. 2024, arXiv 2402.10644).

    o_t = Σ_s a² v_s / (Σ_s a² + eps)        a = offset + scale φ(q_t)·φ(k_s),  s <= t
    φ(x) = γ ⊙ LayerNorm(x) + β              one φ for q and k and all heads

The state holds K (K + 1) / 2 products a head (see ``based.pairs``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.layers.based import pairs
from flacompile.layers.linear_attn import FeatureAttention

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


def square_features(q: Tensor, k: Tensor, scale: float, offset: float) -> tuple[Tensor, Tensor]:
    """Features of q, k [..., K] whose product is (offset + scale q·k)²."""
    q = scale * q
    if offset != 0:
        one = torch.ones_like(q[..., :1])
        q = torch.cat((q, offset * one), -1)
        k = torch.cat((k, torch.ones_like(k[..., :1])), -1)
    return pairs(q, 2), pairs(k)


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


class ReBasedLinearAttention(FeatureAttention):
    @dataclass(frozen=True, kw_only=True)
    class Config(FeatureAttention.Config):
        """feature_dim: channels K of a head of q and k; eps: added to the sum of the weights.

        offset: not in the paper, where it is 0; that of a conversion is 2, as (2 + a)² / 4 is e^a
        to first order and never negative. The state is then that of one channel more.
        """

        num_heads: int = 16
        feature_dim: int = 16
        use_gamma: bool = True
        use_beta: bool = True
        normalize: bool = True
        eps: float = 1e-5
        offset: float = 0.0

    config: Config

    def __init__(self, config: Config) -> None:
        K = config.feature_dim
        wide = K + (config.offset != 0)
        value_dim = config.head_dim or config.hidden_size // config.num_heads
        super().__init__(config, K, value_dim, wide * (wide + 1) // 2, config.eps)
        self.scale, self.qk_scale = 1.0, K**-0.5 if config.scale is None else config.scale
        self.feature_map = NormalisedAffine(K, config.use_gamma, config.use_beta, config.normalize)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q)·φ(k) = (offset + qk_scale q·k)², see ``square_features``."""
        q, k = self.feature_map(q), self.feature_map(k)
        return square_features(q, k, self.qk_scale, self.config.offset)

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
