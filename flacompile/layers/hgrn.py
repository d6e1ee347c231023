"""HGRN (Qin et al. 2023, arXiv 2311.04823).

h_t = f_t ⊙ h_{t-1} + (1 - f_t) ⊙ silu(W_i x_t)        f_t = lb + (1 - lb) σ(W_f x_t)
y_t = W_o [RMSNorm(h_t) ⊙ swish(W_g x_t)]

The state is a vector: a conversion has a place for values, i, and none for queries and keys. It
keeps two averages of every value, of half-lives a factor apart, behind short convolutions that
pass the current token at first, and a gate of x among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.blocks import RMSNorm, ShortConvolution, activation, at_least_fp32
from flacompile.layers.base import Mixer, RecurrentMixer, Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops import scan, scan_step
from flacompile.ops.validate import check_shape

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights

OPEN = 1.2784645  # swish(OPEN) = 1
APART = 4.0  # ratio of the half-lives of neighbouring timescales


class ForgetGate(nn.Module):
    """f = lb + (1 - lb) σ(z) as log f and 1 - f, in fp32, exact where f is next to 0 or to 1.

    1 - f = (1 - lb) σ(-z)
    log f = log(1 - (1 - f)), or where f < 1/2: log σ(z) - log σ(z - log lb)

    Args:
        lower_bound: lb, one number or one a channel, in [0, 1).
    """

    lower_bound: Tensor

    def __init__(self, lower_bound: float | tuple[float, ...]) -> None:
        super().__init__()
        self.numbers = lower_bound
        bound = torch.tensor(lower_bound, dtype=torch.float32)
        self.register_buffer("lower_bound", bound, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ForgetGate:
        """Follows the device of the module and never its dtype: the bound stays fp32."""
        super()._apply(fn, recurse)
        device = self.lower_bound.device
        self.lower_bound = torch.tensor(self.numbers, dtype=torch.float32, device=device)
        return self

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log f and 1 - f of z [..., C]."""
        z = at_least_fp32(z)
        lb = self.lower_bound.to(z.dtype)
        write = (1 - lb) * torch.sigmoid(-z)
        near_zero = F.logsigmoid(z) - F.logsigmoid(z - lb.log())
        near_one = torch.log1p(-write.clamp(max=0.5))  # the clamp: no infinite slope is left
        return torch.where(write < 0.5, near_one, near_zero), write

    def logit(self, log_f: Tensor) -> Tensor:
        """z of log f, the other way round; f > lb."""
        return torch.log((log_f.exp() - self.lower_bound) / -torch.expm1(log_f))


