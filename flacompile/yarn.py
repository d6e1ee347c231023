"""YaRN: rotary embedding for contexts longer than those trained on (Peng et al. 2023).

    f'_i = (1 - r_i) f_i + r_i f_i / s        r_i = clamp((i - low) / (high - low), 0, 1)

f_i = theta^(-2i / dim). Channels that turn more often than beta_fast times within the original
context (i < low) keep their frequency; those that turn less often than beta_slow times (i > high)
are slowed down by the factor s. Scores are sharpened, m(c) = 1 + 0.1 c ln s: cos and sin take
m(mscale) / m(mscale_all_dim), and the softmax of the whole q·k takes m(mscale_all_dim)².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flacompile.blocks import Rotary
from flacompile.ops.validate import expect


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The ``rope_scaling`` of a published config: ``RopeScaling(**config["rope_scaling"])``.

    Defaults are those of DeepSeek-V2 for keys that a config leaves out.
    """

    rope_type: str = "yarn"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        expect(self.rope_type == "yarn", "rope_scaling.rope_type", "'yarn'", self.rope_type)
        expect(self.factor >= 1, "rope_scaling.factor", "at least 1", self.factor)

    def rotary(self, theta: float, dim: int) -> Rotary.Config:
        """Frequencies f' and the factor on cos and sin, for ``dim`` rotated channels."""

        def channel(turns: float) -> float:
            """The i whose f_i turns that often in the original context."""
            radians = 2 * math.pi * turns / self.original_max_position_embeddings
            return -dim * math.log(radians) / (2 * math.log(theta))

        low = max(math.floor(channel(self.beta_fast)), 0)
        high = max(min(math.ceil(channel(self.beta_slow)), dim - 1), low + 0.001)
        plain = Rotary.Config.from_theta(theta, dim).inv_freq
        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain))]
        return Rotary.Config(
            inv_freq=tuple(
                (1 - r) * f + r * f / self.factor for r, f in zip(ramp, plain, strict=True)
            ),
            factor=self._sharpness(self.mscale) / self._sharpness(self.mscale_all_dim),
        )

    @property
    def softmax_factor(self) -> float:
        """What the scale of q·k is multiplied by."""
        return self._sharpness(self.mscale_all_dim) ** 2

    def _sharpness(self, mscale: float) -> float:
        return 1 + 0.1 * mscale * math.log(self.factor)
