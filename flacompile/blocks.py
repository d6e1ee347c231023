"""What mixers are made of besides their recurrence, in plain PyTorch: Inductor fuses these.

Norms, low-rank maps, rotary embedding, feature maps, token shift and the short causal convolution.
Layouts are ``[B, T, D]`` and ``[B, T, H, K]`` throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.ops import conv
from flacompile.ops.conv import inputs_before

if TYPE_CHECKING:
    from flacompile.layers.base import Tokens


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · (offset + weight), the mean in fp32.

    Args:
        dim: size of the last axis.
        eps: added to the mean square.
        offset: 1 for the (1 + weight) form of Gemma.
        affine: whether there is a weight; the neutral one is 1 - offset.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, offset: float = 0.0, affine: bool = True
    ) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> y of its shape and dtype."""
        y = at_least_fp32(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * (self.offset + self.weight.to(y.dtype))
        return y.to(x.dtype)


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(Σ x² + 1e-6) over the last axis, the sum in fp32."""
    y = at_least_fp32(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with log(1 + e^x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


class QKNorm(NamedTuple):
    """RMS norm of queries and keys before rotary: over each head, or over the full width."""

    eps: float = 1e-5
    per_head: bool = True
    offset: float = 0.0

    def module(self, num_heads: int, head_dim: int) -> RMSNorm:
        """The norm of q or of k, with its weight."""
        return RMSNorm(head_dim * (1 if self.per_head else num_heads), self.eps, self.offset)

    def apply(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """Normalises x [B, T, n H, K], the H heads of each of n alike; n is most often 1."""
        assert norm.weight is not None
        return norm(x.flatten(-2).unflatten(-1, (-1, norm.weight.shape[0]))).view_as(x)


def low_rank(dim: int, rank: int, out: int, bias: bool = True) -> nn.Sequential:
    """x -> W2 (W1 x) + b, parameters 0.weight, 1.weight and 1.bias."""
    return nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, out, bias=bias))


class Rotary(nn.Module):
    """Rotates pairs of channels by angle position · inv_freq, in fp32.

    (x, y) -> factor · (x cos - y sin, y cos + x sin)

    The first 2 · len(inv_freq) channels of a head are rotated, the rest pass. A pair is (i, i + n)
    of the rotated channels, or (2 i, 2 i + 1) when interleaved.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        inv_freq: tuple[float, ...]
        interleaved: bool = False
        factor: float = 1.0

        @classmethod
        def from_theta(cls, theta: float, dim: int) -> Rotary.Config:
            """inv_freq_i = theta^(-2i / dim)."""
            return cls(inv_freq=tuple(theta ** (-i / dim) for i in range(0, dim, 2)))

    inv_freq: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Follows the device of the module and never its dtype: frequencies stay fp32."""
        super()._apply(fn, recurse)
        self.inv_freq = torch.tensor(
            self.config.inv_freq, dtype=torch.float32, device=self.inv_freq.device
        )
        return self

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotates x [B, T, H, K] by position [B, T]."""
        width = 2 * len(self.config.inv_freq)
        turned, rest = at_least_fp32(x[..., :width]), x[..., width:]
        angle = position[..., None, None].to(turned.dtype) * self.inv_freq.to(turned.dtype)
        cos, sin = angle.cos() * self.config.factor, angle.sin() * self.config.factor
        if self.config.interleaved:
            a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned.to(x.dtype), rest), -1)


class Hedgehog(nn.Module):
    """φ(x) = softmax([2 W x, -2 W x]), W = 1 at first (Zhang et al. 2024); doubles the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, dim)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., 2 K], above 0 and of sum one."""
        y = 2 * self.layer(x)
        return torch.cat((y, -y), -1).softmax(-1)


class T2R(nn.Module):
    """φ(x) = relu(W x) (Kasai et al. 2021)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K], 0 or more."""
        return self.layer(x).relu()


class ElementwiseProduct(nn.Module):
    """φ(x) = (W1 x + b1) ⊙ (W2 x + b2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(dim, dim)
        self.layer2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K], of either sign."""
        return self.layer1(x) * self.layer2(x)


class DPFP(nn.Module):
    """φ(x)_{j,i} = r_i r_{i-j} with r = relu([x, -x]), j = 1..4 (Schlag et al. 2021)."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., 8 K], 0 or more."""
        r = torch.cat((x, -x), -1).relu()
        return torch.cat([r * r.roll(j, -1) for j in range(1, 5)], -1)


class Elementwise(nn.Module):
    """φ by a function of one channel."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K]."""
        return self.function(x)


def positive_elu(x: Tensor) -> Tensor:
    """elu + 1 > 0."""
    return F.elu(x) + 1


