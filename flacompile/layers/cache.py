"""Mixers that look back at every token: what they keep of each, and who sees what.

    o_t = a function of q_t and of what is kept of the tokens s <= t, s > t - window

What is kept grows by the tokens of each call; with a window it is always that of as many tokens as
the window has, the earliest of which may be empty. A state with room for a given number of tokens
does not grow either: it is written to in place.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.layers.base import Mixer, Tokens
from flacompile.layers.window import Kept, mix_near
from flacompile.ops.validate import check_shape, expect
from flacompile.passes.written_out import softcapped_attention


class AttentionState(NamedTuple):
    """What is kept of each token, which of them are real, and the number of tokens seen.

    cached, tensors [N, S, ...], such as keys after rotary and values; valid [N, S] bool; position
    [N] int64.
    """

    cached: tuple[Tensor, ...]
    valid: Tensor
    position: Tensor


class RoomState(NamedTuple):
    """What is kept of each token, in room for S of them, and the number of tokens seen.

    cached, tensors [N, S, ...], of which the first ``position`` are filled; position [N] int64.
    """

    cached: tuple[Tensor, ...]
    position: Tensor


class CachedMixer(Mixer):
    """A mixer that keeps tokens. Subclasses define project, mix and the shapes of what is kept."""

    State = AttentionState
    window_size: int | None = None

    @property
    def keeps_size(self) -> bool:
        """Whether there is a window."""
        return self.window_size is not None

    @property
    @abstractmethod
    def cached_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each tensor that is kept of a token."""

    @abstractmethod
    def project(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, T, D] -> q [B, T, H, K] and what is kept, tensors [B, T, ...]."""

    @abstractmethod
    def mix(self, q: Tensor, cached: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """q [B, T, H, K] on what is kept of S tokens -> o [B, T, H, V].

        Causal where there is no mask [1 or B, T, S].
        """

    def mix_step(self, q: Tensor, cached: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """As ``mix``, for T = 1."""
        return self.mix(q, cached, mask)

    def sequence(
        self, x: Tensor, state: AttentionState | RoomState | None, tokens: Tokens
    ) -> tuple[Tensor, AttentionState | RoomState]:
        """What is kept goes into a state with room in place, behind another as a longer one."""
        q, new = self.project(x, tokens)
        if isinstance(state, RoomState):
            kept, sees = _fill(state, new, tokens)
            o, next_state = self.mix(q, kept, sees), RoomState(kept, tokens.end)
        elif self.window_size is None:
            o = self.mix(q, _with_past(state, new), _mask(state, tokens))
            next_state = _longer(state, new, tokens)
        else:
            old = None if state is None else Kept(state.cached, state.valid)
            o, kept = mix_near(self.mix, q, new, old, tokens, self.window_size)
            next_state = AttentionState(*kept, tokens.end)
        return self.output_layer(o.flatten(2)), next_state

    def step(
        self, x: Tensor, state: AttentionState | RoomState
    ) -> tuple[Tensor, AttentionState | RoomState]:
        """As ``sequence``; in a window the token takes the place of the oldest."""
        self.validate_step(x, state)
        x = x[:, None]
        tokens = Tokens.of(x, state.position, None, None)
        q, new = self.project(x, tokens)
        if isinstance(state, RoomState):
            filled, sees = _fill(state, new, tokens)
            o = self.mix_step(q, filled, sees)
            return self.output_layer(o.flatten(2))[:, 0], RoomState(filled, tokens.end)
        oldest = 0 if self.window_size is None else 1  # leaves the window
        pairs = zip(
            (*state.cached, state.valid), (*new, state.valid.new_ones(x.shape[0], 1)), strict=True
        )
        *kept, valid = (torch.cat((old[:, oldest:], token), 1) for old, token in pairs)
        o = self.mix_step(q, tuple(kept), valid[:, None])
        next_state = AttentionState(tuple(kept), valid, tokens.end)
        return self.output_layer(o.flatten(2))[:, 0], next_state

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> AttentionState:
        """No token kept, or as many empty ones as the window has."""
        weight = next(self.parameters())
        device = weight.device if device is None else device
        rows = (batch_size, self.window_size or 0)
        cached = tuple(
            torch.zeros(*rows, *shape, dtype=weight.dtype, device=device)
            for shape in self.cached_shapes
        )
        valid = torch.zeros(rows, dtype=torch.bool, device=device)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return AttentionState(cached, valid, position)

    def init_room(
        self, batch_size: int, max_length: int, *, device: torch.device | None = None
    ) -> RoomState:
        """As ``init_state``, with room for ``max_length`` tokens, in which a call writes in place.

        For rows without padding. What is given to a call is spent: only its result is a state.
        """
        expect(not self.keeps_size, "max_length", "a mixer without window", self.window_size)
        weight = next(self.parameters())
        device = weight.device if device is None else device
        cached = tuple(
            torch.zeros(batch_size, max_length, *shape, dtype=weight.dtype, device=device)
            for shape in self.cached_shapes
        )
        return RoomState(cached, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def validate(
        self, x: Tensor, state: Any, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        """As the base class; a state with room is for rows without mask and packing."""
        has_room = isinstance(state, RoomState)
        super().validate(x, None if has_room else state, mask, cu_seqlens)
        if has_room:
            for name, given in (("mask", mask), ("cu_seqlens", cu_seqlens)):
                expect(given is None, name, "None with a state of a given length", "a tensor")
            self.validate_state(state, x.shape[0])

    def validate_state(self, state: AttentionState | RoomState, num_sequences: int) -> None:
        """Number and shapes of what is kept, and of valid and position."""
        rows = (num_sequences, state.cached[0].shape[1])
        if isinstance(state, AttentionState):
            check_shape("state.valid", state.valid, rows)
            expect(state.valid.dtype == torch.bool, "state.valid", "torch.bool", state.valid.dtype)
        number = len(self.cached_shapes)
        expect(len(state.cached) == number, "state.cached", f"{number} tensors", len(state.cached))
        for i, (part, shape) in enumerate(zip(state.cached, self.cached_shapes, strict=True)):
            check_shape(f"state.cached[{i}]", part, (*rows, *shape))
        check_shape("state.position", state.position, (num_sequences,))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None = None,
) -> Tensor:
    """o_t = Σ_s softmax_s(scale q_t·k_s) v_s; a head of k and v serves H / H_kv heads of q.

    Args:
        q: [B, T, H, K].
        k: [B, S, H_kv, K].
        v: [B, S, H_kv, V].
        mask: [1 or B, 1 or T, S], or None for s <= t.
        scale: None is K^-0.5.
        softcap: c, for a softmax over c tanh(scale q_t·k_s / c); scores are then held in memory.

    Returns:
        o [B, T, H, V].
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    if softcap is not None:
        if mask is None:
            mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
        return softcapped_attention(q, k, v, mask, scale=factor, softcap=softcap).transpose(1, 2)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)


