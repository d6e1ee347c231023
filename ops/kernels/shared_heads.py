"""Triton kernels of the gradients of `linear_attn` where heads share q and k.

The equations are those of ``linear_attn_backward``, summed over the heads h of a group:

    dq_i = sum_j (sum_h A_ij e^{b_i - b_j}) k_j + sum_h e^{b_i} S do_i
    dk_j = sum_i (sum_h A_ij e^{b_i - b_j}) q_i + sum_h e^{b_C - b_j} D v_j

so that what stands inside a chunk is summed before it meets k and q. A decay is a head's own: from
inside its b_i gets what row i of A_ij P_ij sums to, less what column i does. What the states give
is summed where they are read, k_i dk_i = v_i dv_i.

States, of every head, are far larger than all else: they are kept PER chunks apart, and taken to
the chunk at hand.

Grid for the keys: one program a (chunk, group, part of its heads, block of BK key channels), which
goes through EACH heads; parts are summed afterwards, in one order. For dv one a (chunk, head).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.columns import _between
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import PROGRAMS, is_hopper
from flacompile.ops.kernels.linear_attn_backward import Gradients, tiles
from flacompile.ops.kernels.states import _place, _rows_of, chunks_of, states
from flacompile.ops.kernels.tiles import (
    DOTS,
    _decay_sums,
    _dot,
    _load,
    _load_state,
    _store_rows,
    dot_of,
)

PER = 2  # for half the memory of states
KEYS = {"num_warps": 8}  # registers hold sums over heads beside a head's own


@triton.jit
def _taken(
    S, x, y, g, scale, at, by, inside, kk, vv, K: tl.constexpr, V: tl.constexpr,
    SHARE: tl.constexpr, BACK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a chunk from the one before it; with BACK its gradient, back in time."""
    x_c = _load(x, at // SHARE, by // SHARE, inside, kk, K)
    y_c = _load(y, at, by, inside, vv, V)
    if g is not None:
        hi, lo, _0, _1, hi_end, lo_end = _decay_sums(g, at, by, inside)
        w = (hi + lo) if BACK else (hi_end - hi) + (lo_end - lo)
        y_c = y_c.to(tl.float32) * tl.exp(w)[:, None]
        S *= tl.exp(hi_end + lo_end)
    return S + scale * _dot(tl.trans(x_c), y_c, DOT, PRECISION)


@triton.jit
def _before(
    S, index, k, v, g, own, at, by, first, i, length, H, kk, vv, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, SHARE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before the chunk at row ``first``, the one after ``own`` since the kept one."""
    S_c = _load_state(S, index, kk, vv, K, V).to(tl.float32)
    for c in range(own):
        rows = (c - own) * C
        inside = first + rows + i < length
        S_c = _taken(
            S_c, k, v, g, 1.0, at + rows * H, by, inside, kk, vv, K, V, SHARE, False, DOT, PRECISION
        )
    return S_c


@triton.jit
def _after(
    D, index, q, do_, g, scale, rest, at, by, first, i, length, H, kk, vv,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, SHARE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after the chunk at row ``first``, ``rest`` before the kept one."""
    D_c = _load_state(D, index, kk, vv, K, V).to(tl.float32)
    for c in range(rest):
        rows = (rest - c) * C
        inside = first + rows + i < length
        D_c = _taken(
            D_c, q, do_, g, scale, at + rows * H, by, inside, kk, vv, K, V, SHARE, True, DOT,
            PRECISION,
        )  # fmt: skip
    return D_c


@triton.jit
def _products(S_c, D_c, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """sum_v S D; in bf16 the diagonal of a dot, for which states need not stand in registers."""
    if tl.bfloat16 == DOT:
        i = tl.arange(0, BK)
        products = _dot(S_c, tl.trans(D_c), DOT, PRECISION)
        return tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), 0)
    else:
        return tl.sum(S_c * D_c, 1)


@triton.jit
def _keys_kernel(
    q, k, v, g, do_, S, D, cu_seqlens, sequences, places, dq, dk, dg, scale,
    T, H, N, CHUNKS, ROWS, PARTS, EACH,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PER: tl.constexpr, SHARE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk of a part of a group's heads, and dg of a block of channels."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    NK: tl.constexpr = (K + BK - 1) // BK
    block, owner = tl.program_id(0) % NK, tl.program_id(0) // NK
    part, owner = owner % PARTS, owner // PARTS
    groups = H // SHARE
    group, chunk = owner % groups, (owner // groups).to(tl.int64)
    n, place = _place(cu_seqlens, sequences, places, chunk // PER, CHUNKS)
    if n >= N:
        return
    own = (chunk % PER).to(tl.int32)
    first, length, i, at, by, inside = _rows_of(
        cu_seqlens, n, place * PER + own, group * SHARE, T, H, C
    )
    kk = block * BK + tl.arange(0, BK)

    q_c = _load(q, at // SHARE, by // SHARE, inside, kk, K)
    A_sum = tl.zeros([C, C], tl.float32)
    dq_c, dk_c = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)

    for head in range(part * EACH, tl.minimum(part * EACH + EACH, SHARE)):
        # 2. What stands inside the chunk, and what the states give, a block of values at a time.
        row, index = at + head, (chunk // PER) * H + group * SHARE + head
        A, carried = tl.zeros([C, C], tl.float32), tl.zeros([BK], tl.float32)
        of_S, of_D = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for values in range(0, V, BV):
            vv = values + tl.arange(0, BV)
            v_c, do_c = _load(v, row, by, inside, vv, V), _load(do_, row, by, inside, vv, V)
            A += _dot(do_c, tl.trans(v_c), DOT, PRECISION)
            S_c = _before(
                S, index, k, v, g, own, row, by, first, i, length, H, kk, vv, K, V, C, SHARE, DOT,
                PRECISION,
            )  # fmt: skip
            of_S += _dot(do_c, tl.trans(S_c), DOT, PRECISION)
            D_c = _after(
                D, index, q, do_, g, scale, PER - 1 - own, row, by, first, i, length, H, kk, vv,
                K, V, C, SHARE, DOT, PRECISION,
            )  # fmt: skip
            of_D += _dot(v_c, tl.trans(D_c), DOT, PRECISION)
            if g is not None:
                carried += _products(S_c, D_c, BK, DOT, PRECISION)

        # 3. What decays on the way, and what the decay gets.
        if g is not None:
            hi, lo, _0, _1, hi_end, lo_end = _decay_sums(g, row, by, inside)
            A *= scale * _between(hi, lo, i)
            of_S *= (scale * tl.exp(hi + lo))[:, None]
            of_D *= tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
            dg_c = tl.cumsum(tl.sum(q_c * of_S, 1), 0, reverse=True)
            dg_c += tl.exp(hi_end + lo_end) * tl.sum(carried)
            tl.store(dg + block * ROWS + row + by, dg_c, mask=inside)
        else:
            A = tl.where(i[:, None] >= i[None, :], scale * A, 0.0)
            of_S *= scale
        A_sum += A
        dq_c += of_S
        dk_c += of_D

    # 4. What A gives.
    k_c = _load(k, at // SHARE, by // SHARE, inside, kk, K)
    dq_c += _dot(A_sum, k_c, DOT, PRECISION)
    dk_c += _dot(tl.trans(A_sum), q_c, DOT, PRECISION)
    row = (part.to(tl.int64) * ROWS + at) // SHARE
    _store_rows(dq_c, dq, row, by // SHARE, inside, kk, K)
    _store_rows(dk_c, dk, row, by // SHARE, inside, kk, K)


@triton.jit
def _values_kernel(
    q, k, v, g, do_, D, cu_seqlens, sequences, places, dv, dg, scale, T, H, N, CHUNKS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PER: tl.constexpr, SHARE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv, from the key channels a block at a time, and the rest of dg."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    h, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    n, place = _place(cu_seqlens, sequences, places, chunk // PER, CHUNKS)
    if n >= N:
        return
    own = (chunk % PER).to(tl.int32)
    first, length, i, at, by, inside = _rows_of(cu_seqlens, n, place * PER + own, h, T, H, C)
    vv, index = tl.arange(0, BV), (chunk // PER) * H + h
    P, dv_c = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)

    # 2. P, and what the state after the chunk gives.
    for block in range(0, K, BK):
        kk = block + tl.arange(0, BK)
        q_c = _load(q, at // SHARE, by // SHARE, inside, kk, K)
        k_c = _load(k, at // SHARE, by // SHARE, inside, kk, K)
        D_c = _after(
            D, index, q, do_, g, scale, PER - 1 - own, at, by, first, i, length, H, kk, vv, K, V, C,
            SHARE, DOT, PRECISION,
        )  # fmt: skip
        P += _dot(q_c, tl.trans(k_c), DOT, PRECISION)
        dv_c += _dot(k_c, D_c, DOT, PRECISION)

    # 3. Inside the chunk, and what the decay gets.
    do_c = _load(do_, at, by, inside, vv, V)
    if g is not None:
        hi, lo, _0, _1, hi_end, lo_end = _decay_sums(g, at, by, inside)
        P *= scale * _between(hi, lo, i)
        dv_c *= tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
        v_c = _load(v, at, by, inside, vv, V)
        kept, met = tl.sum(v_c * dv_c, 1), P * _dot(do_c, tl.trans(v_c), DOT, PRECISION)
        change = tl.sum(met, 1) - tl.sum(met, 0) - kept
        dg_c = tl.cumsum(change, 0, reverse=True) + tl.sum(kept)
        tl.store(dg + at + by, dg_c, mask=inside)
    else:
        P = tl.where(i[:, None] >= i[None, :], scale * P, 0.0)
    dv_c += _dot(tl.trans(P), do_c, DOT, PRECISION)
    _store_rows(dv_c, dv, at, by, inside, vv, V)


def parts_of(programs: Any, share: int) -> Any:
    """Into how many parts the ``share`` heads of a group are cut, to fill a GPU."""
    return torch.sym_max(1, torch.sym_min(share, PROGRAMS // torch.sym_max(programs, 1)))


def shared_heads_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, cu_seqlens: Tensor | None,
    scale: float, do: Tensor, dfinal: Tensor,
) -> Gradients:  # fmt: skip
    """As ``linear_attn_backward``, for q and k [B, T, G, K] and g [B, T, H] or None."""
    q, k, v, do, state, dfinal = (x.contiguous() for x in (q, k, v, do, state, dfinal))
    g = g if g is None else g.contiguous()
    (B, T, G, K), (N, H, _, V) = q.shape, state.shape
    dot = dot_of(q.dtype, k.dtype, v.dtype)
    meta = tiles(K, V, dot, is_hopper(q.device))
    share, blocks = H // G, triton.cdiv(K, meta["BK"])
    chunks = chunks_of(cu_seqlens, N, T, PER * meta["C"])
    S, _, _ = states(k, v, g, state, cu_seqlens, chunks, 1.0, False, dot)
    D, dstate, _ = states(q, do, g, dfinal, cu_seqlens, chunks, scale, True, dot)
    count = chunks.total * PER
    parts = parts_of(count * G * blocks, share)
    dq, dk = (q.new_empty(parts, B, T, G, K, dtype=torch.float32) for _ in range(2))
    dg = None if g is None else q.new_empty(blocks, B, T, H, dtype=torch.float32)
    rest = None if g is None else q.new_empty(B, T, H, dtype=torch.float32)
    where = (cu_seqlens, chunks.sequences, chunks.places)
    meta |= {"K": K, "V": V, "PER": PER, "SHARE": share, **DOTS[dot]}
    launch(
        _keys_kernel, (count * G * parts * blocks,), q, k, v, g, do, S, D, *where, dq, dk, dg,
        scale, T, H, N, chunks.each, B * T * H, parts, -(-share // parts), **meta | KEYS,
    )  # fmt: skip
    del S  # its memory becomes that of dv
    dq, dk = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype)
    dv = torch.empty_like(v)
    launch(
        _values_kernel, (count * H,), q, k, v, g, do, D, *where, dv, rest, scale, T, H, N,
        chunks.each, **meta,
    )  # fmt: skip
    return dq, dk, dv, dg if dg is None else dg.sum(0) + rest, dstate
