"""Based: the exponential to second order (Arora et al. 2024, arXiv 2402.18668).

    o_t = Σ_s (1 + a + a²/2) v_s / Σ_s (1 + a + a²/2)        a = scale q_t·k_s,  s <= t

The features of a are 1, x and x ⊗ x, which is symmetric: K (K + 1) / 2 products stand for its K²,
so that the state is half as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flacompile.layers.quadratic_attn import QuadraticAttention

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


def taylor_weights(scale: float) -> tuple[float, float, float]:
    """Coefficients of e^a to second order in q·k, a = scale q·k."""
    return 1.0, scale, scale * scale / 2


class BasedLinearAttention(QuadraticAttention):
    @dataclass(frozen=True, kw_only=True)
    class Config(QuadraticAttention.Config):
        """As of ``QuadraticAttention``, with the published number of heads."""

        num_heads: int = 12

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, taylor_weights(config.factor))

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """All channels of the heads, so that a is what the softmax saw, and a decay."""
        return cls.Config(**cls.site_fields(site), feature_dim=site.head_dim, use_decay=True)