def _fill(
    state: RoomState, new: tuple[Tensor, ...], tokens: Tokens
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Writes what is kept of these tokens at their places; who sees what, [B, T, S]."""
    row = torch.arange(tokens.position.shape[0], device=tokens.position.device)[:, None]
    for old, x in zip(state.cached, new, strict=True):
        old.index_put_((row, tokens.position), x.to(old.dtype))
    place = torch.arange(state.cached[0].shape[1], device=row.device)
    return state.cached, place <= tokens.position[..., None]


def _with_past(state: AttentionState | None, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What is kept up to this call's end; a pack has the states of its sequences in a row."""
    if state is None:
        return new
    return tuple(
        torch.cat((old.reshape(x.shape[0], -1, *x.shape[2:]), x), 1)
        for old, x in zip(state.cached, new, strict=True)
    )


def _mask(state: AttentionState | None, tokens: Tokens) -> Tensor | None:
    """Which tokens of the state, then of this call, each token sees, without a window."""
    if state is None and tokens.segment is None:
        return None  # padding comes last, where a causal mask never looks
    time = torch.arange(tokens.position.shape[1], device=tokens.position.device)
    sees = time[:, None] >= time
    if tokens.segment is not None:
        sees = sees & (tokens.segment[:, None] == tokens.segment)
    if state is None:
        return sees[None]
    old = _sees_state(state, tokens)
    return torch.cat((old, sees.expand(old.shape[0], -1, -1)), 2)


def _sees_state(state: AttentionState, tokens: Tokens) -> Tensor:
    """[B, T, S], or [1, T, N S] for a pack."""
    rows, time = tokens.position.shape
    sees = state.valid.reshape(rows, 1, -1)
    if tokens.segment is not None:
        owner = torch.arange(state.valid.shape[0], device=sees.device)[:, None]
        owner = owner.expand_as(state.valid).reshape(1, 1, -1)
        sees = sees & (owner == tokens.segment[None, :, None])
    return sees.expand(rows, time, -1)


def _longer(
    state: AttentionState | None, new: tuple[Tensor, ...], tokens: Tokens
) -> AttentionState:
    """Every sequence of a pack keeps a view of all its tokens and marks its own as valid."""
    num_sequences, device = tokens.end.shape[0], tokens.end.device
    time = torch.arange(tokens.position.shape[1], device=device)
    if tokens.segment is not None:
        valid = tokens.segment == torch.arange(num_sequences, device=device)[:, None]
    elif tokens.lengths is not None:
        valid = time < tokens.lengths[:, None]
    else:
        valid = (time >= 0).expand(num_sequences, -1)
    kept = [x.expand(num_sequences, *x.shape[1:]) for x in new] + [valid]
    if state is not None:
        old = (*state.cached, state.valid)
        kept = [torch.cat(pair, 1) for pair in zip(old, kept, strict=True)]
    return AttentionState(tuple(kept[:-1]), kept[-1], tokens.end)
