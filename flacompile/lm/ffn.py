"""The feed-forward parts: SwiGLU (Shazeer 2020) and the channel mixes of RWKV-6 and RWKV-7.

gated   y = W_d [silu(W_g x) ⊙ W_u x]
rwkv7   y = W_v relu(W_k (x_t + (x_{t-1} - x_t) ⊙ μ_k))²
rwkv6   the same, times σ(W_r (x_t + (x_{t-1} - x_t) ⊙ μ_r))

A channel mix looks one token back: as a mixer, it has a state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import token_shift
from flacompile.layers.base import RecurrentMixer, RecurrentState, Tokens
from flacompile.layers.rwkv6 import ShiftedLinear
from flacompile.ops.validate import expect


def round_up(size: float, step: int) -> int:
    """The least multiple of step that is not below the whole part of size."""
    return step * -(-int(size) // step)


class GatedMLP(nn.Module):
    """SwiGLU; the width is two thirds of hidden_ratio · hidden_size where none is given."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        expect(config.hidden_act in ("swish", "silu"), "hidden_act", "'swish'", config.hidden_act)
        width, ratio = config.hidden_size, config.hidden_ratio
        given = None if config.model_type == "samba" else config.intermediate_size  # Mamba's there
        inner = given or round_up(width * (4 if ratio is None else ratio) * 2 / 3, 256)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(layer.weight, std=config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., D] of x [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ChannelMix(RecurrentMixer):
    """Subclasses define ``shifted``; the state holds the last token."""

    ratio: float

    def __init__(self, config: Any) -> None:
        super().__init__(RecurrentMixer.Config(hidden_size=config.hidden_size))
        expect(config.hidden_act == "sqrelu", "hidden_act", "'sqrelu'", config.hidden_act)
        ratio = self.ratio if config.hidden_ratio is None else config.hidden_ratio
        self.inner = config.intermediate_size or round_up(config.hidden_size * ratio, 32)
        self.value = nn.Linear(self.inner, config.hidden_size, bias=False)
        nn.init.zeros_(self.value.weight)  # as it is published: nothing is added at first

    def shifted(self, x: Tensor, delta: Tensor) -> Tensor:
        """y of x [B, T, D] and delta, x_{t-1} - x_t."""
        raise NotImplementedError

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: the state is one token."""
        return ()

    @property
    def conv_shapes(self) -> tuple[tuple[int, int], ...]:
        """The last token x [D], for the shift."""
        return ((1, self.config.hidden_size),)

    def sequence(
        self, x: Tensor, state: RecurrentState | None, tokens: Tokens
    ) -> tuple[Tensor, RecurrentState]:
        """``shifted`` of x and of its differences from the token before each."""
        before, last = token_shift(x, None if state is None else state.conv[0], tokens)
        return self.shifted(x, before - x), RecurrentState((), (last,), tokens.end)

    def advance(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """As ``sequence``, for x [B, D]."""
        x = x[:, None]
        y, state = self.sequence(x, state, Tokens.of(x, state.position, None, None))
        return y[:, 0], state


class RWKV6ChannelMix(ChannelMix):
    ratio = 3.5

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config)
        self.key = ShiftedLinear(config.hidden_size, self.inner)
        self.receptance = ShiftedLinear(config.hidden_size, config.hidden_size)

    def shifted(self, x: Tensor, delta: Tensor) -> Tensor:
        """σ(W_r (x + δ ⊙ μ_r)) ⊙ W_v relu(W_k (x + δ ⊙ μ_k))²."""
        y = self.value(self.key(x, delta).relu().square())
        return self.receptance(x, delta).sigmoid() * y


class RWKV7ChannelMix(ChannelMix):
    ratio = 4.0

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config)
        ahead, width = 1 - layer / config.num_hidden_layers, config.hidden_size
        self.x_k = nn.Parameter(1 - (torch.arange(width) / width) ** ahead**4)
        self.key = nn.Linear(width, self.inner, bias=False)

    def shifted(self, x: Tensor, delta: Tensor) -> Tensor:
        """W_v relu(W_k (x + δ ⊙ μ_k))²."""
        return self.value(self.key(torch.addcmul(x, delta, self.x_k)).relu().square())


def feed_forward(config: Any, layer: int) -> nn.Module:
    """That of one layer."""
    if config.kind.ffn == "gated":
        return GatedMLP(config)
    return {"rwkv6": RWKV6ChannelMix, "rwkv7": RWKV7ChannelMix}[config.kind.ffn](config, layer)
