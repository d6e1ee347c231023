"""Multi-head latent attention, MLA (DeepSeek-AI 2024, arXiv 2405.04434).

o_t = Σ_s softmax_s(scale [q_t; R_t q'_t]·[k_s; R_s k'_s]) v_s
[k_s; v_s] = W_2 c_s        c_s = RMSNorm(W_1 x_s)        k'_s = W_r x_s

k and v are of each head, the latent c and the rotated R k' of all heads together. Only these two
are kept. A sequence expands them into keys and values; a step never does: q·(W_k c) = (W_kᵀ q)·c
and Σ_s p_s (W_v c_s) = W_v (Σ_s p_s c_s), so that the heads of one token are so many queries on
one shared head of keys [c; R k'] with the values c.

A conversion takes any attention without norms of q and k as it stands. Its keys, of H_kv heads side
by side, become k' and there is no other k; a head of q is zero on the keys of other heads, and the
values are the latent. q_proj widens by H_kv, which is little for attention with few key heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, Rotary
from flacompile.layers.base import Mixer, Tokens
from flacompile.layers.cache import CachedMixer, attend
from flacompile.ops.validate import check_shape, expect
from flacompile.yarn import RopeScaling

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class MultiheadLatentAttention(CachedMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """q_lora_rank: None is one matrix for q; rope_theta: None is no rotary.

        The fields after ``rope_scaling`` are what a conversion needs: norm_eps; latent_norm, False
        leaves out the norm of c; rotary, instead of rope_theta; scale, None is the published one;
        logit_softcapping, as in ``attn``.
        """

        hidden_size: int = 2048
        num_heads: int = 16
        q_lora_rank: int | None = 1536
        qk_rope_head_dim: int = 64
        kv_lora_rank: int = 512
        v_head_dim: int = 128
        qk_nope_head_dim: int = 128
        window_size: int | None = None
        rope_theta: float | None = 10000.0
        rope_scaling: RopeScaling | None = None
        norm_eps: float = 1e-5
        latent_norm: bool = True
        qk_bias: bool = False
        o_bias: bool = False
        rotary: Rotary.Config | None = None
        scale: float | None = None
        logit_softcapping: float | None = None

    config: Config
    weights_read = ("kv_proj.2",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, self.window_size = config, config.window_size
        self.key_dims = (c.qk_nope_head_dim, c.qk_rope_head_dim)
        self.expanded_dims = (c.qk_nope_head_dim, c.v_head_dim)
        queries = c.num_heads * sum(self.key_dims)
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, queries, c.qk_bias)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(c.hidden_size, c.q_lora_rank, bias=False),
                RMSNorm(c.q_lora_rank, c.norm_eps),
                nn.Linear(c.q_lora_rank, queries, c.qk_bias),
            )
        self.k_rope = nn.Linear(c.hidden_size, c.qk_rope_head_dim, c.qk_bias)
        self.kv_proj = nn.Sequential(
            nn.Linear(c.hidden_size, c.kv_lora_rank, bias=False),
            RMSNorm(c.kv_lora_rank, c.norm_eps) if c.latent_norm else nn.Identity(),
            nn.Linear(c.kv_lora_rank, c.num_heads * sum(self.expanded_dims), bias=False),
        )
        self.o_proj = nn.Linear(c.num_heads * c.v_head_dim, c.hidden_size, c.o_bias)
        rotary = _rotary(c)
        turned = 0 if rotary is None else 2 * len(rotary.inv_freq)
        expect(turned <= c.qk_rope_head_dim, "rotary", f"at most {c.qk_rope_head_dim}", turned)
        self.rotary = None if rotary is None else Rotary(rotary)
        self.scale = c.scale or sum(self.key_dims) ** -0.5
        if c.rope_scaling is not None:
            self.scale *= c.rope_scaling.softmax_factor

    @property
    def cached_shapes(self) -> tuple[tuple[int, ...], ...]:
        """c and R k'."""
        return (self.config.kv_lora_rank,), (self.config.qk_rope_head_dim,)

    def project(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[q; R q'] of all heads, and the latent c and R k', which are kept."""
        q = self.q_proj(x).unflatten(-1, (self.config.num_heads, -1))
        nope, rope = q.split(self.key_dims, -1)
        latent = self.kv_proj[1](self.kv_proj[0](x))
        k_rope = self.k_rope(x)[:, :, None]
        if self.rotary is not None:
            rope, k_rope = (self.rotary(i, tokens.position) for i in (rope, k_rope))
        return torch.cat((nope, rope), -1), (latent, k_rope[:, :, 0])

    def mix(self, q: Tensor, cached: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """The latent is expanded into k and v of every head, and attended to."""
        latent, k_rope = cached
        expanded = self.kv_proj[2](latent).unflatten(-1, (self.config.num_heads, -1))
        nope, v = expanded.split(self.expanded_dims, -1)
        rope = k_rope[:, :, None].expand(-1, -1, self.config.num_heads, -1)
        k = torch.cat((nope, rope), -1)
        return attend(q, k, v, mask, self.scale, self.config.logit_softcapping)

    def mix_step(self, q: Tensor, cached: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """The absorbed form: heads are the queries of one head of keys."""
        weight = self.get_parameter("kv_proj.2.weight")
        weight = weight.unflatten(0, (self.config.num_heads, -1))
        key_weight, value_weight = weight.split(self.expanded_dims, 1)
        nope, q = q[:, 0].split(self.key_dims, -1)
        latent, keys = cached
        if self.config.qk_nope_head_dim:
            absorbed = torch.einsum("bhn,hnr->bhr", nope, key_weight)
            q, keys = torch.cat((absorbed, q), -1), torch.cat((latent, keys), -1)
        q, k, v = q[:, :, None], keys[:, :, None], latent[:, :, None]
        o = attend(q, k, v, mask, self.scale, self.config.logit_softcapping)
        return torch.einsum("bhr,hvr->bhv", o[:, :, 0], value_weight)[:, None]

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """The same attention as the site."""
        for name in ("q_norm", "k_norm"):
            found = getattr(site, name)
            expect(found is None, name, "None, as k' is one vector of all heads", found)
        keys = site.num_kv_heads * site.head_dim
        return cls.Config(
            hidden_size=site.hidden_size,
            num_heads=site.num_heads,
            q_lora_rank=None,
            qk_rope_head_dim=keys,
            kv_lora_rank=min(keys, site.hidden_size),
            v_head_dim=site.head_dim,
            qk_nope_head_dim=0,
            window_size=site.window,
            rope_theta=None,
            latent_norm=False,
            qk_bias=site.q.bias_fqn is not None or site.k.bias_fqn is not None,
            o_bias=site.v.bias_fqn is not None or site.o.bias_fqn is not None,
            rotary=None
            if site.rotary is None
            else Rotary.Config(
                inv_freq=tuple(site.rotary.inv_freq) * site.num_kv_heads,
                interleaved=site.rotary.interleaved,
                factor=site.rotary.factor,
            ),
            scale=site.scale,
            logit_softcapping=site.softcap,
        )

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Keys side by side, queries zero on other heads' keys, values by singular vectors.

        A bias of v reaches all outputs alike and is added to that of o. With a ``kv_lora_rank``
        below the rank of W_v the values are the nearest of that rank.
        """
        c, heads, dim = self.config, self.config.num_heads, self.config.v_head_dim
        whole = c.q_lora_rank is None and c.qk_nope_head_dim == 0
        expect(whole, "config", "no q_lora_rank and qk_nope_head_dim = 0, to take an attention", c)
        kv_heads, width = c.qk_rope_head_dim // dim, c.hidden_size
        for name, rows in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
            check_shape(f"{name}_weight", getattr(weights, f"{name}_weight"), (rows, width))
        check_shape("o_weight", weights.o_weight, (width, heads * dim))
        q, k, v, o = (_with_bias(weights, name) for name in "qkvo")
        owner = F.one_hot(torch.arange(heads, device=q.device) // (heads // kv_heads), kv_heads)
        q = owner[..., None, None] * q.unflatten(0, (heads, 1, dim))  # [H, H_kv, K, D + 1]
        order = _rotated_first(c.rotary, kv_heads, dim).to(q.device)
        q = q.flatten(1, 2)[:, order].flatten(0, 1)
        _load(self.q_proj, q)  # type: ignore[arg-type]
        _load(self.k_rope, k[order])
        down, up = _factors(v[:, :-1], c.kv_lora_rank)
        up = torch.cat((up, v[:, -1:]), 1).unflatten(0, (kv_heads, dim))
        up = up.repeat_interleave(heads // kv_heads, 0).flatten(0, 1)  # [H V, R + 1]
        self.get_parameter("kv_proj.0.weight").copy_(down)
        self.get_parameter("kv_proj.2.weight").copy_(up[:, :-1])
        o[:, -1] += o[:, :-1] @ up[:, -1]
        _load(self.o_proj, o)


def _rotary(c: MultiheadLatentAttention.Config) -> Rotary.Config | None:
    if c.rotary is not None or c.rope_theta is None:
        expect(c.rope_scaling is None, "rope_scaling", "None without rope_theta", c.rope_scaling)
        return c.rotary
    if c.rope_scaling is None:
        return Rotary.Config.from_theta(c.rope_theta, c.qk_rope_head_dim)
    return c.rope_scaling.rotary(c.rope_theta, c.qk_rope_head_dim)


def _rotated_first(rotary: Rotary.Config | None, kv_heads: int, dim: int) -> Tensor:
    """Order of the channels [H_kv K] in which one rotation turns all heads at once."""
    channels = torch.arange(kv_heads * dim).view(kv_heads, dim)
    turned = 0 if rotary is None else len(rotary.inv_freq) // kv_heads
    pair = (2 * turned,) if rotary is not None and rotary.interleaved else (turned, turned)
    return torch.cat([i.flatten() for i in channels.split((*pair, dim - 2 * turned), 1)])


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product up @ down of that rank, both of one size, on every device the same."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    expect(rank <= len(s), "kv_lora_rank", f"at most {len(s)}", rank)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()[0]  # which a library leaves open
    u, s, v = u[:, :rank] * signs[:rank], s[:rank].sqrt(), signs[:rank, None] * v[:rank]
    return (s[:, None] * v).to(weight), (u * s).to(weight)


def _with_bias(weights: AttentionWeights, name: str) -> Tensor:
    """[W b], zero for no bias: a projection of [x 1]."""
    weight, bias = getattr(weights, f"{name}_weight"), getattr(weights, f"{name}_bias")
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat((weight, bias[:, None]), 1)


def _load(layer: nn.Linear, projection: Tensor) -> None:
    layer.weight.copy_(projection[:, :-1])
    if layer.bias is not None:
        layer.bias.copy_(projection[:, -1])
