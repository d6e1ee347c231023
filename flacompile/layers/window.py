"""Looking back at the last W tokens alone, in memory that grows as T W and not as T².

A sequence stands behind the W slots of its state, so that its first tokens are as any other.
Queries are cut into blocks of C tokens, and a block is shown the C (1 + ⌈(W - 1) / C⌉) tokens that
end with it. Blocks become rows of a batch: what mixes rows under a mask mixes them unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.layers.base import Tokens

BLOCK = 128  # queries of a block, at most; one that saw its whole span would need no mask

Mix = Callable[[Tensor, tuple[Tensor, ...], Tensor], Tensor]


class Kept(NamedTuple):
    """What is kept of tokens, tensors [N, W, ...], and which of them are real, [N, W]."""

    cached: tuple[Tensor, ...]
    valid: Tensor


def mix_near(
    mix: Mix, q: Tensor, new: tuple[Tensor, ...], old: Kept | None, tokens: Tokens, window: int
) -> tuple[Tensor, Kept]:
    """``mix`` where a token sees itself and, of its own sequence, the window - 1 before it.

    Args:
        mix: takes q, what is kept and a mask [B, T, S], and returns o [B, T, ...].
        q: [B, T, ...].
        new: what is kept of these tokens, tensors [B, T, ...].
        old: of the W tokens before them, of N sequences; None where these are the first.
        tokens: where they stand.
        window: W.

    Returns:
        o [B, T, ...], and what is kept of the last W tokens of each sequence.
    """
    if old is None:  # a pack needs no slots to keep its sequences apart
        rows = (tokens.end.shape[0], window if tokens.segment is None else 0)
        empty = tuple(x.new_zeros(*rows, *x.shape[2:]) for x in new)
        old = Kept(empty, q.new_zeros(rows, dtype=torch.bool))
    layout = _in_rows(old, tokens) if tokens.segment is None else _in_a_pack(old, tokens)
    kept = tuple(layout.row(*pair) for pair in zip(old.cached, new, strict=True))
    if layout.place is None:
        here = torch.arange(q.shape[1], device=q.device)
    else:
        q, here = layout.row(q.new_zeros(*old.valid.shape, *q.shape[2:]), q), layout.place
        here = here[old.valid.numel() :]
    o = _mix_blocks(mix, q, kept, layout.owner, window).index_select(1, here)
    last = layout.end[:, None] - window + torch.arange(window, device=q.device)
    at = layout.rank, last.clamp(min=0)
    valid = (last >= layout.begin[:, None]) & (layout.owner[at] >= 0)
    return o, Kept(tuple(x[at] for x in kept), valid)


class _Layout(NamedTuple):
    """Rows in which every sequence is its slots, then its tokens.

    owner [B, L]: sequence of what stands there, -1 for an empty slot; rank [N, 1], begin [N] and
    end [N] of a sequence: its row, and where it begins and ends in it. place: of the slots of all
    sequences and then of the tokens in the row of a pack; None where each has a row of its own.
    """

    owner: Tensor
    rank: Tensor
    begin: Tensor
    end: Tensor
    place: Tensor | None = None

    def row(self, old: Tensor, new: Tensor) -> Tensor:
        """Slots [N, S, ...] and tokens [B, T, ...] as they stand, [B, L, ...]."""
        if self.place is None:
            return torch.cat((old, new), 1)
        return torch.cat((old.flatten(0, 1)[None], new), 1)[:, self.place.argsort()]


def _in_rows(old: Kept, tokens: Tokens) -> _Layout:
    number, slots = old.valid.shape
    index = torch.arange(number, device=old.valid.device)[:, None]
    owner = torch.cat((old.valid.long() - 1, torch.zeros_like(tokens.position)), 1)
    end = tokens.end - tokens.position[:, 0] + slots
    return _Layout(owner, index, torch.zeros_like(end), end)


def _in_a_pack(old: Kept, tokens: Tokens) -> _Layout:
    assert tokens.cu_seqlens is not None and tokens.segment is not None
    number, slots = old.valid.shape
    index = torch.arange(number, device=old.valid.device)[:, None]
    begin = tokens.cu_seqlens[:-1] + index[:, 0] * slots
    time = torch.arange(tokens.segment.shape[0], device=old.valid.device)
    own = begin[:, None] + torch.arange(slots, device=old.valid.device)
    place = torch.cat((own.flatten(), time + (tokens.segment + 1) * slots))
    end = begin + slots + tokens.cu_seqlens.diff()
    layout = _Layout(own, index * 0, begin, end, place)
    owner = layout.row(torch.where(old.valid, index, -1), tokens.segment[None])
    return layout._replace(owner=owner)


def _mix_blocks(
    mix: Mix, q: Tensor, cached: tuple[Tensor, ...], owner: Tensor, window: int
) -> Tensor:
    """``mix_near`` on q [B, T, ...] for the last T of the tokens kept, [B, L, ...], of an owner.

    o has some more tokens after these T, so that no shape depends on whether blocks are full.
    """
    time, block = q.shape[1], min(window, BLOCK)
    before = -(-(window - 1) // block) * block
    blocks = (time + 2 * block - 1) // block  # never one, so that no T is a case of its own
    padding = (before + time - owner.shape[1], blocks * block - time)

    def spans(x: Tensor, value: int = 0) -> Tensor:
        """[B, L, ...] -> [B blocks, span, ...]: each block with what stands before it."""
        x = _pad(x, padding, value).unfold(1, before + block, block)
        return x.movedim(-1, 2).flatten(0, 1)  # [B blocks, span, ...]

    rows = _pad(q, (0, padding[1])).unflatten(1, (blocks, block)).flatten(0, 1)
    owners = spans(owner, -1)
    queries, keys = (torch.arange(n, device=q.device) for n in (block, before + block))
    age = queries[:, None] + before - keys
    own = (owners[:, before:, None] == owners[:, None]) & (owners[:, None] >= 0)
    sees = (age >= 0) & (age < window) & own | (age == 0)
    o = mix(rows, tuple(spans(x) for x in cached), sees)
    return o.unflatten(0, (-1, blocks)).flatten(1, 2)


def _pad(x: Tensor, rows: tuple[int, int], value: int = 0) -> Tensor:
    """x [B, T, ...] with so many more tokens before and after; fewer where negative."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + rows, value=value)