def identity(x: Tensor) -> Tensor:
    """x itself; by name, as every activation, so that a model can be pickled."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": positive_elu,
    "gelu": F.gelu,
    "identity": identity,
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
}
FEATURE_MAPS: dict[str, Callable[[int], nn.Module]] = {
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "elementwise_product": ElementwiseProduct,
    "dpfp": DPFP,
}
FEATURE_WIDTH = {"hedgehog": 2, "dpfp": 8}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; "elu" is elu + 1."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def feature_map(name: str, dim: int) -> tuple[nn.Module, int]:
    """The feature map of that name for heads of ``dim`` channels, and its output width."""
    if name in FEATURE_MAPS:
        return FEATURE_MAPS[name](dim), dim * FEATURE_WIDTH.get(name, 1)
    if name in ("elu", "relu", "identity"):
        return Elementwise(ACTIVATIONS[name]), dim
    names = sorted([*FEATURE_MAPS, "elu", "relu", "identity"])
    raise ValueError(f"feature_map: expected one of {names}, got {name!r}")


def tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, C] at the tokens index [B, T] of each row: [B, T, C]."""
    # not take_along_dim, which is compiled for one T alone
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def last_inputs(x: Tensor, past: Tensor, tokens: Tokens) -> Tensor:
    """The inputs that the next call of a convolution needs.

    Args:
        x: [B, T, C].
        past: the W - 1 inputs before x in each sequence, [N, W - 1, C].
        tokens: where the T tokens stand.

    Returns:
        The last W - 1 real inputs of each sequence [N, W - 1, C], older ones from ``past``.
    """
    reach, time = past.shape[1], x.shape[1]
    if tokens.cu_seqlens is None:
        padded = torch.cat((past, x), 1)
        if tokens.lengths is None:
            return padded[:, time:]
        index = tokens.lengths[:, None] + torch.arange(reach, device=x.device)
        return tokens_at(padded, index)
    index = tokens.cu_seqlens.diff()[:, None] + torch.arange(-reach, 0, device=x.device)
    old = tokens_at(past, (index + reach).clamp(max=reach - 1))
    new = x[0, (tokens.cu_seqlens[:-1, None] + index).clamp(0, time - 1)]
    return torch.where(index[..., None] < 0, old, new)


def no_inputs(x: Tensor, reach: int, tokens: Tokens) -> Tensor:
    """What stands before x [B, T, C] in sequences that have not begun, [N, W - 1, C]."""
    return x.new_zeros(tokens.end.shape[0], reach, x.shape[-1])


def token_shift(x: Tensor, past: Tensor | None, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """x_{t-1} for every t, the first token of a sequence taking the carried one, or zero.

    Args:
        x: [B, T, C].
        past: the last input of each sequence, [N, 1, C], or None.
        tokens: where the T tokens stand.

    Returns:
        x_{t-1} [B, T, C] and the last input of each sequence [N, 1, C].
    """
    past = no_inputs(x, 1, tokens) if past is None else past.to(x.dtype)
    past = inputs_before(x, past)
    if tokens.cu_seqlens is None:
        before = torch.cat((past, x), 1)[:, : x.shape[1]]
    else:
        assert tokens.since is not None
        first = (tokens.since == 0)[:, None]
        before = torch.where(first, past[tokens.segment, 0], x.roll(1, 1))
    return before, last_inputs(x, past, tokens)


class ShortConvolution(nn.Module):
    """y_t = act(b + Σ_i w_i x_{t-i}), one filter of W taps a channel, w stored oldest tap first.

    Tokens before the start of a sequence are the carried state, or zero. A tap that would reach
    into the previous sequence of a pack takes the state of its own sequence instead.

    Args:
        dim: number of channels.
        size: taps of each filter, W.
        bias: whether there is one.
        activation: name of act; None is the identity.
    """

    def __init__(
        self, dim: int, size: int, bias: bool = False, activation: str | None = "silu"
    ) -> None:
        super().__init__()
        self.size = size
        self.activation = ACTIVATIONS[activation or "identity"]
        self.weight = nn.Parameter(torch.empty(dim, 1, size))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Weighs the current token by one and those before it by zero: y = act(x)."""
        self.weight.zero_()
        self.weight[..., -1] = 1
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, past: Tensor | None, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Convolves and returns the inputs that the next call needs.

        Args:
            x: [B, T, C].
            past: the last W - 1 inputs of each sequence, [N, W - 1, C], or None.
            tokens: where the T tokens stand.

        Returns:
            y [B, T, C] and the last W - 1 inputs [N, W - 1, C].
        """
        past = no_inputs(x, self.size - 1, tokens) if past is None else past.to(x.dtype)
        y, last = conv(x, self.weight[:, 0], self.bias, state=past, cu_seqlens=tokens.cu_seqlens)
        if tokens.lengths is not None:  # the op has taken padding for tokens
            last = last_inputs(x, past, tokens)
        return self.activation(y), last
