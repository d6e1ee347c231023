"""Based: the exponential to second order (Arora et al. 2024, arXiv 2402.18668).

    o_t = Σ_s (1 + a + a²/2) v_s / Σ_s (1 + a + a²/2)        a = scale q_t·k_s,  s <= t
    φ(q)·φ(k) = 1 + q·k + (q·k)²/2                           φ(x) = [1, x, (x ⊗ x) / √2]

x ⊗ x is symmetric: K (K + 1) / 2 products stand for its K², so that the state is half as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flacompile.layers.linear_attn import FeatureAttention

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


def pairs(x: Tensor, cross: float = 1.0) -> Tensor:
    """x ⊗ x without its second half: pairs(q, 2)·pairs(k) = (q·k)².

    Args:
        x: [..., K].
        cross: factor on the products of two channels; 2 is exact in any dtype, √2 twice is not.

    Returns:
        x_i² and then cross x_i x_{i+j}, indices modulo K, [..., K (K + 1) / 2].
    """
    K = x.shape[-1]
    others = [cross * x * x.roll(-j, -1) for j in range(1, K // 2 + 1)]
    return torch.cat((x * x, *others), -1)[..., : K * (K + 1) // 2]


def taylor_features(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """φ(q), φ(k) [..., (K + 1) (K + 2) / 2] of q, k [..., K]; their product is 1 + a + a²/2."""
    q, one = scale * q, torch.ones_like(q[..., :1])
    q = torch.cat((one, q, 0.5 * pairs(q, 2)), -1)
    return q, torch.cat((torch.ones_like(k[..., :1]), k, pairs(k)), -1)


class BasedLinearAttention(FeatureAttention):
    @dataclass(frozen=True, kw_only=True)
    class Config(FeatureAttention.Config):
        """feature_dim: channels K of a head of q and k; eps: added to the sum of the weights."""

        num_heads: int = 12
        feature_dim: int = 16
        eps: float = 1e-12

    config: Config

    def __init__(self, config: Config) -> None:
        K = config.feature_dim
        value_dim = config.head_dim or config.hidden_size // config.num_heads
        super().__init__(config, K, value_dim, (K + 1) * (K + 2) // 2, config.eps)
        self.scale, self.qk_scale = 1.0, K**-0.5 if config.scale is None else config.scale

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ(q)·φ(k) = 1 + a + a²/2 with a = qk_scale q·k, see ``taylor_features``."""
        return taylor_features(q, k, self.qk_scale)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """All channels of the heads, so that a is what the softmax saw, and a decay."""
        return cls.Config(**cls.site_fields(site), feature_dim=site.head_dim, use_decay=True)
