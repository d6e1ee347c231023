"""Triton kernel of the states between chunks, which gradients read.

    S_{c+1} = diag(e^b_C) S_c + sum_i (e^{b_C - b_i} x_i) y_i^T        forward, x = k, y = v
    D_c = diag(e^b_C) D_{c+1} + sum_i (e^{b_i} x_i) y_i^T              back in time, x = q, y = do

b_i is the sum of the log decays of a chunk's first i rows, b_C of all. Kept are S_c, the state
before chunk c, and D_{c+1}, the gradient of the state after it, in the dtype of the dots that read
them. Chunks are counted from the start of each sequence, in both directions.

Grid: one program a (sequence, segment, head, block of the state), with its block in registers.
Segments are cut and joined as in ``linear_attn``, in the order in which they are walked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import _join_kernel, num_segments
from flacompile.ops.kernels.tiles import (
    DOTS,
    NARROWEST,
    _channel_total,
    _dot,
    _load,
    _load_state,
    _sequence,
    _store_state,
    _sums_beyond,
    _sums_of,
    _sums_within,
)

PART = tl.constexpr(16)
LIGHT = 2  # programs of this walk that run where one of linear_attn's does


@triton.jit
def _chunks_of(offsets, n, CHUNKS):
    """Index of the first chunk of sequence n."""
    if offsets is None:
        return n.to(tl.int64) * CHUNKS
    else:
        return tl.load(offsets + n)


@triton.jit
def _place(cu_seqlens, sequences, places, chunk, CHUNKS):
    """Sequence of a chunk, and which of its chunks it is."""
    if cu_seqlens is None:
        n, place = chunk // CHUNKS, chunk % CHUNKS
    else:
        n, place = tl.load(sequences + chunk), tl.load(places + chunk)
    return n, place


@triton.jit
def _rows_of(cu_seqlens, n, place, h, T, H, C: tl.constexpr):
    """Rows of a chunk: its first, the length of the sequence, i, and indices as ``_rows`` does."""
    start, length = _sequence(cu_seqlens, n, T)
    first, i = place * C, tl.arange(0, C)
    return first, length, i, (start + first) * H + h, i * H, i < (length - first).to(tl.int32)


@triton.jit
def _carried(
    S, D, S_c, D_c, index, kk, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_v S D of two stored states, S_c and D_c: all products would not fit in registers.

    In bf16 it is the diagonal of a dot; in fp32 they are read again, a few columns at a time.
    """
    if tl.bfloat16 == DOT:
        i = tl.arange(0, BK)
        products = _dot(S_c, tl.trans(D_c), DOT, PRECISION)
        return tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), 0)
    else:
        found = tl.sum(kk[:, None] * tl.zeros([1, PART], tl.float32), 1)
        for columns in range(0, V, PART):
            part = columns + tl.arange(0, PART)
            S_p = _load_state(S, index, kk, part, K, V).to(tl.float32)
            found += tl.sum(S_p * _load_state(D, index, kk, part, K, V).to(tl.float32), 1)
        return found


@triton.jit
def _decays_of(g, chunk, i, start, length, h, H, C: tl.constexpr):
    """Log decays of the rows of a chunk, 0 of one that is not there."""
    inside = (chunk >= 0) & (i < (length - chunk * C).to(tl.int32))
    return tl.load(g + (start + chunk * C) * H + h + i * H, mask=inside, other=0.0)


