"""A walk over the chunks of sequences, from state to state, in segments where there are few.

Grid of a walk: one program a (sequence, segment, head, block of BV columns), with its block of the
state in registers. Few sequences and heads do not fill a GPU: there a sequence is cut in segments,
whose ends are linear in their starts, end = M start + N. A first walk finds N and, from the columns
of the identity, M; ``_join_kernel`` goes from start to start; then all segments are walked at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import PROGRAMS, num_segments
from flacompile.ops.kernels.states import Chunks, _chunks_of
from flacompile.ops.kernels.tiles import _load_state, _sequence, _store_state

FEWEST = 4  # segments that pay for the walk that finds M


@triton.jit
def _walked(
    cu_seqlens, offsets, T, H, CHUNKS, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """What a program of a walk owns; with MOVES the identity's columns are blocks after V's.

    The state is no argument: compilers take a pointer for written where what a function makes of it
    tells the place of a store.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = NV + (K + BV - 1) // BV if MOVES else NV
    block, owner = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    h, segment, n = owner % H, (owner // H) % SEGMENTS, owner // H // SEGMENTS
    start, length = _sequence(cu_seqlens, n, T)
    base, count = _chunks_of(offsets, n, CHUNKS), (length + C - 1) // C
    moves = block >= NV
    kk, vv = tl.arange(0, BK), tl.where(moves, block - NV, block) * BV + tl.arange(0, BV)
    return owner, h, segment, n, start, length, base, count, moves, kk, vv


@triton.jit
def _state_before(
    state, owner, moves, kk, vv, K: tl.constexpr, V: tl.constexpr, MOVES: tl.constexpr
):
    """The state that a program of a walk starts from, of those of its segments."""
    if MOVES:
        S = tl.where((kk[:, None] == vv[None, :]) & moves, 1.0, 0.0)
    else:
        S = _load_state(state, owner, kk, vv, K, V)
    return S


@triton.jit
def _decay_of(total, index, kk, K: tl.constexpr):
    """Decay of a chunk, of each channel."""
    return tl.exp(tl.load(total + index * K + kk, mask=kk < K, other=0.0))


@triton.jit
def _store_walk(
    S, ends, moved, final, moves, owner, segment, SEGMENTS, n, H, h, kk, vv,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The state after a segment: of a first walk to ends or moved, of the last one to final."""
    if ends is not None:
        if moves:
            _store_state(S, moved, owner, kk, vv, K, K)
        else:
            _store_state(S, ends, owner, kk, vv, K, V)
    elif segment == SEGMENTS - 1:
        _store_state(S, final, n * H + h, kk, vv, K, V)


@triton.jit
def _join_kernel(
    ends, moved, state, starts, H, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state before each segment.

    Grid: one program a (sequence, head, block of BV columns); rows and sums in blocks of BK.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    owner, vv = (tl.program_id(0) // NV).to(tl.int64), (tl.program_id(0) % NV) * BV
    n, h, vv = owner // H, owner % H, vv + tl.arange(0, BV)
    for rows in range(0, K, BK):
        kk = rows + tl.arange(0, BK)
        S = _load_state(state, owner, kk, vv, K, V)
        _store_state(S, starts, n * SEGMENTS * H + h, kk, vv, K, V)
    for segment in range(SEGMENTS - 1):
        tl.debug_barrier()  # all rows of the start are written
        index = (n * SEGMENTS + segment) * H + h
        for rows in range(0, K, BK):
            kk = rows + tl.arange(0, BK)
            S = _load_state(ends, index, kk, vv, K, V)
            for columns in range(0, K, BK):
                cc = columns + tl.arange(0, BK)
                M = _load_state(moved, index, kk, cc, K, K)
                before = _load_state(starts, index, cc, vv, K, V)
                S += tl.dot(M, before, input_precision="ieee")
            _store_state(S, starts, index + H, kk, vv, K, V)


def walked(
    kernel: Any, tensors: tuple[Any, ...], state: Tensor, cu_seqlens: Tensor | None, chunks: Chunks,
    outputs: tuple[Tensor, ...], scale: float, shape: tuple[Any, Any], meta: dict[str, Any],
) -> Tensor:  # fmt: skip
    """One walk, in segments where there are few programs; gives the last state."""
    N, H, K, V = state.shape
    T, final = shape[1], torch.empty_like(state)
    NV, NK = triton.cdiv(V, meta["BV"]), triton.cdiv(K, meta["BV"])
    fill = PROGRAMS * 64 // max(64, meta["BV"])  # two of 64 columns take what one of 128 does
    segments = num_segments(N * H * NV, T, FEWEST, fill)
    length = triton.cdiv(chunks.each, segments)

    def run(blocks: int, start: Any, outputs: Any, ends: Any, moved: Any) -> None:
        """One launch: the walk, or the first one, which finds the ends of segments."""
        launch(
            kernel, (N * segments * H * blocks,), *tensors, start, cu_seqlens, chunks.offsets,
            *outputs, ends, moved, final, scale, T, H, chunks.each, length, segments,
            K=K, V=V, **meta,
        )  # fmt: skip

    if isinstance(segments, int) and segments == 1:
        run(NV, state, outputs, None, None)
        return final
    ends, starts = (state.new_empty(N, segments, H, K, V) for _ in range(2))
    moved = state.new_empty(N, segments, H, K, K)
    run(NV + NK, None, (None,) * len(outputs), ends, moved)
    BK, BV = min(64, meta["BK"]), min(32, meta["BV"])
    launch(
        _join_kernel, (N * H * triton.cdiv(V, BV),), ends, moved, state, starts, H, segments,
        K=K, V=V, BK=BK, BV=BV, num_warps=4,
    )  # fmt: skip
    run(NV, starts, outputs, None, None)
    return final
