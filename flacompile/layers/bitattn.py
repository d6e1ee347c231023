"""Attention with ternary weights, BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764).

y = Q_8(RMSNorm(x)) Q_3(W)ᵀ                     each of q, k, v and o, in softmax attention
Q_8(x) = round(x s) / s with s = 127 / max |x|      Q_3(W) = clip(round(W s), ±1) / s with
s = 1 / mean |W|

s of x is that of a token, s of W that of the matrix; gradients pass the rounding as if it were not
there. Weights stay in floating point, in which this is computed: how the published layers were
trained. ``flacompile.quantize_`` does the same in integers: ``BitNet`` to train on, ``Ternary`` to
ship at two bits a weight.
Published layers give the norm an ``eps`` of 1e-8 since version 0.6 of flash-linear-attention; the
kernels before that took 1e-6 whatever the layer said. Set ``norm_eps`` for weights of that time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, at_least_fp32
from flacompile.layers.attn import Attention

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights

SMALLEST = 1e-5  # of a maximum or mean, so that zeros are not divided by


class BitLinear(nn.Linear):
    """A linear layer on 8-bit inputs and ternary weights, rounded on the fly, in fp32.

    Args:
        in_features: size of x.
        out_features: size of y.
        bias: whether to add one, which is not rounded.
        norm_eps: of the RMS norm of x; None is no norm.

    Attributes:
        rounds: False once ``flacompile.quantize_`` gave it a weight that does the rounding, of x
            too, in integers.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, norm_eps: float | None = 1e-8
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.norm = None if norm_eps is None else RMSNorm(in_features, norm_eps)
        self.rounds = True

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> y [..., out_features] in its dtype."""
        x = at_least_fp32(input)
        x = x if self.norm is None else self.norm(x)
        if not self.rounds:
            return F.linear(x.to(input.dtype), self.weight, self.bias)
        weight = at_least_fp32(self.weight)
        x, weight = _pass_through(x, int8(x)), _pass_through(weight, ternary(weight))
        return F.linear(x.to(input.dtype), weight.to(input.dtype), self.bias)


def int8(x: Tensor) -> Tensor:
    """x [..., D] rounded to 127 steps of each token's largest channel on either side."""
    s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return (x * s).round().clamp(-128, 127) / s


def ternary(weight: Tensor) -> Tensor:
    """The weight rounded to -1, 0 or 1 times its mean size."""
    s = 1 / weight.abs().mean().clamp(min=SMALLEST)
    return (weight * s).round().clamp(-1, 1) / s


def scale_to_ternary_(weight: Tensor) -> None:
    """Scales W so that Q_3(W) is as near to what W was as any scale brings it, in place.

    Q_3(c W) = c Q_3(W), so that c = ⟨W, Q_3(W)⟩ / ⟨Q_3(W), Q_3(W)⟩.
    """
    rounded = ternary(weight)
    size = rounded.square().sum().clamp(min=SMALLEST)  # zero for a matrix of zeros
    weight.mul_((weight * rounded).sum() / size)


def _pass_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values with the gradient of x."""
    return x + (rounded - x).detach()


class BitAttention(Attention):
    @dataclass(frozen=True, kw_only=True)
    class Config(Attention.Config):
        """norm_eps: see above; input_norm: False leaves out the norms, as a conversion starts."""

        norm_eps: float = 1e-8
        input_norm: bool = True

    config: Config

    def linear(self, inputs: int, outputs: int, bias: bool) -> nn.Linear:
        """Each projection is a ``BitLinear``."""
        eps = self.config.norm_eps if self.config.input_norm else None
        return BitLinear(inputs, outputs, bias, eps)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """The same attention as the site, but for the rounding."""
        config = super().config_for(site)
        return dataclasses.replace(config, input_norm=False)  # type: ignore[return-value]

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """The attention's matrices, each scaled by ``scale_to_ternary_``."""
        super().load_attention(weights)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            scale_to_ternary_(layer.weight)
