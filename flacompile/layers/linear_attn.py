"""Linear attention by a feature map (Katharopoulos et al. 2020, arXiv 2006.16236).

    S_t = S_{t-1} + φ(k_t) v_t^T        o_t = scale φ(q_t) S_t
    z_t = z_{t-1} + φ(k_t)              o_t / (scale φ(q_t) z_t), when normalised

z is a column of S that belongs to a channel of ones in v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, feature_map
from flacompile.layers.base import RecurrentMixer, Tokens, repeat_heads
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.validate import expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class LinearAttention(QKVMixer, RecurrentMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """norm_q, norm_k: φ divided by its sum; do_feature_map_norm: o by its weights' sum."""

        expand_k: float = 1.0
        expand_v: float = 1.0
        num_heads: int = 8
        feature_map: str = "elementwise_product"
        tie_feature_map_qk: bool = False
        output_norm: str = "rmsnorm"
        norm_q: bool = False
        norm_k: bool = False
        do_feature_map_norm: bool = False
        elementwise_affine: bool = True
        norm_eps: float = 1e-5

    config: Config

    def __init__(self, config: Config) -> None:
        dims = config.head_dims(config.expand_k, config.expand_v)
        super().__init__(config, *dims, config.rotary, config.qk_norm)
        self.feature_map_q, self.feature_dim = feature_map(config.feature_map, self.key_dim)
        tied = config.tie_feature_map_qk
        self.feature_map_k = (
            self.feature_map_q if tied else feature_map(config.feature_map, self.key_dim)[0]
        )
        norms = ("rmsnorm", "identity")
        expect(config.output_norm in norms, "output_norm", f"one of {norms}", config.output_norm)
        self.norm = (
            RMSNorm(self.value_dim, config.norm_eps, affine=config.elementwise_affine)
            if config.output_norm == "rmsnorm"
            else nn.Identity()
        )

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        value_dim = self.value_dim + self.config.do_feature_map_norm
        return ((self.config.num_heads, self.feature_dim, value_dim),)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        q, k, v, conv = self.qkv(x, conv, tokens)
        q, k = self.feature_map_q(q), self.feature_map_k(k)
        q = q / (q.sum(-1, keepdim=True) + 1e-4) if self.config.norm_q else q
        k = k / (k.sum(-1, keepdim=True) + 1e-4) if self.config.norm_k else k
        if self.config.do_feature_map_norm:
            v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        k, v = (repeat_heads(i, self.config.num_heads) for i in (tokens.zero_padding(k), v))
        return (q, k, v), conv

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.config.do_feature_map_norm:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return self.o_proj(self.norm(o).flatten(2))

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """φ = hedgehog at W = 1 after rotary, normalised as softmax is, and no output norm."""
        return cls.Config(
            **cls.site_fields(site),
            feature_map="hedgehog",
            do_feature_map_norm=True,
            output_norm="identity",
        )
