"""Softmax attention with rotary embedding, by PyTorch's ``scaled_dot_product_attention``.

    o_t = Σ_s softmax_s(scale q_t·k_s) v_s        over s <= t, and s > t - window

The quadratic baseline, and what a conversion leaves in the layers it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.blocks import QKNorm, Rotary
from flacompile.layers.base import Tokens
from flacompile.layers.qkv import QKVMixer
from flacompile.ops.validate import check_shape, expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite


class AttentionState(NamedTuple):
    """Keys after rotary and values [N, S, H_kv, K], which of them are real, and the tokens seen.

    valid [N, S] bool; position [N] int64. S grows with every call, up to the window if any.
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    position: Tensor


class Attention(QKVMixer):
    @dataclass(frozen=True, kw_only=True)
    class Config(QKVMixer.Config):
        """qk_norm: True is an RMS norm of each head; rope_theta: None is no rotary."""

        hidden_size: int = 2048
        num_heads: int = 32
        qk_norm: QKNorm | bool = False
        window_size: int | None = None
        rope_theta: float | None = 10000.0

    State = AttentionState
    config: Config

    def __init__(self, config: Config) -> None:
        head_dim = config.head_dim or config.hidden_size // config.num_heads
        rotary = config.rotary
        if rotary is None and config.rope_theta is not None:
            rotary = Rotary.Config.from_theta(config.rope_theta, head_dim)
        norm = QKNorm() if config.qk_norm is True else config.qk_norm or None
        super().__init__(config, head_dim, head_dim, rotary, norm)

    def sequence(
        self, x: Tensor, state: AttentionState | None, tokens: Tokens
    ) -> tuple[Tensor, AttentionState]:
        q, k, v, _ = self.qkv(x, None, tokens)
        mask, keys, values = self._past(state, k, v, tokens)
        o = self.mix(q, keys, values, mask)
        return self.o_proj(o.flatten(2)), self._next_state(state, k, v, tokens)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Causal where there is no mask [1 or B, T, S]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[:, None],
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.kv_heads != self.config.num_heads,
        )
        return o.transpose(1, 2)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        self.validate_step(x, state)
        x = x[:, None]
        y, state = self.sequence(x, state, Tokens.of(x, state.position, None, None))
        return y[:, 0], state

    def _past(
        self, state: AttentionState | None, k: Tensor, v: Tensor, tokens: Tokens
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Mask, keys and values: those of the state, then those of this call."""
        window = self.config.window_size
        if state is None and window is None and tokens.segment is None:
            return None, k, v  # padding comes last, where a causal mask never looks
        time = torch.arange(k.shape[1], device=k.device)
        age = time[:, None] - time
        seen = (age >= 0) if window is None else (age >= 0) & (age < window)
        if tokens.segment is not None:
            seen = seen & (tokens.segment[:, None] == tokens.segment)
        seen = seen[None]
        if state is None:
            return seen, k, v
        seen = torch.cat((self._sees_state(state, tokens), seen.expand(k.shape[0], -1, -1)), 2)
        rows = (k.shape[0], -1, *k.shape[2:])  # a pack sees the states of its sequences in a row
        keys = torch.cat((state.k.reshape(rows), k), 1)
        return seen, keys, torch.cat((state.v.reshape(rows), v), 1)

    def _sees_state(self, state: AttentionState, tokens: Tokens) -> Tensor:
        """Which keys of the state each token sees: [B, T, S], or [1, T, N S] for a pack."""
        rows, time = tokens.position.shape
        sees = state.valid.reshape(rows, 1, -1)
        if tokens.segment is not None:
            owner = torch.arange(state.valid.shape[0], device=sees.device)[:, None]
            owner = owner.expand_as(state.valid).reshape(1, 1, -1)
            sees = sees & (owner == tokens.segment[None, :, None])
        if self.config.window_size is not None:
            from_here_on = state.valid.flip(1).cumsum(1).flip(1)
            key_position = (state.position[:, None] - from_here_on).reshape(rows, 1, -1)
            sees = sees & (tokens.position[..., None] - key_position < self.config.window_size)
        return sees.expand(rows, time, -1)

    def _next_state(
        self, state: AttentionState | None, k: Tensor, v: Tensor, tokens: Tokens
    ) -> AttentionState:
        """Every sequence of a pack keeps a view of all its keys and marks its own as valid."""
        num_sequences, time = tokens.end.shape[0], torch.arange(k.shape[1], device=k.device)
        if tokens.segment is not None:
            valid = tokens.segment == torch.arange(num_sequences, device=k.device)[:, None]
        elif tokens.lengths is not None:
            valid = time < tokens.lengths[:, None]
        else:
            valid = (time >= 0).expand(num_sequences, -1)
        kept = [x.expand(num_sequences, *x.shape[1:]) for x in (k, v)] + [valid]
        if state is not None:
            kept = [torch.cat(pair, 1) for pair in zip(state[:3], kept, strict=True)]
        if self.config.window_size is not None:
            last = kept[2].int().argsort(dim=1, stable=True)[:, -self.config.window_size :]
            rows = torch.arange(num_sequences, device=k.device)[:, None]
            kept = [x[rows, last] for x in kept]
        k, v, valid = kept
        return AttentionState(k, v, valid, tokens.end)

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> AttentionState:
        weight = self.q_proj.weight
        device = weight.device if device is None else device
        empty = torch.zeros(
            batch_size, 0, self.kv_heads, self.key_dim, dtype=weight.dtype, device=device
        )
        valid = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return AttentionState(empty, empty.clone(), valid, position)

    def validate_state(self, state: AttentionState, num_sequences: int) -> None:
        length = state.valid.shape[1]
        check_shape("state.valid", state.valid, (num_sequences, length))
        shape = (num_sequences, length, self.kv_heads, self.key_dim)
        check_shape("state.k", state.k, shape)
        check_shape("state.v", state.v, shape)
        check_shape("state.position", state.position, (num_sequences,))
        expect(state.valid.dtype == torch.bool, "state.valid", "torch.bool", state.valid.dtype)

    @classmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """The same attention as the site."""
        fields = cls.site_fields(site)
        fields["qk_norm"] = fields["qk_norm"] or False
        return cls.Config(**fields, rope_theta=None, window_size=site.window)
