"""The projections of attention, which its linear relatives keep: q, k, v, norms, rotary, o.

The fields after ``num_kv_heads`` are those a conversion needs to take over somebody's attention as
it stands; their defaults leave the mixer as it is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from flacompile.blocks import QKNorm, Rotary, ShortConvolution
from flacompile.layers.base import Mixer, Tokens
from flacompile.ops.validate import check_shape, expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights, NormSite


class QKVMixer(Mixer):
    """q, k, v = rotary(norm(conv(W x + b))) by heads, y = W_o o + b_o."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """head_dim: size of a head of q, k and v; scale: factor on q·k, None is K^-0.5."""

        hidden_size: int = 1024
        num_heads: int = 4
        num_kv_heads: int | None = None
        head_dim: int | None = None
        qkv_bias: bool = False
        o_bias: bool = False
        rotary: Rotary.Config | None = None
        qk_norm: QKNorm | None = None
        scale: float | None = None

        def head_dims(self, expand_k: float, expand_v: float) -> tuple[int, int]:
            """(K, V) of a head: head_dim, or its share of the expanded width."""
            if self.head_dim is not None:
                return self.head_dim, self.head_dim
            key, value = (int(self.hidden_size * e) // self.num_heads for e in (expand_k, expand_v))
            return key, value

    config: Config
    places: ClassVar[dict[str, str]] = {name: f"{name}_proj" for name in "qkvo"}

    def __init__(
        self,
        config: Config,
        key_dim: int,
        value_dim: int,
        rotary: Rotary.Config | None,
        qk_norm: QKNorm | None,
    ) -> None:
        """``key_dim`` and ``value_dim`` are those of a head."""
        super().__init__(config)
        heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        expect(heads % kv_heads == 0, "num_kv_heads", f"a divisor of {heads}", kv_heads)
        self.key_dim, self.value_dim, self.kv_heads = key_dim, value_dim, kv_heads
        self.scale = config.scale
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = self.linear(width, heads * key_dim, bias)
        self.k_proj = self.linear(width, kv_heads * key_dim, bias)
        self.v_proj = self.linear(width, kv_heads * value_dim, bias)
        self.o_proj = self.linear(heads * value_dim, width, config.o_bias)
        self.qk_norm = qk_norm
        if self.qk_norm is not None:
            self.q_norm = self.qk_norm.module(heads, key_dim)
            self.k_norm = self.qk_norm.module(kv_heads, key_dim)
        turned = 0 if rotary is None else 2 * len(rotary.inv_freq)
        expect(turned <= key_dim, "rotary", f"at most {key_dim} channels of a head", turned)
        self.rotary = None if rotary is None else Rotary(rotary)
        self.convolutions: tuple[str, ...] = ()

    def linear(self, inputs: int, outputs: int, bias: bool) -> nn.Linear:
        """What q, k, v and o are made of."""
        return nn.Linear(inputs, outputs, bias)

    def add_convolutions(self, size: int, bias: bool, activation: str | None = "silu") -> None:
        """A short convolution on each of q, k and v."""
        self.convolutions = ("q_conv1d", "k_conv1d", "v_conv1d")
        for name, proj in zip(self.convolutions, self._projections(), strict=True):
            setattr(self, name, ShortConvolution(proj.out_features, size, bias, activation))

    @property
    def conv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(W - 1, C) of each short convolution."""
        weights = [self.get_parameter(f"{name}.weight") for name in self.convolutions]
        return tuple((w.shape[2] - 1, w.shape[0]) for w in weights)

    def qkv(
        self, x: Tensor, past: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """x [B, T, D] -> q [B, T, H, K], k [B, T, H_kv, K], v [B, T, H_kv, V] and conv inputs."""
        streams, conv = [proj(x) for proj in self._projections()], []
        for i, name in enumerate(self.convolutions):
            convolve = self.get_submodule(name)
            streams[i], last = convolve(streams[i], None if past is None else past[i], tokens)
            conv.append(last)
        return *self.by_heads(streams, tokens), tuple(conv)

    def by_heads(self, streams: Sequence[Tensor], tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Three projections [B, T, H *] -> q, k, v [B, T, H, *], normalised and rotated."""
        dims = (self.key_dim, self.key_dim, self.value_dim)
        q, k, v = (s.unflatten(-1, (-1, dim)) for s, dim in zip(streams, dims, strict=True))
        if self.qk_norm is not None:
            q, k = self.qk_norm.apply(self.q_norm, q), self.qk_norm.apply(self.k_norm, k)
        if self.rotary is not None:
            q, k = self.rotary(q, tokens.position), self.rotary(k, tokens.position)
        return q, k, v

    @property
    def heads_by_key(self) -> list[range]:
        """The heads that share each head of k and v."""
        size = self.config.num_heads // self.kv_heads
        return [range(size * i, size * (i + 1)) for i in range(self.kv_heads)]

    def projection(self, name: str) -> nn.Linear:
        """The one of attention's projections that is called "q", "k", "v" or "o"."""
        return self.get_submodule(self.places[name])  # type: ignore[return-value]

    @property
    def layers_by_head(self) -> list[nn.Linear]:
        """As the base class, and q where it stands deeper than a child."""
        q, layers = self.projection("q"), super().layers_by_head
        return layers if q in layers else [q, *layers]

    def _projections(self) -> list[nn.Linear]:
        return [self.projection(name) for name in "qkv"]

    @classmethod
    def site_fields(cls, site: AttentionSite) -> dict[str, Any]:
        """The Config fields above, as an attention found in a model has them."""
        projections = (site.q, site.k, site.v)
        rotary = site.rotary
        return {
            "hidden_size": site.hidden_size,
            "num_heads": site.num_heads,
            "num_kv_heads": site.num_kv_heads,
            "head_dim": site.head_dim,
            "qkv_bias": any(p.bias_fqn is not None for p in projections),
            "o_bias": site.o.bias_fqn is not None,
            "rotary": None
            if rotary is None
            else Rotary.Config(
                inv_freq=tuple(rotary.inv_freq),
                interleaved=rotary.interleaved,
                factor=rotary.factor,
            ),
            "qk_norm": _qk_norm(site.q_norm, site.k_norm),
            "scale": site.scale,
        }

    def attention_rows(self, name: str, parameter: Tensor) -> Tensor:
        """The part of a weight or bias that an attention's goes into: all of it."""
        return parameter

    @torch.no_grad()
    def load_attention(self, weights: AttentionWeights) -> None:
        """Copies an attention's projections and norms; a bias it lacks becomes zero."""
        for name in "qkvo":
            proj = self.projection(name)
            rows = self.attention_rows(name, proj.weight)
            _copy(f"{name}_weight", rows, getattr(weights, f"{name}_weight"))
            bias = getattr(weights, f"{name}_bias")
            expect(bias is None or proj.bias is not None, f"{name}_bias", "None", "a tensor")
            if bias is not None:
                _copy(f"{name}_bias", self.attention_rows(name, proj.bias), bias)
            elif proj.bias is not None:
                proj.bias.zero_()
        if self.qk_norm is not None:
            for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
                own: Tensor = norm.weight  # type: ignore[assignment]
                own.fill_(1 - norm.offset)  # that of a norm without weight
                if (weight := getattr(weights, name)) is not None:
                    _copy(name, own, weight)


def _qk_norm(q: NormSite | None, k: NormSite | None) -> QKNorm | None:
    kinds = [None if n is None else QKNorm(n.eps, n.per_head, n.offset) for n in (q, k)]
    expect(kinds[0] == kinds[1], "k_norm", f"the norm of q, {kinds[0]}", kinds[1])
    return kinds[0]


def _copy(name: str, target: Tensor, source: Tensor) -> None:
    check_shape(name, source, tuple(target.shape))
    target.copy_(source)
