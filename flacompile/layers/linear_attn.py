"""Linear attention by a feature map (Katharopoulos et al. 2020, arXiv 2006.16236).

    S_t = S_{t-1} + φ(k_t) v_t^T        o_t = scale φ(q_t) S_t
    z_t = z_{t-1} + φ(k_t)              o_t / (scale φ(q_t) z_t), when normalised

z is a column of S that belongs to a channel of ones in v. A conversion adds a decay (``fading``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, feature_map
from flacompile.layers.base import Tokens
from flacompile.layers.fading import FadingAttention
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class LinearAttention(FadingAttention):
    @dataclass(frozen=True, kw_only=True)
    class Config(FadingAttention.Config):
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
        map_q, feature_dim = feature_map(config.feature_map, dims[0])
        tied = config.tie_feature_map_qk
        map_k = map_q if tied else feature_map(config.feature_map, dims[0])[0]
        super().__init__(config, *dims)
        self.feature_map_q, self.feature_map_k, self.feature_dim = map_q, map_k, feature_dim
        self.norm: nn.Module = nn.Identity()
        norms = ("rmsnorm", "identity")
        expect(config.output_norm in norms, "output_norm", f"one of {norms}", config.output_norm)
        if config.output_norm == "rmsnorm":
            affine = config.elementwise_affine
            self.norm = RMSNorm(self.value_dim, config.norm_eps, affine=affine)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The two feature maps, each divided by its sum where the config says so."""
        q, k = self.feature_map_q(q), self.feature_map_k(k)
        q = q / (q.sum(-1, keepdim=True) + 1e-4) if self.config.norm_q else q
        k = k / (k.sum(-1, keepdim=True) + 1e-4) if self.config.norm_k else k
        return q, k

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, one [F, V] a head, and z as one more column where o is normalised."""
        value_dim = self.value_dim + self.config.do_feature_map_norm
        return ((self.config.num_heads, self.feature_dim, value_dim),)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """φ(q), φ(k), v with a channel of ones where o is normalised, and -r where heads decay."""
        q, k, v, conv = self.qkv(x, conv, tokens)
        q, k = self.features(q, k)
        if self.config.do_feature_map_norm:
            v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        k, v = (repeat_heads(i, self.config.num_heads) for i in (tokens.zero_padding(k), v))
        return (q, k, v, *self.decay(q, tokens)), conv

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o norm(o / (z + eps)), each where the config has it."""
        if self.config.do_feature_map_norm:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return self.o_proj(self.norm(o).flatten(2))

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """φ = hedgehog at W = 1 after rotary, normalised as softmax is; a decay, no output norm."""
        return cls.Config(
            **cls.site_fields(site),
            feature_map="hedgehog",
            do_feature_map_norm=True,
            output_norm="identity",
            use_decay=True,
        )
