"""Triton kernels of `delta_rule`: matrices of all chunks at once, then one walk over the chunks.

With S the state before a chunk of C rows, b_i the sum of the log decays of its first i rows, b_C of
all, and D_ij = e^{b_i - b_j}, what the chunk writes is u, of

    (1 + L) U = diag(beta) (V - (e^b K) S)      L_ij = beta_i D_ij k_i . k_j, i > j
    O = scale (e^b Q) S + P U                   P_ij = scale D_ij q_i . k_j, i >= j
    S_next = e^{b_C} S + (e^{b_C - b} K)^T U

X = (1 + L)^-1, P and W = -X diag(beta) e^b K do not depend on the state: ``_inside_kernel`` finds
them, so that U = X diag(beta) V + W S takes one dot after S. But with a decay a head a walk has K
at hand, and on an H200 the second dot, of X diag(beta) (V - e^b K S), costs it less than a load of
W. Gradients go back in time in the same way: with G the gradient of the state after a chunk,

    dU = P^T dO + (e^{b_C - b} K) G
    dR = X^T dU                                 the gradient of the right-hand side
    G_before = e^{b_C} G + scale (e^b Q)^T dO + W^T dU

Walks, and how they are cut: see ``walk``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.columns import _between, _columns
from flacompile.ops.kernels.inverse import _inverse
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import is_hopper
from flacompile.ops.kernels.states import Chunks, _place, _rows_of, by_kind, chunks_of
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    NARROWEST,
    _channel_sums,
    _channel_total,
    _decay_sums,
    _dot,
    _load,
    _store_rows,
    _store_state,
    _sums_within,
    dot_of,
)
from flacompile.ops.kernels.walk import _decay_of, _state_before, _store_walk, _walked, walked


@triton.jit
def _inside_kernel(
    q, k, g, gk, beta, cu_seqlens, sequences, places, X, P, W, q_in, k_end, into, rest, total,
    scale, T, H, N, CHUNKS, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, WRITE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """X, with WRITE X diag(beta), P and, but where it is None, W of one chunk and head.

    With g decays of rows, from the chunk's start and to its end; with gk the decayed rows instead,
    q_in with the scale, and the chunk's log decay.
    """
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    h, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    n, place = _place(cu_seqlens, sequences, places, chunk, CHUNKS)
    if n >= N:
        return
    first, length, i, at, by, inside = _rows_of(cu_seqlens, n, place, h, T, H, C)
    L, P_c = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)

    # 2. Products of its rows, decayed, from the key channels a block at a time.
    for block in range(0, K, BK):
        kk = block + tl.arange(0, BK)
        q_c, k_c = _load(q, at, by, inside, kk, K), _load(k, at, by, inside, kk, K)
        if gk is None:
            L += _dot(k_c, tl.trans(k_c), DOT, PRECISION)
            P_c += _dot(q_c, tl.trans(k_c), DOT, PRECISION)
        else:
            gk_c = _load(gk, at, by, inside, kk, K)
            end = _channel_total(gk_c)
            tl.store(total + (chunk * H + h) * K + kk, end, mask=kk < K)
            if tl.min(end, 0) > -LIMIT:
                sums = _sums_within(gk_c, i, PRECISION)
                into_q, into_k = q_c * tl.exp(sums), k_c * tl.exp(sums)
                out = k_c * tl.exp(-sums)
                L += _dot(into_k, tl.trans(out), DOT, PRECISION)
                P_c += _dot(into_q, tl.trans(out), DOT, PRECISION)
                _store_rows(tl.exp(end)[None, :] * out, k_end, at, by, inside, kk, K)
                _store_rows(scale * into_q, q_in, at, by, inside, kk, K)
                _store_rows(into_k, W, at, by, inside, kk, K)
            else:
                w, w_end = _channel_sums(gk_c, False)[0], _channel_sums(gk_c, True)[0]
                _store_rows(k_c * tl.exp(w_end), k_end, at, by, inside, kk, K)
                _store_rows(scale * q_c * tl.exp(w), q_in, at, by, inside, kk, K)
                _store_rows(k_c * tl.exp(w), W, at, by, inside, kk, K)
                L += _columns(k_c, k_c, None, k, gk, at, first, length, i, kk, H, K, C)[0]
                P_c += _columns(q_c, k_c, None, k, gk, at, first, length, i, kk, H, K, C)[0]
    if g is not None:
        hi, lo, _, _, hi_end, lo_end = _decay_sums(g, at, by, inside)
        tl.store(into + at + by, tl.exp(hi + lo), mask=inside)
        tl.store(rest + at + by, tl.exp((hi_end - hi) + (lo_end - lo)), mask=inside)
        L *= _between(hi, lo, i)
        P_c *= _between(hi, lo, i)
    P_c = tl.where(i[:, None] >= i[None, :], scale * P_c, 0.0)
    _store_rows(P_c, P, at, by, inside, i, C)

    # 3. The inverse.
    beta_c = tl.load(beta + at + by, mask=inside, other=0.0).to(tl.float32)
    X_c = _inverse(tl.where(i[:, None] > i[None, :], -beta_c[:, None] * L, 0.0), i, C, PRECISION)
    X_beta = beta_c[None, :] * X_c
    _store_rows(X_beta if WRITE else X_c, X, at, by, inside, i, C)

    # 4. W, of the decayed keys: those of a decay a channel stand in its place.
    if W is not None:
        if g is not None:
            X_beta *= tl.exp(hi + lo)[None, :]
        keys = k if gk is None else W
        tl.debug_barrier()  # all rows are written
        for block in range(0, K, BK):
            kk = block + tl.arange(0, BK)
            W_c = _dot(-X_beta, _load(keys, at, by, inside, kk, K), DOT, PRECISION)
            tl.debug_barrier()  # and read
            _store_rows(W_c, W, at, by, inside, kk, K)


@triton.jit
def _decays_of(into, rest, at, by, inside):
    """Decays of a chunk's rows, from its start and to its end, and of the chunk."""
    into_c = tl.load(into + at + by, mask=inside, other=0.0)[:, None]
    rest_c = tl.load(rest + at + by, mask=inside, other=0.0)[:, None]
    return into_c, rest_c, tl.load(into + at) * tl.load(rest + at)