class ForgetMixer(RecurrentMixer):
    """A mixer with a forget gate f; the projections in ``streams`` may have a convolution each."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """lower_bound: of f, one number or one a channel; the published model learns it.

        A model's bounds are cumsum(softmax(b)) over its layers, less that of the first.
        """

        hidden_size: int = 1024
        use_short_conv: bool = False
        conv_size: int = 4
        conv_bias: bool = False
        elementwise_affine: bool = True
        norm_eps: float = 1e-5
        lower_bound: float | tuple[float, ...] = 0.0

    config: Config
    streams: ClassVar[tuple[str, ...]]
    f_proj: nn.Linear

    def add_gate_and_convolutions(self) -> None:
        """The gate, and a convolution without activation behind each of ``streams``."""
        c = self.config
        self.forget = ForgetGate(c.lower_bound)
        for name in self.streams if c.use_short_conv else ():
            channels = len(self.get_parameter(f"{name}_proj.weight"))
            convolution = ShortConvolution(channels, c.conv_size, c.conv_bias, activation=None)
            setattr(self, f"{name}_conv1d", convolution)

    @property
    def conv_shapes(self) -> tuple[tuple[int, int], ...]:
        """The last inputs of each convolution, where there are some."""
        if not self.config.use_short_conv:
            return ()
        weights = [self.get_parameter(f"{name}_conv1d.weight") for name in self.streams]
        return tuple((w.shape[2] - 1, w.shape[0]) for w in weights)

    def project_streams(
        self, x: Tensor, past: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Each of ``streams`` [B, T, *] and the next convolution state."""
        streams, conv = [self.get_submodule(f"{name}_proj")(x) for name in self.streams], []
        for i, name in enumerate(self.streams if self.config.use_short_conv else ()):
            convolve = self.get_submodule(f"{name}_conv1d")
            streams[i], last = convolve(streams[i], None if past is None else past[i], tokens)
            conv.append(last)
        return streams, tuple(conv)

    @torch.no_grad()
    def set_decay(self, half_life: Tensor) -> None:
        """Half-lives [n] in tokens of n equal runs of the channels of f, whatever the input."""
        half_life = half_life.to(self.f_proj.weight.device, torch.float64)
        z = self.forget.logit(-math.log(2) / half_life)
        self.f_proj.weight.zero_()
        self.f_proj.bias.copy_(z.repeat_interleave(self.f_proj.out_features // len(z)))


class HGRNAttention(ForgetMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(ForgetMixer.Config):
        """The fields after expand_ratio are those a conversion needs.

        num_heads, head_dim: runs of channels that one head of attention becomes, None for the
        published width; timescales: averages kept of each channel; bias, o_bias: of i, f, g and of
        o; activation: of i; output_norm: False as a conversion starts.
        """

        expand_ratio: float = 1
        num_heads: int = 1
        head_dim: int | None = None
        timescales: int = 1
        bias: bool = False
        o_bias: bool = False
        activation: str = "silu"
        output_norm: bool = True

    config: Config
    streams = ("i", "f")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c, width = config, int(config.hidden_size * config.expand_ratio)
        if c.head_dim is not None:
            width = c.num_heads * c.timescales * c.head_dim
        self.i_proj = nn.Linear(c.hidden_size, width, c.bias)
        self.f_proj = nn.Linear(c.hidden_size, width, c.bias)
        self.g_proj = nn.Linear(c.hidden_size, width, c.bias)
        self.o_proj = nn.Linear(width, c.hidden_size, c.o_bias)
        self.add_gate_and_convolutions()
        self.activation = activation(c.activation)
        if c.output_norm:
            self.g_norm = RMSNorm(width, c.norm_eps, affine=c.elementwise_affine)

    @property
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """h, one number a channel."""
        return ((self.o_proj.in_features,),)

    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """g = log f and (1 - f) ⊙ silu(i), both [B, T, C] and zero at padding."""
        (i, f), conv = self.project_streams(x, conv, tokens)
        g, write = self.forget(f)
        i = (write * self.activation(i)).to(i.dtype)
        return (tokens.zero_padding(g), tokens.zero_padding(i)), conv

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """h = scan(g, x), [B, T, C]."""
        h, last = scan(*inputs, state=None if state is None else state[0], cu_seqlens=cu_seqlens)
        return h, (last,)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``mix``, for inputs [B, C]."""
        h, last = scan_step(*inputs, state=state[0])
        return h, (last,)

    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """y = W_o [RMSNorm(h) ⊙ silu(W_g x)]."""
        o = self.g_norm(o) if self.config.output_norm else o
        return self.o_proj(o * F.silu(self.g_proj(x)))

    def set_half_life(self, tokens: Tensor) -> None:
        """The geometric mean of the timescales of head h becomes tokens[h], whatever the input.

        Args:
            tokens: [H], > 0.
        """
        check_shape("tokens", tokens, (self.config.num_heads,))
        scales = torch.arange(self.config.timescales, device=tokens.device)
        apart = APART ** (scales - scales.double().mean())
        self.set_decay((tokens.double()[:, None] * apart).flatten())

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Takes v as i and o; half-lives spread from 8 to 128 tokens; the output gate is one.

        1 - f makes the weights of every average add up to one, as those of a softmax do.
        """
        heads, copies = self.config.num_heads, self.config.timescales
        o = weights.o_weight.unflatten(1, (heads, 1, -1))

        def values(v: Tensor) -> Tensor:
            """[H_kv V, ...] -> [H copies V, ...], for the heads of o and their timescales."""
            v = v.unflatten(0, (-1, 1, 1, o.shape[-1]))
            return v.expand(-1, heads // len(v), copies, *v.shape[3:]).flatten(0, 3)

        v_bias = 0.0 if weights.v_bias is None else values(weights.v_bias)
        _set(self.i_proj, values(weights.v_weight), v_bias)
        o_bias = 0.0 if weights.o_bias is None else weights.o_bias
        _set(self.o_proj, o.expand(-1, -1, copies, -1).flatten(1) / copies, o_bias)
        _set(self.g_proj, 0.0, OPEN)
        for module in self.children():
            if isinstance(module, ShortConvolution):
                module.start_as_identity()
        self.set_half_life(self.neutral_half_life)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """Averages of v at two timescales behind convolutions, and no norm."""
        fields = QKVMixer.site_fields(site)
        kept = {name: fields[name] for name in ("hidden_size", "num_heads", "head_dim", "o_bias")}
        return cls.Config(
            **kept,
            use_short_conv=True,
            timescales=2,
            bias=True,
            activation="identity",
            output_norm=False,
        )


def _set(layer: nn.Linear, weight: Tensor | float, bias: Tensor | float) -> None:
    layer.weight.copy_(torch.as_tensor(weight))
    if layer.bias is not None:
        layer.bias.copy_(torch.as_tensor(bias))
