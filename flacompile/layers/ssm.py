"""What the state-space mixers share: the step size dt, B and C by heads, and attention as one.

    S_t = e^(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = C_t S_t + D x_t

An attention gives x = v, B = k and C = q. With A = -1 a head weighs the token i steps ago by
dt e^(-i dt); for any small dt these weights add up to nearly one, as those of a softmax do.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flacompile.blocks import QKNorm, Rotary, ShortConvolution, activation, inverse_softplus
from flacompile.layers.base import Mixer, RecurrentMixer, Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.validate import check_shape, expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class StateSpaceMixer(RecurrentMixer):
    """in_proj, conv1d, out_proj. Subclasses add A_log, D, ``attention_rows``, ``step_layer``."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """hidden_act: of the conv (and Mamba's gate); dt_min, dt_max: dt's range at first.

        The fields after num_heads are those a conversion needs; their defaults leave the mixer as
        it is published. num_kv_heads: heads of x and B, each for several of C; qkv_bias, o_bias: a
        bias where use_bias sets none; rotary, qk_norm: of C and B; scale: factor on C·B.
        """

        hidden_size: int = 2048
        state_size: int = 16
        conv_kernel: int = 4
        use_conv_bias: bool = True
        hidden_act: str = "silu"
        use_bias: bool = False
        dt_min: float = 0.001
        dt_max: float = 0.1
        dt_init_floor: float = 1e-4
        num_heads: int | None = None
        num_kv_heads: int | None = None
        qkv_bias: bool = False
        o_bias: bool = False
        rotary: Rotary.Config | None = None
        qk_norm: QKNorm | None = None
        scale: float = 1.0
        use_short_conv: bool = True
        use_output_gate: bool = True

    config: Config
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self, config: Config, num_heads: int, groups: int, widths: tuple[int, int, int]
    ) -> None:
        """``groups``: those of C, and of B without num_kv_heads; ``widths``: in, conv, out."""
        super().__init__(config)
        kv_heads, N = config.num_kv_heads or num_heads, config.state_size
        expect(num_heads % kv_heads == 0, "num_kv_heads", f"a divisor of {num_heads}", kv_heads)
        expect(num_heads % groups == 0, "n_groups", f"a divisor of {num_heads}", groups)
        self.num_heads, self.kv_heads, self.scale = num_heads, kv_heads, config.scale
        self.activation = activation(config.hidden_act)
        bias = config.use_bias or config.qkv_bias
        self.in_proj = nn.Linear(config.hidden_size, widths[0], bias)
        if config.use_short_conv:
            self.conv1d = ShortConvolution(
                widths[1], config.conv_kernel, config.use_conv_bias, config.hidden_act
            )
        self.out_proj = nn.Linear(widths[2], config.hidden_size, config.use_bias or config.o_bias)
        if config.qk_norm is not None:
            self.C_norm = config.qk_norm.module(groups, N)
            self.B_norm = config.qk_norm.module(config.num_kv_heads or groups, N)
        turned = 0 if config.rotary is None else 2 * len(config.rotary.inv_freq)
        expect(turned <= N, "rotary", f"at most {N} channels of a head", turned)
        self.rotary = None if config.rotary is None else Rotary(config.rotary)

    def draw_step(self, count: int) -> Tensor:
        """[count] of softplus^-1(dt), log dt uniform between dt_min and dt_max."""
        low, high = math.log(self.config.dt_min), math.log(self.config.dt_max)
        dt = torch.empty(count).uniform_(low, high).exp().clamp(min=self.config.dt_init_floor)
        return inverse_softplus(dt)

    @property
    def conv_shapes(self) -> tuple[tuple[int, int], ...]:
        """The last inputs of the convolution, where there is one."""
        if not self.config.use_short_conv:
            return ()
        weight = self.conv1d.weight
        return ((weight.shape[2] - 1, weight.shape[0]),)

    def convolve(
        self, x: Tensor, past: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, T, C] after the short convolution, where there is one, and its next state."""
        if not self.config.use_short_conv:
            return x, ()
        x, last = self.conv1d(x, None if past is None else past[0], tokens)
        return x, (last,)

    def by_groups(self, B: Tensor, C: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """B, C [B, T, G N] -> [B, T, G, N], normalised and turned as keys and queries are."""
        B, C = (i.unflatten(-1, (-1, self.config.state_size)) for i in (B, C))
        if (norm := self.config.qk_norm) is not None:
            B, C = norm.apply(self.B_norm, B), norm.apply(self.C_norm, C)
        if self.rotary is not None:
            B, C = self.rotary(B, tokens.position), self.rotary(C, tokens.position)
        return B, C

    @property
    @abstractmethod
    def step_layer(self) -> tuple[list[Tensor], Tensor]:
        """What makes dt depend on the input, and softplus^-1(dt) without it, in head order."""

    @property
    @abstractmethod
    def attention_rows(self) -> dict[str, tuple[nn.Linear, slice]]:
        """The rows of a layer that stand for an attention's "q", "k" and "v"."""

    @property
    def layers_by_head(self) -> list[nn.Linear]:
        """None: the rows of in_proj are those of several streams, one after the other."""
        return []

    @property
    def output_layer(self) -> nn.Linear:
        """W_o."""
        return self.out_proj

    @property
    def output_heads(self) -> int:
        """Those of dt."""
        return self.num_heads

    @torch.no_grad()
    def set_half_life(self, tokens: Tensor) -> None:
        """Makes head h halve its state every tokens[h] tokens, whatever the input.

        A = -1 and dt = ln 2 / tokens.

        Args:
            tokens: [H], > 0.
        """
        check_shape("tokens", tokens, (self.num_heads,))
        weights, bias = self.step_layer
        for weight in weights:
            weight.zero_()
        self.A_log.zero_()
        dt = inverse_softplus(math.log(2) / tokens.double())
        bias.copy_(dt.repeat_interleave(len(bias) // self.num_heads))

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Copies an attention's projections and norms; half-lives from 8 to 128 tokens, no D.

        Each head is scaled by (1 - e^-dt) / dt, so that the weights it sums with add up to one.
        """
        for name, (layer, rows) in (
            self.attention_rows | {"o": (self.out_proj, slice(None))}
        ).items():
            _load(f"{name}_weight", layer.weight[rows], getattr(weights, f"{name}_weight"))
            bias = None if layer.bias is None else layer.bias[rows]
            _load(f"{name}_bias", bias, getattr(weights, f"{name}_bias"))
        if self.config.qk_norm is not None:
            for name, norm in (("q_norm", self.C_norm), ("k_norm", self.B_norm)):
                given, own = getattr(weights, name), norm.get_parameter("weight")
                neutral = torch.full_like(own, 1 - norm.offset)
                _load(name, own, neutral if given is None else given)
        self.D.zero_()
        self.set_half_life(self.neutral_half_life)
        dt = math.log(2) / self.neutral_half_life
        self.scale_heads(-torch.expm1(-dt) / dt)

    @classmethod
    def conversion_fields(cls, site: AttentionSite) -> dict[str, Any]:
        """Config fields of a conversion: no conv and no gate between q, k, v and o."""
        fields = QKVMixer.site_fields(site) | {"use_short_conv": False, "use_output_gate": False}
        return fields | {"state_size": site.head_dim}


def _load(name: str, target: Tensor | None, source: Tensor | None) -> None:
    """Copies into a parameter; a bias that the source lacks becomes zero."""
    expect(source is None or target is not None, name, "None", "a tensor")
    if target is not None:
        source = torch.zeros_like(target) if source is None else source
        check_shape(name, source, tuple(target.shape))
        target.copy_(source)
