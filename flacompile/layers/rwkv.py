"""What RWKV-6 and RWKV-7 share: low-rank maps, the output, and how a conversion starts.

r is the query of attention. Published, r, k, v have no bias, norm or rotary; a conversion keeps
those of the attention, mixes no token with the one before it at first, and leaves out the norm and
the gate of the output (Goldstein et al. 2025, arXiv 2505.03005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import at_least_fp32
from flacompile.layers.base import RecurrentMixer
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.validate import check_shape

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class LowRank(nn.Module):
    """W_2 f(W_1 x) + b, parameters lora.0.weight, lora.2.weight and lora.2.bias."""

    def __init__(
        self, dim: int, rank: int, out: int, activation: nn.Module, bias: bool = True
    ) -> None:
        super().__init__()
        down, up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, out, bias=bias)
        self.lora = nn.Sequential(down, activation, up)

    @property
    def up(self) -> nn.Linear:
        """The second map, W_2, with the bias."""
        return self.lora[2]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., out]."""
        return self.lora(x)

    @torch.no_grad()
    def start_at(self, bias: Tensor) -> None:
        """Gives b at first, whatever x, and a gradient to W_2."""
        self.up.weight.zero_()
        self.up.bias.copy_(bias)


class GroupNorm(nn.Module):
    """Each head to mean 0 and variance 1, in fp32; weight and bias over the channels of all."""

    def __init__(self, dim: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H, V] -> [B, T, H V]."""
        y = F.layer_norm(at_least_fp32(x), x.shape[-1:], eps=self.eps).flatten(2)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight.to(y.dtype) + self.bias.to(y.dtype)
        return y.to(x.dtype)


def bonus(r: Tensor, k: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(Σ r ⊙ u ⊙ k) v for r, k [B, T, H, K], u [H, K] and v [B, T, H, V], the sum in fp32."""
    return (at_least_fp32(r) * u * k).sum(-1, keepdim=True).to(v.dtype) * v


class RWKVAttention(QKVMixer, RecurrentMixer):
    """Subclasses define ``project``, ``mix``, ``output``, ``decay`` and ``decay_logit``."""

    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """scale: factor on r·k, None is 1; output_norm, use_output_gate: as conversions start."""

        elementwise_affine: bool = True
        norm_eps: float = 1e-5
        output_norm: bool = True
        use_output_gate: bool = True

    config: Config
    scale: float

    def __init__(self, config: Config, key_dim: int, value_dim: int, norm_eps: float) -> None:
        super().__init__(config, key_dim, value_dim, config.rotary, config.qk_norm)
        for name, place in self.places.items():  # to where they are published
            projection = self.get_submodule(f"{name}_proj")
            delattr(self, f"{name}_proj")
            outer, _, inner = place.partition(".")
            setattr(self, outer, nn.ModuleDict({inner: projection}) if inner else projection)
        self.scale = 1.0 if config.scale is None else config.scale
        if config.output_norm:
            width = config.num_heads * value_dim
            self.g_norm = GroupNorm(width, norm_eps, config.elementwise_affine)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, one [K, V] a head."""
        return ((self.config.num_heads, self.key_dim, self.value_dim),)

    @property
    def conv_shapes(self) -> tuple[tuple[int, int], ...]:
        """The last token x [D], for the shift."""
        return ((1, self.config.hidden_size),)

    @property
    def decay(self) -> LowRank:
        """From x to the logit of the decay, [B, T, H K]."""
        raise NotImplementedError

    def decay_logit(self, rate: Tensor) -> Tensor:
        """The logit that makes the state fall by e^-rate a token."""
        raise NotImplementedError

    @torch.no_grad()
    def set_half_life(self, tokens: Tensor) -> None:
        """Makes the decay of head h halve the state every tokens[h] tokens, whatever the input.

        Args:
            tokens: [H], > 0.
        """
        check_shape("tokens", tokens, (self.config.num_heads,))
        logit = self.decay_logit(math.log(2) / tokens.double())
        self.decay.start_at(logit.repeat_interleave(self.key_dim))

    def load_attention(self, weights: AttentionWeights) -> None:
        """As the base class; half-lives spread from 8 to 128 tokens over the heads.

        Each head is scaled so that the weights it sums with add up to one, as softmax's do.
        """
        super().load_attention(weights)
        self.set_half_life(self.neutral_half_life)
        self.scale_heads(1 - 2 ** (-1 / self.neutral_half_life))

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """Nothing between r, k, v and o but the decayed sum: no norm, no gate."""
        return cls.Config(**cls.site_fields(site), output_norm=False, use_output_gate=False)