@triton.jit
def _forward_kernel(
    q, k, v, W, into, rest, total, X, P, state, cu_seqlens, offsets, u, o, ends, moved,
    final, scale, T, H, CHUNKS, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u, o and the state; a first walk, with ends and moved, finds how a segment moves a state."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    FIRST: tl.constexpr = ends is not None
    owner, h, segment, n, start, length, base, count, moves, kk, vv = _walked(
        cu_seqlens, offsets, T, H, CHUNKS, SEGMENTS, K, V, BK, BV, C, FIRST
    )
    S = _state_before(state, owner, moves, kk, vv, K, V, FIRST)
    i = tl.arange(0, C)
    begin = segment * SEGMENT
    for chunk in range(begin, tl.minimum(begin + SEGMENT, count)):
        # 2. Load the chunk, all of it before the first dot; the identity's columns have no values.
        at, by, inside = (start + chunk * C) * H + h, i * H, i < (length - chunk * C).to(tl.int32)
        k_c, X_c = _load(k, at, by, inside, kk, K), _load(X, at, by, inside, i, C)
        v_c = _load(v, at, by, inside & (moves == 0), vv, V)
        if W is not None:
            W_c = _load(W, at, by, inside, kk, K)
        if not FIRST:
            q_c, P_c = _load(q, at, by, inside, kk, K), _load(P, at, by, inside, i, C)
        if into is not None:
            into_c, rest_c, decay = _decays_of(into, rest, at, by, inside)
        if total is not None:
            decay = _decay_of(total, (base + chunk) * H + h, kk, K)[:, None]

        # 3. Solve for u.
        if W is None:
            read = _dot(k_c, S, DOT, PRECISION)
            if into is not None:
                read *= into_c
            U = _dot(X_c, v_c.to(tl.float32) - read, DOT, PRECISION)
        else:
            U = _dot(X_c, v_c, DOT, PRECISION)
            U += _dot(W_c, S, DOT, PRECISION)

        # 4. Read o.
        if not FIRST:
            _store_rows(U, u, at, by, inside, vv, V)
            o_c = _dot(q_c, S, DOT, PRECISION)
            if total is None:
                o_c *= scale if into is None else scale * into_c
            o_c += _dot(P_c, U, DOT, PRECISION)
            _store_rows(o_c, o, at, by, inside, vv, V)

        # 5. Take the chunk into the state.
        if into is not None:
            U *= rest_c
        if into is not None or total is not None:
            S *= decay
        S += _dot(tl.trans(k_c), U, DOT, PRECISION)

    _store_walk(S, ends, moved, final, moves, owner, segment, SEGMENTS, n, H, h, kk, vv, K, V)


@triton.jit
def _backward_kernel(
    q, k, do_, W, into, rest, total, X, P, state, cu_seqlens, offsets, dr, states, ends,
    moved, final, scale, T, H, CHUNKS, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dr and the gradient of the state after each chunk, from the last chunk to the first."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    FIRST: tl.constexpr = ends is not None
    owner, h, segment, n, start, length, base, count, moves, kk, vv = _walked(
        cu_seqlens, offsets, T, H, CHUNKS, SEGMENTS, K, V, BK, BV, C, FIRST
    )
    S = _state_before(state, owner, moves, kk, vv, K, V, FIRST)
    i = tl.arange(0, C)
    begin = segment * SEGMENT
    for step in range(begin, tl.minimum(begin + SEGMENT, count)):
        # 2. Load the chunk, all of it before the first dot.
        chunk = count - 1 - step
        at, by, inside = (start + chunk * C) * H + h, i * H, i < (length - chunk * C).to(tl.int32)
        q_c, k_c = _load(q, at, by, inside, kk, K), _load(k, at, by, inside, kk, K)
        W_c, P_c = _load(W, at, by, inside, kk, K), _load(P, at, by, inside, i, C)
        do_c = _load(do_, at, by, inside & (moves == 0), vv, V)
        if not FIRST:
            X_c = _load(X, at, by, inside, i, C)
        if into is not None:
            into_c, rest_c, decay = _decays_of(into, rest, at, by, inside)
        if total is not None:
            decay = _decay_of(total, (base + chunk) * H + h, kk, K)[:, None]
        if not FIRST:
            _store_state(S, states, (base + chunk) * H + h, kk, vv, K, V)

        # 3. The gradients of u and of what it was solved from.
        dU = _dot(k_c, S, DOT, PRECISION)
        if into is not None:
            dU *= rest_c
        dU += _dot(tl.trans(P_c), do_c, DOT, PRECISION)
        if not FIRST:
            dR = _dot(tl.trans(X_c), dU, DOT, PRECISION)
            _store_rows(dR, dr, at, by, inside, vv, V)

        # 4. Of the state before the chunk.
        if total is None:
            do_c = do_c.to(tl.float32) * (scale if into is None else scale * into_c)
        if into is not None or total is not None:
            S *= decay
        S += _dot(tl.trans(q_c), do_c, DOT, PRECISION)
        S += _dot(tl.trans(W_c), dU, DOT, PRECISION)

    _store_walk(S, ends, moved, final, moves, owner, segment, SEGMENTS, n, H, h, kk, vv, K, V)


def tiles(K: int, V: int, dot: str, hopper: bool) -> dict[str, int]:
    """Block sizes and warps of the walks: of an H100's times, elsewhere of registers."""
    BK, BV = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(V))
    widest, C = {"ieee": (16, 16), "tf32": (32, 32), "bf16": (32, 32)}[dot]
    if dot == "bf16" and BK <= 128 and hopper:
        BK, BV, widest, C = max(BK, NARROWEST), max(BV, NARROWEST), 64, 64
    warps = 4 if (64 if dot == "ieee" else 128) >= BK else 8
    return {"BK": BK, "BV": min(BV, widest), "C": C, "num_warps": warps, "num_stages": 1}


def wide_tiles(walk: dict[str, int], V: int) -> dict[str, int]:
    """Those of the walks that read W, on the same chunks: one program fills a multiprocessor."""
    wide = walk["C"] == 64 and V > 64
    return walk | {"BV": 128, "num_warps": 8, "num_stages": 2} if wide else walk


def inside_tiles(K: int, C: int) -> dict[str, int]:
    """Those of what is done with all chunks at once: long ones are Hopper's."""
    BK = min(128, max(NARROWEST, triton.next_power_of_2(K))) if C == 64 else NARROWEST
    return {"BK": BK, "num_warps": 4, "num_stages": 1}


class Inside(NamedTuple):
    """What the walks read of all chunks but values.

    X, P: [B, T, H, C], row i of a chunk at its token.
    q, k: [B, T, H, K], as given, or with a decay a channel decayed from the chunk's start, with the
        scale, and to its end.
    W: [B, T, H, K], or None where the walk does without.
    into, rest: [B, T, H], a decay a head of each row from the chunk's start, and to its end; or
        None.
    total: log decay a channel of each chunk, [chunks, H, K], or None.
    """

    X: Tensor
    P: Tensor
    q: Tensor
    k: Tensor
    W: Tensor | None
    into: Tensor | None
    rest: Tensor | None
    total: Tensor | None

    def around(self, values: Tensor) -> tuple[Tensor | None, ...]:
        """As the walks take them, with v or do."""
        return self.q, self.k, values, self.W, self.into, self.rest, self.total, self.X, self.P


def inside(
    q: Tensor, k: Tensor, decays: tuple[Any, Any], beta: Tensor, cu_seqlens: Tensor | None,
    chunks: Chunks, scale: float, sequences: Any, dot: str, write: bool,
) -> Inside:  # fmt: skip
    """Of all chunks at once; ``write`` for the walk that writes values."""
    B, T, H, K = q.shape
    kept = torch.bfloat16 if dot == "bf16" else torch.float32
    X, P = (q.new_empty(B, T, H, chunks.size, dtype=kept) for _ in range(2))
    W, q_in, k_end, total = None, None, None, None
    into, rest = (None if decays[0] is None else torch.empty_like(decays[0]) for _ in range(2))
    if decays[1] is not None or not write:
        W = torch.empty_like(q, dtype=kept)
    if decays[1] is not None:
        q_in, k_end = torch.empty_like(q), torch.empty_like(k)
        total = q.new_empty(chunks.total, H, K, dtype=torch.float32)
    launch(
        _inside_kernel, (chunks.total * H,), q, k, *decays, beta, cu_seqlens, chunks.sequences,
        chunks.places, X, P, W, q_in, k_end, into, rest, total, scale, T, H, sequences, chunks.each,
        K=K, C=chunks.size, WRITE=write, LIMIT=LIMITS[dot], **DOTS[dot],
        **inside_tiles(K, chunks.size),
    )  # fmt: skip
    q, k = q if q_in is None else q_in, k if k_end is None else k_end
    return Inside(X, P, q, k, W, into, rest, total)


def delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state and u.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        g: fp32 natural-log decay, [B, T, H], [B, T, H, K] or None.
        beta: [B, T, H].
        state: [N, H, K, V] fp32.
        cu_seqlens: [N + 1] bounds of packed sequences, from 0 to T, on the device; B is then 1.
        scale: factor of o.
    """
    K, V, dot = q.shape[3], v.shape[3], dot_of(q.dtype, k.dtype, v.dtype)
    q, k, v, beta, state = (x.contiguous() for x in (q, k, v, beta, state))
    decays = by_kind(g)
    meta = tiles(K, V, dot, is_hopper(q.device))
    chunks = chunks_of(cu_seqlens, state.shape[0], q.shape[1], meta["C"])
    x = inside(q, k, decays, beta, cu_seqlens, chunks, scale, state.shape[0], dot, True)
    meta = meta if x.W is None else wide_tiles(meta, V)
    u, o = torch.empty_like(v), torch.empty_like(v)
    final = walked(
        _forward_kernel, x.around(v), state, cu_seqlens, chunks, (u, o), scale, q.shape[:2],
        meta | DOTS[dot],
    )  # fmt: skip
    return o, final, u


def delta_rule_walk_back(
    q: Tensor, k: Tensor, decays: tuple[Any, Any], beta: Tensor, do: Tensor, dfinal: Tensor,
    cu_seqlens: Tensor | None, chunks: Chunks, scale: float, meta: dict[str, int], dot: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dr [B, T, H, V], the gradients of the states after chunks, and that of the first state."""
    x = inside(q, k, decays, beta, cu_seqlens, chunks, scale, dfinal.shape[0], dot, False)
    dr = torch.empty_like(do)
    kept = torch.bfloat16 if dot == "bf16" else torch.float32
    states = dfinal.new_empty(chunks.total, *dfinal.shape[1:], dtype=kept)
    dstate = walked(
        _backward_kernel, x.around(do), dfinal, cu_seqlens, chunks, (dr, states), scale,
        q.shape[:2], wide_tiles(meta, do.shape[3]) | DOTS[dot],
    )  # fmt: skip
    return dr, states, dstate
