"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060).

S_t = e^(dt_t A) S_{t-1} + dt_t B_t x_t^T        dt_t = softplus(w x_t + b), a number a head
y_t = C_t S_t + D x_t                            z, x, B, C, dt = W x_t; x, B, C through a conv
out = W_o RMSNorm(y_t ⊙ silu(z_t))

B and C are shared by the heads of a group: H / G heads in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import at_least_fp32
from flacompile.layers.base import Tokens
from flacompile.layers.ssm import StateSpaceMixer
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class GroupRMSNorm(nn.Module):
    """RMSNorm of each of ``groups`` runs of channels, with a weight a channel."""

    def __init__(self, dim: int, eps: float, groups: int) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> y of its shape and dtype."""
        y = at_least_fp32(x).unflatten(-1, (self.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2)
        return (y * self.weight).to(x.dtype)


class Mamba2(StateSpaceMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(StateSpaceMixer.Config):
        """num_heads: None is expand · hidden_size / head_dim; D_has_hdim: D is one a channel."""

        head_dim: int = 64
        state_size: int = 128
        expand: float = 2
        n_groups: int = 1
        conv_init: float | None = None
        A_init_range: tuple[float, float] = (1, 16)
        D_has_hdim: bool = False
        rmsnorm: bool = True
        norm_before_gate: bool = False
        dt_limit: tuple[float, float] = (0.0, float("inf"))
        norm_eps: float = 1e-5

    config: Config
    num_inputs = 4  # C, B, dt x and the decay; u and z are for the output

    def __init__(self, config: Config) -> None:
        c, P, N, G = config, config.head_dim, config.state_size, config.n_groups
        inner = int(c.expand * c.hidden_size) if c.num_heads is None else c.num_heads * P
        expect(inner % P == 0, "head_dim", f"a divisor of {inner}", P)
        H = inner // P
        self.streams = ((c.num_kv_heads or H) * P, (c.num_kv_heads or G) * N, G * N)  # x, B, C
        self.parts = (inner if c.use_output_gate else 0, sum(self.streams), H)  # z, x B C, dt
        super().__init__(c, H, G, (sum(self.parts), sum(self.streams), inner))
        if c.use_short_conv and c.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -c.conv_init, c.conv_init)
        self.dt_bias = nn.Parameter(self.draw_step(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(*c.A_init_range).log())
        self.D = nn.Parameter(torch.ones(inner if c.D_has_hdim else H))
        if c.rmsnorm:
            self.norm = GroupRMSNorm(inner, c.norm_eps, G)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """S, one [N, P] a head."""
        return ((self.num_heads, self.config.state_size, self.config.head_dim),)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """C, B of groups, dt x and dt A of heads, then x and, for a gate, z; dt is 0 at padding."""
        *z, xBC, dt = self.in_proj(x).split([width for width in self.parts if width], -1)
        xBC, conv = self.convolve(xBC, conv, tokens)
        u, B, C = xBC.split(self.streams, -1)
        u = repeat_heads(u.unflatten(-1, (-1, self.config.head_dim)), self.num_heads)
        B, C = self.by_groups(B, C, tokens)
        if B.shape[2] != C.shape[2]:
            B, C = (repeat_heads(i, self.num_heads) for i in (B, C))
        dt = F.softplus(at_least_fp32(dt) + self.dt_bias).clamp(*self.config.dt_limit)
        dt = tokens.zero_padding(dt)
        decay = -dt * at_least_fp32(self.A_log).exp()
        return (C, B, (dt[..., None] * u).to(u.dtype), decay, u, *z), conv

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """W_o RMSNorm((o + D x) ⊙ silu(z)), or the gate behind the norm."""
        u, *z = inputs[4:]
        y = (at_least_fp32(o) + self.D.view(self.num_heads, -1) * u).flatten(2)
        gate = F.silu(at_least_fp32(z[0])) if z else 1.0
        if not self.config.rmsnorm:
            y = y * gate
        elif self.config.norm_before_gate:
            y = self.norm(y) * gate
        else:
            y = self.norm(y * gate)
        return self.out_proj(y.to(o.dtype))

    @property
    def step_layer(self) -> tuple[list[Tensor], Tensor]:
        """The last rows of in_proj, and dt_bias."""
        rows = slice(-self.num_heads, None)
        layer = self.in_proj
        biases = [] if layer.bias is None else [layer.bias[rows]]
        return [layer.weight[rows], *biases], self.dt_bias

    @property
    def attention_rows(self) -> dict[str, tuple[nn.Linear, slice]]:
        """v, k and q are x, B and C, which follow z in in_proj."""
        rows, start = {}, self.parts[0]
        for name, width in zip("vkq", self.streams, strict=True):
            rows[name] = self.in_proj, slice(start, start + width)
            start += width
        return rows

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """A head for each of the attention's, with a C of its own; no norm."""
        return cls.Config(**cls.conversion_fields(site), n_groups=site.num_heads, rmsnorm=False)
