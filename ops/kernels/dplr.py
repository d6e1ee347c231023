"""Triton kernels of `dplr`: matrices of all chunks at once, then one walk over the chunks.

With S the state before a chunk of C rows, s_i the sum of the log decays of its first i rows, s_C of
all, and r_i = s_{i-1}, what the chunk writes is u, of

    (1 - A) U = E V + (e^r a) S
    O = scale (e^s q) S + P U + R V
    S_next = e^{s_C} S + (e^{s_C - s} b)^T U + (e^{s_C - s} k)^T V

    A_ij = a_i e^{r_i - s_j} b_j                 E_ij = a_i e^{r_i - s_j} k_j                i > j
    P_ij = scale q_i e^{s_i - s_j} b_j           R_ij = scale q_i e^{s_i - s_j} k_j          i >= j

X = (1 - A)^-1, Y = X E, W = X e^r a, P and R do not depend on the state: ``_inside_kernel`` finds
them, so that U = Y V + W S takes one dot after S. Gradients go back in time in the same way: with G
the gradient of the state after a chunk,

    dU = P^T dO + (e^{s_C - s} b) G         dr = X^T dU, the gradient of the right-hand side
    dV = Y^T dU + R^T dO + (e^{s_C - s} k) G
    G_before = e^{s_C} G + scale (e^s q)^T dO + W^T dU

The kernels know decays a channel; one a head is expanded. Walks, and how they are cut: ``walk``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.columns import _columns
from flacompile.ops.kernels.inverse import _inverse
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import is_hopper
from flacompile.ops.kernels.states import Chunks, _place, _rows_of, chunks_of
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    NARROWEST,
    _channel_sums,
    _channel_total,
    _dot,
    _load,
    _store_rows,
    _store_state,
    _sums_before,
    _sums_within,
    dot_of,
)
from flacompile.ops.kernels.walk import _decay_of, _state_before, _store_walk, _walked, walked


@triton.jit
def _inside_kernel(
    q, k, a, b, gk, cu_seqlens, sequences, places, X, Y, P, R, q_in, W, b_end, k_end, total,
    scale, T, H, N, CHUNKS, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The matrices of one chunk and head, the decayed rows, q with the scale, and the log decay.

    X is None in a forward, which does not read it.
    """
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    h, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    n, place = _place(cu_seqlens, sequences, places, chunk, CHUNKS)
    if n >= N:
        return
    first, length, i, at, by, inside = _rows_of(cu_seqlens, n, place, h, T, H, C)
    A, E_c = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    P_c, R_c = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)

    # 2. Decayed rows and their products, from the key channels a block at a time.
    for block in range(0, K, BK):
        kk = block + tl.arange(0, BK)
        q_c, a_c = _load(q, at, by, inside, kk, K), _load(a, at, by, inside, kk, K)
        b_c, k_c = _load(b, at, by, inside, kk, K), _load(k, at, by, inside, kk, K)
        gk_c = _load(gk, at, by, inside, kk, K)
        end = _channel_total(gk_c)
        tl.store(total + (chunk * H + h) * K + kk, end, mask=kk < K)
        if tl.min(end, 0) > -LIMIT:
            sums = _sums_within(gk_c, i, PRECISION)
            into_q, into_a = q_c * tl.exp(sums), a_c * tl.exp(_sums_before(gk_c, i, PRECISION))
            out_b, out_k = b_c * tl.exp(-sums), k_c * tl.exp(-sums)
            A += _dot(into_a, tl.trans(out_b), DOT, PRECISION)
            E_c += _dot(into_a, tl.trans(out_k), DOT, PRECISION)
            P_c += _dot(into_q, tl.trans(out_b), DOT, PRECISION)
            R_c += _dot(into_q, tl.trans(out_k), DOT, PRECISION)
            _store_rows(scale * into_q, q_in, at, by, inside, kk, K)
            _store_rows(into_a, W, at, by, inside, kk, K)
            _store_rows(tl.exp(end)[None, :] * out_b, b_end, at, by, inside, kk, K)
            _store_rows(tl.exp(end)[None, :] * out_k, k_end, at, by, inside, kk, K)
        else:
            sums, rest = _channel_sums(gk_c, False)[0], tl.exp(_channel_sums(gk_c, True)[0])
            into_a = a_c * tl.exp(sums - tl.maximum(gk_c, -128.0))
            _store_rows(scale * q_c * tl.exp(sums), q_in, at, by, inside, kk, K)
            _store_rows(into_a, W, at, by, inside, kk, K)
            _store_rows(b_c * rest, b_end, at, by, inside, kk, K)
            _store_rows(k_c * rest, k_end, at, by, inside, kk, K)
            A += _columns(a_c, b_c, None, b, gk, at, first, length, i, kk, H, K, C, True)[0]
            E_c += _columns(a_c, k_c, None, k, gk, at, first, length, i, kk, H, K, C, True)[0]
            P_c += _columns(q_c, b_c, None, b, gk, at, first, length, i, kk, H, K, C)[0]
            R_c += _columns(q_c, k_c, None, k, gk, at, first, length, i, kk, H, K, C)[0]

    # 3. The matrices, and the inverse.
    below, up_to = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    _store_rows(tl.where(up_to, scale * P_c, 0.0), P, at, by, inside, i, C)
    _store_rows(tl.where(up_to, scale * R_c, 0.0), R, at, by, inside, i, C)
    X_c = _inverse(tl.where(below, A, 0.0), i, C, PRECISION)
    if X is not None:
        _store_rows(X_c, X, at, by, inside, i, C)
    Y_c = _dot(X_c, tl.where(below, E_c, 0.0), DOT, PRECISION)
    _store_rows(Y_c, Y, at, by, inside, i, C)

    # 4. W, of the decayed rows that stand in its place.
    tl.debug_barrier()  # all of them are written
    for block in range(0, K, BK):
        kk = block + tl.arange(0, BK)
        W_c = _dot(X_c, _load(W, at, by, inside, kk, K), DOT, PRECISION)
        tl.debug_barrier()  # and read
        _store_rows(W_c, W, at, by, inside, kk, K)


