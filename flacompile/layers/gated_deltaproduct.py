"""Gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297).

    R_j = R_{j-1} + β_j k_j (v_j - k_j R_{j-1})^T      R_0 = e^g_t S_{t-1}, j = 1..n
    S_t = R_n                                          o_t = scale q_t S_t

n steps of the delta rule a token: a sequence n times as long, whose state decays at the first step
of each token and is read at the last. All else is Gated DeltaNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from flacompile.layers.gated_deltanet import GatedDeltaRule

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class GatedDeltaProduct(GatedDeltaRule):
    @dataclass(frozen=True, kw_only=True)
    class Config(GatedDeltaRule.Config):
        """num_householder: the n steps a token."""

        num_householder: int = 2
        use_forget_gate: bool = True
        use_output_gate: bool = True
        allow_neg_eigval: bool = True

    config: Config

    def __init__(self, config: Config) -> None:
        gate = "swish" if config.use_output_gate else None
        super().__init__(config, config.num_householder, config.use_forget_gate, gate)

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The n steps of a token as n tokens of the delta rule; one decays, one reads."""
        n, (q, k, v, g, beta) = self.config.num_householder, inputs
        q = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)  # [B, n T, H, K]
        g = F.pad(g[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
        k, v, beta = (x.unflatten(2, (n, -1)).flatten(1, 2) for x in (k, v, beta))
        bounds = None if cu_seqlens is None else n * cu_seqlens
        o, state = super().mix((q, k, v, g, beta), state, bounds)
        return o[:, n - 1 :: n], state

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """n steps of the delta rule, of which the first decays; o is that of the last."""
        n, (q, k, v, g, beta) = self.config.num_householder, inputs
        o = v
        for step in zip(*(x.unflatten(1, (n, -1)).unbind(1) for x in (k, v, beta)), strict=True):
            k, v, beta = step
            o, state = super().mix_step((q, k, v, g, beta), state)
            g = g.new_zeros(g.shape)
        return o, state

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """``conversion_fields``, and no output gate."""
        return cls.Config(**cls.conversion_fields(site), use_output_gate=False)
