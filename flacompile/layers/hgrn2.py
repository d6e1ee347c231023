"""HGRN2 (Qin et al. 2024, arXiv 2404.07904).

S_t = diag(f_t) S_{t-1} + (1 - f_t) (W_i x_t)^T        f_t = lb + (1 - lb) σ(W_f x_t)
o_t = scale silu(W_q x_t) S_t                          y_t = W_o RMSNorm(o_t)

The forget gate is the key, and the norm is over all heads together. A conversion keeps the keys of
the attention beside the gate: it writes (1 - f_t) ⊙ k_t.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from flacompile.blocks import RMSNorm, activation
from flacompile.layers.base import Tokens
from flacompile.layers.hgrn import ForgetMixer
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import check_shape, expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class HGRN2Attention(ForgetMixer, QKVMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(ForgetMixer.Config, QKVMixer.Config):
        """expand_ratio: K of a head; num_heads: read where expand_ratio is None.

        feature_map: of q; tie_keys: False for keys k = W_k x of their own, which 1 - f multiplies,
        and a bias of f; output_norm: False as a conversion starts.
        """

        num_heads: int | None = None  # type: ignore[assignment]
        expand_ratio: int | None = 128
        feature_map: str = "silu"
        tie_keys: bool = True
        output_norm: bool = True

    config: Config
    places: ClassVar[dict[str, str]] = {
        "q": "q_proj", "k": "k_proj", "v": "i_proj", "o": "o_proj",
    }  # fmt: skip
    streams = ("q", "f", "i")

    def __init__(self, config: Config) -> None:
        c, heads = config, config.num_heads or 0
        if c.expand_ratio is not None:
            heads = c.hidden_size // c.expand_ratio
        wanted = f"at most {c.hidden_size}, or None and num_heads"
        expect(heads > 0, "expand_ratio", wanted, c.expand_ratio)
        config = dataclasses.replace(c, num_heads=heads)
        value_dim = c.head_dim or c.hidden_size // heads
        key_dim = c.head_dim or c.expand_ratio or value_dim
        QKVMixer.__init__(self, config, key_dim, value_dim, c.rotary, c.qk_norm)
        self.i_proj, self.f_proj = self.v_proj, self.k_proj
        del self.v_proj
        if c.tie_keys:
            del self.k_proj
        else:
            self.f_proj = nn.Linear(c.hidden_size, self.k_proj.out_features)
        self.add_gate_and_convolutions()
        self.feature_map = activation(c.feature_map)
        if c.output_norm:
            width = self.o_proj.in_features
            self.g_norm = RMSNorm(width, c.norm_eps, affine=c.elementwise_affine)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, one [K, V] a head."""
        return ((self.output_heads, self.key_dim, self.value_dim),)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """φ(q), k = 1 - f or (1 - f) ⊙ W_k x, v = W_i x, and g = log f, of all heads."""
        (q, f, i), conv = self.project_streams(x, conv, tokens)
        g, write = self.forget(f)
        k = write.to(q.dtype) if self.config.tie_keys else self.k_proj(x)
        q, k, v = self.by_heads((self.feature_map(q), k, i), tokens)
        g, write = g.view_as(k), write.view_as(k)
        k = k if self.config.tie_keys else (write * k).to(q.dtype)
        k, g = tokens.zero_padding(k), tokens.zero_padding(g)
        k, v, g = (repeat_heads(y, self.output_heads) for y in (k, v, g))
        return (q, k, v, g), conv

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o RMSNorm(o), the norm over all heads."""
        o = o.flatten(2)
        return self.o_proj(self.g_norm(o) if self.config.output_norm else o)

    @property
    def decay_groups(self) -> list[range]:
        """Heads with one f have one decay."""
        return self.heads_by_key

    def set_half_life(self, tokens: Tensor) -> None:
        """Makes f halve the state of head h every tokens[h] tokens, whatever the input.

        Args:
            tokens: [H], > 0; heads that share a gate take the geometric mean.
        """
        check_shape("tokens", tokens, (self.output_heads,))
        self.set_decay(tokens.double().log().view(self.kv_heads, -1).mean(1).exp())

    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class; half-lives spread from 8 to 128 tokens over the heads.

        1 - f makes the decays that a head sums with add up to one, as a softmax does.
        """
        super().load_attention(weights)
        self.set_half_life(self.neutral_half_life)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """q and k as they are, and nothing between them, v and o but the gated sum."""
        return cls.Config(
            **cls.site_fields(site),
            expand_ratio=None,
            feature_map="identity",
            tie_keys=False,
            output_norm=False,
        )