@triton.jit
def _forward_kernel(
    q_in, W, b_end, k_end, v, total, X, Y, P, R, state, cu_seqlens, offsets, u, o, ends, moved,
    final, scale, T, H, CHUNKS, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u, o and the state; a first walk, with ends and moved, finds how a segment moves a state."""
    # 1. What this program owns.
    FIRST: tl.constexpr = ends is not None
    owner, h, segment, n, start, length, base, count, moves, kk, vv = _walked(
        cu_seqlens, offsets, T, H, CHUNKS, SEGMENTS, K, V, BK, BV, C, FIRST
    )
    S = _state_before(state, owner, moves, kk, vv, K, V, FIRST)
    i = tl.arange(0, C)
    begin = segment * SEGMENT
    for chunk in range(begin, tl.minimum(begin + SEGMENT, count)):
        # 2. Solve for u; the identity's columns have no values.
        at, by, inside = (start + chunk * C) * H + h, i * H, i < (length - chunk * C).to(tl.int32)
        v_c = _load(v, at, by, inside & (moves == 0), vv, V)
        U = _dot(_load(Y, at, by, inside, i, C), v_c, DOT, PRECISION)
        U += _dot(_load(W, at, by, inside, kk, K), S, DOT, PRECISION)

        # 3. Read o.
        if not FIRST:
            _store_rows(U, u, at, by, inside, vv, V)
            o_c = _dot(_load(q_in, at, by, inside, kk, K), S, DOT, PRECISION)
            o_c += _dot(_load(R, at, by, inside, i, C), v_c, DOT, PRECISION)
            o_c += _dot(_load(P, at, by, inside, i, C), U, DOT, PRECISION)
            _store_rows(o_c, o, at, by, inside, vv, V)

        # 4. Take the chunk into the state.
        S *= _decay_of(total, (base + chunk) * H + h, kk, K)[:, None]
        S += _dot(tl.trans(_load(b_end, at, by, inside, kk, K)), U, DOT, PRECISION)
        S += _dot(tl.trans(_load(k_end, at, by, inside, kk, K)), v_c, DOT, PRECISION)

    _store_walk(S, ends, moved, final, moves, owner, segment, SEGMENTS, n, H, h, kk, vv, K, V)


@triton.jit
def _backward_kernel(
    q_in, W, b_end, k_end, do_, total, X, Y, P, R, state, cu_seqlens, offsets, dr, dv, states,
    ends, moved, final, scale, T, H, CHUNKS, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dr, dv and the gradient of the state after each chunk, from the last chunk to the first."""
    # 1. What this program owns.
    FIRST: tl.constexpr = ends is not None
    owner, h, segment, n, start, length, base, count, moves, kk, vv = _walked(
        cu_seqlens, offsets, T, H, CHUNKS, SEGMENTS, K, V, BK, BV, C, FIRST
    )
    S = _state_before(state, owner, moves, kk, vv, K, V, FIRST)
    i = tl.arange(0, C)
    begin = segment * SEGMENT
    for step in range(begin, tl.minimum(begin + SEGMENT, count)):
        # 2. The gradients of u and of what it was solved from.
        chunk = count - 1 - step
        at, by, inside = (start + chunk * C) * H + h, i * H, i < (length - chunk * C).to(tl.int32)
        do_c = _load(do_, at, by, inside & (moves == 0), vv, V)
        dU = _dot(_load(b_end, at, by, inside, kk, K), S, DOT, PRECISION)
        dU += _dot(tl.trans(_load(P, at, by, inside, i, C)), do_c, DOT, PRECISION)

        # 3. Of the values.
        if not FIRST:
            _store_state(S, states, (base + chunk) * H + h, kk, vv, K, V)
            dR = _dot(tl.trans(_load(X, at, by, inside, i, C)), dU, DOT, PRECISION)
            _store_rows(dR, dr, at, by, inside, vv, V)
            dv_c = _dot(_load(k_end, at, by, inside, kk, K), S, DOT, PRECISION)
            dv_c += _dot(tl.trans(_load(R, at, by, inside, i, C)), do_c, DOT, PRECISION)
            dv_c += _dot(tl.trans(_load(Y, at, by, inside, i, C)), dU, DOT, PRECISION)
            _store_rows(dv_c, dv, at, by, inside, vv, V)

        # 4. Of the state before the chunk.
        S *= _decay_of(total, (base + chunk) * H + h, kk, K)[:, None]
        S += _dot(tl.trans(_load(q_in, at, by, inside, kk, K)), do_c, DOT, PRECISION)
        S += _dot(tl.trans(_load(W, at, by, inside, kk, K)), dU, DOT, PRECISION)

    _store_walk(S, ends, moved, final, moves, owner, segment, SEGMENTS, n, H, h, kk, vv, K, V)


def tiles(K: int, V: int, dot: str, hopper: bool) -> dict[str, int]:
    """Block sizes and warps of the walks."""
    BK, BV = (max(NARROWEST, triton.next_power_of_2(n)) for n in (K, V))
    widest, C = {"ieee": (16, 16), "tf32": (32, 16), "bf16": (32, 32)}[dot]
    if dot == "bf16" and BK <= 128 and hopper:
        widest = 64
    warps = 4 if (64 if dot == "ieee" else 128) >= BK else 8
    stages = 2 if dot == "bf16" else 1
    return {"BK": BK, "BV": min(BV, widest), "C": C, "num_warps": warps, "num_stages": stages}


INSIDE = {  # of all chunks at once: 32 rows of bf16 are too little for four warps
    "bf16": {"BK": NARROWEST, "num_warps": 2, "num_stages": 1},
    "tf32": {"BK": NARROWEST, "num_warps": 4, "num_stages": 1},
    "ieee": {"BK": NARROWEST, "num_warps": 4, "num_stages": 1},
}


class Inside(NamedTuple):
    """What the walks read of all chunks: decayed rows [B, T, H, K], log decays, matrices."""

    q_in: Tensor
    W: Tensor
    b_end: Tensor
    k_end: Tensor
    total: Tensor  # [chunks, H, K]
    X: Tensor | None  # [B, T, H, C], row i of a chunk at its token
    Y: Tensor
    P: Tensor
    R: Tensor

    def around(self, values: Tensor) -> tuple[Tensor | None, ...]:
        """As the walks take them, with v or do."""
        return *self[:4], values, *self[4:]


def inside(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, gk: Tensor, cu_seqlens: Tensor | None,
    chunks: Chunks, scale: float, N: int, dot: str, back: bool,
) -> Inside:  # fmt: skip
    """Of all chunks at once, X for the walk ``back``."""
    B, T, H, K = q.shape
    kept = torch.bfloat16 if dot == "bf16" else torch.float32
    rows = [q.new_empty(B, T, H, K, dtype=kept) for _ in range(4)]
    total = q.new_empty(chunks.total, H, K, dtype=torch.float32)
    Y, P, R = (q.new_empty(B, T, H, chunks.size, dtype=kept) for _ in range(3))
    X = torch.empty_like(Y) if back else None
    launch(
        _inside_kernel, (chunks.total * H,), q, k, a, b, gk, cu_seqlens, chunks.sequences,
        chunks.places, X, Y, P, R, *rows, total, scale, T, H, N, chunks.each, K=K,
        C=chunks.size, LIMIT=LIMITS[dot], **DOTS[dot], **INSIDE[dot],
    )  # fmt: skip
    return Inside(*rows, total, X, Y, P, R)


def by_channel(g: Tensor | None, q: Tensor) -> Tensor:
    """g [B, T, H, K] in fp32, of any kind of decay."""
    if g is None:
        return q.new_zeros(q.shape, dtype=torch.float32)
    return (g if g.ndim == 4 else g[..., None].expand(q.shape)).contiguous()


def dplr_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state and u.

    Args:
        q, k, a, b: [B, T, H, K].
        v: [B, T, H, V].
        g: fp32 natural-log decay, [B, T, H], [B, T, H, K] or None.
        state: [N, H, K, V] fp32.
        cu_seqlens: [N + 1] bounds of packed sequences, from 0 to T, on the device; B is then 1.
        scale: factor of o.
    """
    dot = dot_of(q.dtype, k.dtype, v.dtype)
    q, k, v, a, b, state = (x.contiguous() for x in (q, k, v, a, b, state))
    meta = tiles(q.shape[3], v.shape[3], dot, is_hopper(q.device))
    chunks = chunks_of(cu_seqlens, state.shape[0], q.shape[1], meta["C"])
    gk = by_channel(g, q)
    x = inside(q, k, a, b, gk, cu_seqlens, chunks, scale, state.shape[0], dot, False)
    u, o = torch.empty_like(v), torch.empty_like(v)
    final = walked(
        _forward_kernel, x.around(v), state, cu_seqlens, chunks, (u, o), scale, q.shape[:2],
        meta | DOTS[dot],
    )  # fmt: skip
    return o, final, u
