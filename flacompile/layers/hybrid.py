"""A sliding window of softmax beside a linear mixer, by a share that every head learns.

    o_t = [s a_t; (1 - s) b_t]        y_t = W_o o_t        s = σ(share), a number a head
    a_t = Σ_i softmax_i(scale q_t·k_i) v_i over the W tokens i that end with t

b are the heads of any recurrent mixer on the same x. A softmax over the last tokens is what its
state keeps worst; the mix is that of Liger (Lan et al. 2025, arXiv 2503.01496), who hold s at 1/2,
and of LoLCATs (Zhang et al. 2024, arXiv 2410.10254), who learn it inside a common normaliser. Here
either part has q, k and v of its own, because a state wants other keys than a window does, and
columns of W_o of its own, so that a conversion can fit their sizes apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from flacompile.layers.attn import Attention
from flacompile.layers.base import Mixer, RecurrentMixer, RecurrentState, Tokens
from flacompile.layers.cache import AttentionState
from flacompile.layers.gla import GatedLinearAttention
from flacompile.ops.validate import expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights

SHARE = 0.9  # of the softmax, at first: near what it says alone, as LoLCATs start
WINDOW = 64


class HybridState(NamedTuple):
    """What the two parts carry; neither grows."""

    softmax: AttentionState
    linear: RecurrentState

    @property
    def position(self) -> Tensor:
        """[N] int64, the number of tokens seen."""
        return self.linear.position


class HybridAttention(Mixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """softmax: with a window; None has heads as the linear part has. linear: None is GLA."""

        hidden_size: int = 1024
        softmax: Attention.Config | None = None
        linear: Mixer.Config | None = None

    State = HybridState
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.linear = _part(config.linear or GatedLinearAttention.Config(hidden_size=width), width)
        recurrent = isinstance(self.linear, RecurrentMixer)
        expect(recurrent, "linear", "the Config of a recurrent mixer", type(config.linear))
        heads = self.linear.output_heads
        default = Attention.Config(hidden_size=width, num_heads=heads, window_size=WINDOW)
        self.softmax = _part(config.softmax or default, width)
        expect(self.softmax.keeps_size, "softmax", "a window_size", config.softmax)
        same = f"the {heads} heads of the linear part"
        expect(self.softmax.output_heads == heads, "softmax", same, self.softmax.output_heads)
        layers = [part.output_layer for part in (self.softmax, self.linear)]
        self.widths = [layer.in_features for layer in layers]
        bias = any(layer.bias is not None for layer in layers)
        self.o_proj = nn.Linear(sum(self.widths), width, bias)
        self.share = nn.Parameter(torch.full((heads,), math.log(SHARE / (1 - SHARE))))
        self.replaced = self.linear.replaced
        for part in (self.softmax, self.linear):
            _set_output_layer(part, nn.Identity())

    def sequence(
        self, x: Tensor, state: HybridState | None, tokens: Tokens
    ) -> tuple[Tensor, HybridState]:
        """y = W_o [s a; (1 - s) b], a of the window and b of the linear part."""
        near, past = (None, None) if state is None else state
        a, near = self.softmax.sequence(x, near, tokens)
        b, past = self.linear.sequence(x, past, tokens)
        return self.o_proj(self._mixed(a, b)), HybridState(near, past)

    def step(self, x: Tensor, state: HybridState) -> tuple[Tensor, HybridState]:
        """As ``sequence``, for x [B, D]."""
        self.validate_step(x, state)
        a, near = self.softmax.step(x, state.softmax)
        b, past = self.linear.step(x, state.linear)
        return self.o_proj(self._mixed(a, b)), HybridState(near, past)

    def _mixed(self, a: Tensor, b: Tensor) -> Tensor:
        """a [..., H V_a] and b [..., H V_b] -> [s a; (1 - s) b], [..., H (V_a + V_b)]."""
        s = self.share.sigmoid()[:, None]
        a, b = (part.unflatten(-1, (len(s), -1)) for part in (a, b))
        return torch.cat(((s * a).flatten(-2), ((1 - s) * b).flatten(-2)), -1)

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> HybridState:
        """An empty window and an empty linear state."""
        return HybridState(
            self.softmax.init_state(batch_size, device=device),
            self.linear.init_state(batch_size, device=device),
        )

    def validate_state(self, state: HybridState, num_sequences: int) -> None:
        """Each part looks at its own."""
        self.softmax.validate_state(state.softmax, num_sequences)
        self.linear.validate_state(state.linear, num_sequences)

    @property
    def _pieces(self) -> tuple[int, int]:
        """Into how many pieces of one width a head of each part is cut; most often one."""
        near, past = (width // len(self.share) for width in self.widths)
        return near // math.gcd(near, past), past // math.gcd(near, past)

    @property
    def output_heads(self) -> int:
        """The pieces of the softmax's heads, then those of the linear part's."""
        return len(self.share) * sum(self._pieces)

    @property
    def neutral_half_life(self) -> Tensor:
        """That of the linear part."""
        return self.linear.neutral_half_life

    @property
    def decay_groups(self) -> list[range]:
        """Those of the linear part, whose pieces come after the softmax's."""
        near, past = self._pieces
        first = len(self.share) * near
        groups = self.linear.decay_groups
        return [range(first + past * g.start, first + past * g.stop) for g in groups]

    def set_half_life(self, tokens: Tensor) -> None:
        """Of the linear part; without a decay it does nothing.

        Args:
            tokens: [H], > 0.
        """
        if hasattr(self.linear, "set_half_life"):
            self.linear.set_half_life(tokens)  # type: ignore[operator]

    def set_replaced(self, share: Tensor) -> None:
        """Of the linear part, which replaces what a key recalls.

        Args:
            share: [H], in (0, 1).
        """
        self.linear.set_replaced(share)  # type: ignore[operator]

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """GLA beside the last ``WINDOW`` tokens of this attention."""
        return cls.around(GatedLinearAttention.config_for(site), site, WINDOW)

    @classmethod
    def around(cls, linear: Mixer.Config, site: AttentionSite, window: int) -> Config:
        """A conversion of this attention by ``linear`` and its own last ``window`` tokens."""
        window = window if site.window is None else min(window, site.window)
        softmax = replace(Attention.config_for(site), window_size=window)
        return cls.Config(hidden_size=site.hidden_size, softmax=softmax, linear=linear)

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Both parts take the attention over, each with its columns of W_o."""
        columns = self.o_proj.weight.split(self.widths, 1)
        for part, own in zip((self.softmax, self.linear), columns, strict=True):
            layer = nn.Linear(own.shape[1], own.shape[0], self.o_proj.bias is not None)
            _set_output_layer(part, layer.to(own))
            part.load_attention(weights)
            _set_output_layer(part, nn.Identity())
            own.copy_(layer.weight)
            if self.o_proj.bias is not None:
                self.o_proj.bias.copy_(layer.bias)


def _part(config: Mixer.Config, width: int) -> Mixer:
    expect(config.hidden_size == width, "hidden_size", str(width), config.hidden_size)
    return config.mixer(config)


def _set_output_layer(part: Mixer, layer: nn.Module) -> None:
    name = next(name for name, child in part.named_children() if child is part.output_layer)
    setattr(part, name, layer)
