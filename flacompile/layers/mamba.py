"""Mamba (Gu & Dao 2023, arXiv 2312.00752).

h_t = e^(dt_t A) h_{t-1} + dt_t B_t u_t        dt_t = softplus(W_dt δ_t + b), a number a channel
y_t = C_t h_t + D u_t                          u, z = W x_t; u through a conv; δ, B, C = W_x u_t
out = W_o [y_t ⊙ silu(z_t)]

A conversion splits the channels into heads, each with a B and C of its own, and takes δ, B and C
from the layer's input x instead of u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import at_least_fp32
from flacompile.layers.base import Tokens
from flacompile.layers.ssm import StateSpaceMixer
from flacompile.ops import selective_scan, selective_scan_step
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class Mamba(StateSpaceMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(StateSpaceMixer.Config):
        """dt_rank: size of δ, "auto" is hidden_size / 16; num_heads: None for the published."""

        intermediate_size: int = 2048
        dt_rank: int | str = "auto"
        dt_init: str = "random"
        dt_scale: float = 1.0

    config: Config

    def __init__(self, config: Config) -> None:
        c, inner, N, H = config, config.intermediate_size, config.state_size, config.num_heads or 1
        expect(inner % H == 0, "num_heads", f"a divisor of {inner}", H)
        kv_heads = c.num_kv_heads or H
        channels = inner // H * kv_heads
        self.parts = (channels, inner if c.use_output_gate else 0)  # u, z
        super().__init__(c, H, H, (sum(self.parts), channels, inner))
        rank = math.ceil(c.hidden_size / 16) if c.dt_rank == "auto" else int(c.dt_rank)
        self.streams = (rank, kv_heads * N, H * N)  # δ, B, C
        source = channels if c.num_heads is None else c.hidden_size
        self.x_proj = nn.Linear(source, sum(self.streams), c.qkv_bias)
        self.dt_proj = nn.Linear(rank, inner)
        self.reset_step(rank**-0.5 * c.dt_scale)
        A = torch.arange(1, N + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(A.log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    @torch.no_grad()
    def reset_step(self, scale: float) -> None:
        """W_dt all ``scale`` or uniform up to it; dt from dt_min to dt_max without input."""
        kinds, kind = ("constant", "random"), self.config.dt_init
        expect(kind in kinds, "dt_init", f"one of {kinds}", kind)
        low = scale if kind == "constant" else -scale
        self.dt_proj.weight.uniform_(low, scale)
        self.dt_proj.bias.copy_(self.draw_step(len(self.dt_proj.bias)))

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """h, N numbers a channel."""
        return ((self.config.intermediate_size, self.config.state_size),)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """u, dt [B, T, I], B, C [B, T, G, N], for a gate z [B, T, I]; dt is zero at padding."""
        u, *z = self.in_proj(x).split([width for width in self.parts if width], -1)
        u, conv = self.convolve(u, conv, tokens)
        delta, B, C = self.x_proj(u if self.config.num_heads is None else x).split(self.streams, -1)
        B, C = self.by_groups(B, C, tokens)
        B, u = (repeat_heads(i, self.num_heads) for i in (B, u.unflatten(-1, (self.kv_heads, -1))))
        dt = at_least_fp32(F.linear(delta, self.dt_proj.weight)) + self.dt_proj.bias
        dt = tokens.zero_padding(F.softplus(dt))
        return (u.flatten(2), dt, B, C * self.config.scale, *z), conv

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y = selective_scan(u, dt, A, B, C), [B, T, I]."""
        u, dt, B, C = inputs[:4]
        first = None if state is None else state[0]
        o, last = selective_scan(u, dt, self.A, B, C, state=first, cu_seqlens=cu_seqlens)
        return o, (last,)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``mix``, for inputs of one token."""
        u, dt, B, C = inputs[:4]
        o, last = selective_scan_step(u, dt, self.A, B, C, state=state[0])
        return o, (last,)

    @property
    def A(self) -> Tensor:
        """[I, N], < 0."""
        return -at_least_fp32(self.A_log).exp()

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """W_o [(y + D u) ⊙ silu(z)]."""
        u, z = inputs[0], inputs[4:]
        y = at_least_fp32(o) + self.D * u
        if z:
            y = y * self.activation(at_least_fp32(z[0]))
        return self.out_proj(y.to(o.dtype))

    @property
    def step_layer(self) -> tuple[list[Tensor], Tensor]:
        """W_dt and b, of every channel."""
        return [self.dt_proj.weight], self.dt_proj.bias

    @property
    def attention_rows(self) -> dict[str, tuple[nn.Linear, slice]]:
        """v is u; k and q are B and C, which follow δ in W_x."""
        rank, keys, _ = self.streams
        return {
            "v": (self.in_proj, slice(0, self.parts[0])),
            "k": (self.x_proj, slice(rank, rank + keys)),
            "q": (self.x_proj, slice(rank + keys, None)),
        }

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """The channels of a head of v are a head, with keys as B and queries as C."""
        fields = cls.conversion_fields(site)
        fields["intermediate_size"] = site.num_heads * fields.pop("head_dim")
        return cls.Config(**fields)