@triton.jit
def _states_kernel(
    x, y, x2, y2, g, gk, state, cu_seqlens, offsets, states, decays, ends, final, total, total_k,
    scale, T, H, CHUNKS, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BACK: tl.constexpr, SHARE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Without states only the end of each segment is found, and the segment's log decay.

    SHARE heads in a row have one x.
    """
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns: SEGMENT chunks, as they come in the direction of the walk.
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    block, owner = tl.program_id(0) % (NK * NV), (tl.program_id(0) // (NK * NV)).to(tl.int64)
    h, segment, n = owner % H, (owner // H) % SEGMENTS, owner // H // SEGMENTS
    start, length = _sequence(cu_seqlens, n, T)
    base, count = _chunks_of(offsets, n, CHUNKS), (length + C - 1) // C
    kk, vv = (block // NV) * BK + tl.arange(0, BK), (block % NV) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, owner, kk, vv, K, V)
    sum_g, sum_k = 0.0, tl.zeros([BK], tl.float32)

    begin = segment * SEGMENT
    if g is not None:
        g_next = _decays_of(g, count - 1 - begin if BACK else begin, i, start, length, h, H, C)
    for step in range(begin, tl.minimum(begin + SEGMENT, count)):
        # 2. Keep the state, then take the chunk into it, with decays loaded a chunk before.
        chunk = count - 1 - step if BACK else step
        if states is not None:
            _store_state(S, states, (base + chunk) * H + h, kk, vv, K, V)
        at, by, inside = (start + chunk * C) * H + h, i * H, i < (length - chunk * C).to(tl.int32)
        x_c = _load(x, at // SHARE, by // SHARE, inside, kk, K)
        y_c = _load(y, at, by, inside, vv, V)
        if g is not None:
            hi, lo, _, _, hi_end, lo_end = _sums_of(g_next)
            g_next = _decays_of(g, chunk - 1 if BACK else chunk + 1, i, start, length, h, H, C)
            w = (hi + lo) if BACK else (hi_end - hi) + (lo_end - lo)
            y_c = y_c.to(tl.float32) * tl.exp(w)[:, None]
            S *= tl.exp(hi_end + lo_end)
            sum_g += hi_end + lo_end
        if gk is not None:
            gk_c = _load(gk, at, by, inside, kk, K)
            end = _channel_total(gk_c)
            w = _sums_within(gk_c, i, PRECISION) if BACK else _sums_beyond(gk_c, i, PRECISION)
            x_c = x_c.to(tl.float32) * tl.exp(w)
            S *= tl.exp(end)[:, None]
            sum_k += end
            if decays is not None and block % NV == 0:
                tl.store(decays + ((base + chunk) * H + h) * K + kk, end, mask=kk < K)
        S += scale * _dot(tl.trans(x_c), y_c, DOT, PRECISION)
        if x2 is not None:
            x_c, y_c = _load(x2, at, by, inside, kk, K), _load(y2, at, by, inside, vv, V)
            if gk is not None:
                x_c = x_c.to(tl.float32) * tl.exp(w)
            S += scale * _dot(tl.trans(x_c), y_c, DOT, PRECISION)

    if ends is not None:
        _store_state(S, ends, owner, kk, vv, K, V)
    elif segment == SEGMENTS - 1:
        _store_state(S, final, n * H + h, kk, vv, K, V)
    if total is not None:
        tl.store(total + owner, sum_g)
    if total_k is not None:
        tl.store(total_k + owner * K + kk, sum_k, mask=kk < K)


class Chunks(NamedTuple):
    """The chunks of all sequences, in a row.

    size: rows of a chunk.
    total: how many there are; of packs at most.
    each: how many a sequence has, if it is not packed.
    offsets: index of the first chunk of each packed sequence, [N].
    sequences, places: of every chunk of packs the sequence, N for none, and its place there.
    """

    size: int
    total: int
    each: int
    offsets: Tensor | None
    sequences: Tensor | None
    places: Tensor | None


def chunks_of(cu_seqlens: Tensor | None, sequences: int, time: int, size: int) -> Chunks:
    """Chunks of ``size`` rows of ``sequences`` of ``time`` tokens, or of packs of as many."""
    each = triton.cdiv(time, size)
    if cu_seqlens is None:
        return Chunks(size, sequences * each, each, None, None, None)
    counts = -(cu_seqlens.diff() // -size)
    ends = counts.cumsum(0)
    offsets = ends - counts
    total = time // size + sequences
    chunks = torch.arange(total, device=cu_seqlens.device)
    of = torch.searchsorted(ends, chunks, right=True)
    places = chunks - offsets[of.clamp(max=sequences - 1)]
    return Chunks(size, total, each, offsets, of, places)


def by_kind(g: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A decay as the kernels take it: of a head, of a channel."""
    if g is None or g.ndim == 3:
        return (None if g is None else g.contiguous()), None
    return None, g.contiguous()


def tiles(dot: str) -> dict[str, int]:
    """Block sizes and warps: a state in small blocks, many of which share a multiprocessor."""
    return {
        "BK": NARROWEST,
        "BV": NARROWEST,
        "num_warps": 4,
        "num_stages": 3 if dot == "bf16" else 1,
    }


def states(
    x: Tensor,
    y: Tensor,
    g: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    chunks: Chunks,
    scale: float,
    back: bool,
    dot: str,
    second: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The states between chunks, the last one, and with decays a channel those of each chunk.

    Args:
        x: [B, T, H, K], or with decays of heads [B, T, G, K]; y: [B, T, H, V].
        g: fp32 natural-log decay, [B, T, H], [B, T, H, K] or None.
        state: [N, H, K, V] fp32, before the first token, or with ``back`` after the last.
        cu_seqlens: [N + 1] bounds of packed sequences or None.
        chunks: where they are.
        scale: factor of what is added.
        back: from the last chunk to the first.
        dot: a name of ``tiles.DOTS``.
        second: another x and y, with a decay a channel.

    Returns:
        [chunks, H, K, V] in bf16 or fp32, [N, H, K, V] fp32, and log decays [chunks, H, K] or None.
    """
    N, H, K, V = state.shape
    T = x.shape[1]
    kept = torch.bfloat16 if dot == "bf16" else torch.float32
    found = x.new_empty(chunks.total, H, K, V, dtype=kept)
    final = torch.empty_like(state)
    decays = by_kind(g)
    meta = {"K": K, "V": V, "C": chunks.size, "BACK": back, "SHARE": H // x.shape[2]}
    meta |= {**tiles(dot), **DOTS[dot]}
    blocks = triton.cdiv(K, meta["BK"]) * triton.cdiv(V, meta["BV"])
    segments = num_segments(N * H * blocks // LIGHT, T)
    length = triton.cdiv(chunks.each, segments)

    log = None if decays[1] is None else state.new_empty(chunks.total, H, K)

    def run(start: Any, found: Any, log: Any, ends: Any, *totals: Any) -> None:
        """One launch: the walk, or the first one, which finds the ends of segments."""
        launch(
            _states_kernel, (N * segments * H * blocks,), x, y, *second, *decays, start, cu_seqlens,
            chunks.offsets, found, log, ends, final, *totals, scale, T, H, chunks.each, length,
            segments, **meta,
        )  # fmt: skip

    if isinstance(segments, int) and segments == 1:
        run(state, found, log, None, None, None)
        return found, final, log
    ends = state.new_empty(N, segments, H, K, V)
    total, total_k = (
        None if d is None else ends.new_empty(N, segments, H, *d.shape[3:]) for d in decays
    )
    run(None, None, None, ends, total, total_k)
    rows = min(16, meta["BK"])
    launch(
        _join_kernel, (N * H * triton.cdiv(K, rows),), ends, total, total_k, None, state, H,
        segments, K=K, V=V, BK=rows, BV=max(16, triton.next_power_of_2(V)), num_warps=4,
    )  # fmt: skip
    run(ends, found, log, None, None, None)
    return found, final, log
