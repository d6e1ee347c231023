"""Softmax attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary embedding.

    o_t = Σ_s softmax_s(scale q_t·k_s) v_s        over s <= t, and s > t - window

By PyTorch's ``scaled_dot_product_attention``. The quadratic baseline, and what a conversion leaves
in the layers it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from flacompile.blocks import QKNorm, Rotary
from flacompile.layers.base import Tokens
from flacompile.layers.cache import CachedMixer, attend
from flacompile.layers.qkv import QKVMixer

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class Attention(QKVMixer, CachedMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """qk_norm: True is an RMS norm of each head; rope_theta: None is no rotary.

        logit_softcapping: a cap c on the scores s, c tanh(s / c); None is none.
        """

        hidden_size: int = 2048
        num_heads: int = 32
        qk_norm: QKNorm | bool = False
        window_size: int | None = None
        rope_theta: float | None = 10000.0
        logit_softcapping: float | None = None

    config: Config

    def __init__(self, config: Config) -> None:
        head_dim = config.head_dim or config.hidden_size // config.num_heads
        rotary = config.rotary
        if rotary is None and config.rope_theta is not None:
            rotary = Rotary.Config.from_theta(config.rope_theta, head_dim)
        norm = QKNorm() if config.qk_norm is True else config.qk_norm or None
        super().__init__(config, head_dim, head_dim, rotary, norm)
        self.window_size = config.window_size

    @property
    def cached_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Keys after rotary, and values."""
        return ((self.kv_heads, self.key_dim),) * 2

    def project(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        """q, and k after rotary and v, which are kept."""
        q, k, v, _ = self.qkv(x, None, tokens)
        return q, (k, v)

    def mix(self, q: Tensor, cached: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """o_t = Σ_s softmax_s(scale q_t·k_s) v_s, see ``attend``."""
        k, v = cached
        return attend(q, k, v, mask, self.scale, self.config.logit_softcapping)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """The same attention as the site."""
        fields = cls.site_fields(site)
        fields["qk_norm"] = fields["qk_norm"] or False
        return cls.Config(
            **fields,
            rope_theta=None,
            window_size=site.window,
            logit_softcapping=site.softcap,
        )
