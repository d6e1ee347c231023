"""Triton kernel of the gradients of `linear_attn`, of all chunks at once.

With S the state before a chunk, D the gradient of the state after it, b_i the sum of the log decays
of its first i rows and b_C of all, P_ij = e^{b_i - b_j} q_i . k_j and A_ij = do_i . v_j for i >= j:

    dq_i = sum_j A_ij e^{b_i - b_j} k_j + e^{b_i} S do_i
    dk_j = sum_i A_ij e^{b_i - b_j} q_i + e^{b_C - b_j} D v_j
    dv_j = sum_i P_ij do_i + D^T (e^{b_C - b_j} k_j)
    db_i = q_i dq_i - k_i dk_i        db_C = e^{b_C} sum_v S D + sum_j k_j (e^{b_C - b_j} D v_j)
    dg_i = db_C + sum_{m >= i} db_m

so that no sum runs over more than a chunk. dq, dk and dv carry the factor scale but for D, which
has it. The states are found by ``states``.

Grid: one program a (chunk, head, block of BK key channels); for dv one a (chunk, head), which goes
through them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.columns import _between, _block_of, _columns, _passes_over
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import is_hopper
from flacompile.ops.kernels.states import _carried, by_kind, chunks_of, states
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    _channel_sums,
    _decay_sums,
    _dot,
    _load,
    _load_state,
    _store_rows,
    _sums_after,
    _sums_within,
    dot_of,
    key_tiles,
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


@triton.jit
def _keys_kernel(
    q, k, v, g, gk, do_, S, D, total, cu_seqlens, sequences, places, dq, dk, dg, dgk, scale,
    T, H, N, CHUNKS, ROWS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dq and dk of a block of channels, and of decays a channel (gk) the gradient.

    Of a decay a head (g) the block's share of it.
    """
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    block, state, there, first, length, i, at, by, inside, kk = _block_of(
        cu_seqlens, sequences, places, T, H, N, CHUNKS, K, BK, C
    )
    if _passes_over(total, state, there, kk, K, LIMIT, STRONG):
        return
    vv = tl.arange(0, BV)

    # 2. What stands inside the chunk, and the decays.
    v_c, do_c = _load(v, at, by, inside, vv, V), _load(do_, at, by, inside, vv, V)
    A = scale * _dot(do_c, tl.trans(v_c), DOT, PRECISION)
    k_c = _load(k, at, by, inside, kk, K)
    if g is not None:
        hi, lo, _, _, hi_end, lo_end = _decay_sums(g, at, by, inside)
        A *= _between(hi, lo, i)
    else:
        A = tl.where(i[:, None] >= i[None, :], A, 0.0)
    A_turned = tl.trans(A).to(DOT)
    if gk is not None:
        gk_c = _load(gk, at, by, inside, kk, K)
        sums = _channel_sums(gk_c, False)[0] if STRONG else _sums_within(gk_c, i, PRECISION)

    # 3. dq, from the state and from the rows of the chunk.
    S_c = _load_state(S, state, kk, vv, K, V)
    D_c = _load_state(D, state, kk, vv, K, V)
    if g is not None or gk is not None:
        carried = _carried(S, D, S_c, D_c, state, kk, K, V, BK, DOT, PRECISION)
    dq_c = scale * _dot(do_c, tl.trans(S_c), DOT, PRECISION)
    q_c = _load(q, at, by, inside, kk, K)
    if gk is None:
        if g is not None:
            dq_c *= tl.exp(hi + lo)[:, None]
        dq_c += _dot(A, k_c, DOT, PRECISION)
    elif not STRONG:
        dq_c += _dot(A, k_c * tl.exp(-sums), DOT, PRECISION)
        into = tl.exp(sums)
        q_in = (q_c * into).to(DOT)
        dq_c *= into
    else:
        _P, dq_in, dk_in = _columns(q_c, k_c, A, k, gk, at, first, length, i, kk, H, K, C)
        dq_c = tl.exp(sums) * dq_c + dq_in
    _store_rows(dq_c, dq, at, by, inside, kk, K)
    change = q_c * dq_c

    # 4. dk, in the same way.
    if gk is not None:
        end = tl.exp(tl.load(total + state * K + kk, mask=kk < K, other=0.0))
    dk_c = _dot(v_c, tl.trans(D_c), DOT, PRECISION)
    if gk is None:
        if g is not None:
            dk_c *= tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
            carried = tl.exp(hi_end + lo_end) * carried + tl.sum(k_c * dk_c, 0)
        dk_c += _dot(A_turned, q_c, DOT, PRECISION)
    elif not STRONG:
        carried = end * (carried + tl.sum(k_c * tl.exp(-sums) * dk_c, 0))
        dk_c *= end[None, :]
        dk_c += _dot(A_turned, q_in, DOT, PRECISION)
        dk_c *= tl.exp(-sums)
    else:
        dk_c *= tl.exp(_channel_sums(gk_c, True)[0])
        carried = end * carried + tl.sum(k_c * dk_c, 0)
        dk_c += dk_in
    _store_rows(dk_c, dk, at, by, inside, kk, K)

    # 5. What the decays get.
    change -= k_c * dk_c
    if g is not None:
        dg_c = tl.cumsum(tl.sum(change, 1), 0, reverse=True) + tl.sum(carried)
        tl.store(dg + block * ROWS + at + by, dg_c, mask=inside)
    if gk is not None:
        dg_c = _sums_after(change, i, DOT) + carried[None, :]
        _store_rows(dg_c, dgk, at, by, inside, kk, K)


@triton.jit
def _values_kernel(
    q, k, g, gk, do_, D, total, cu_seqlens, sequences, places, dv, scale, T, H, N, CHUNKS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr, STRONG: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """dv, from the key channels a block at a time."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    _0, state, there, first, length, i, at, by, inside, channels = _block_of(
        cu_seqlens, sequences, places, T, H, N, CHUNKS, K, ALL, C
    )
    if _passes_over(total, state, there, channels, K, LIMIT, STRONG):
        return
    vv = tl.arange(0, BV)
    P, dv_c = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)

    # 2. P, and what the state after the chunk gives.
    for block in range(0, K, BK):
        kk = block + tl.arange(0, BK)
        q_c, k_c = _load(q, at, by, inside, kk, K), _load(k, at, by, inside, kk, K)
        D_c = _load_state(D, state, kk, vv, K, V)
        if gk is None:
            P += _dot(q_c, tl.trans(k_c), DOT, PRECISION)
            dv_c += _dot(k_c, D_c, DOT, PRECISION)
        else:
            gk_c = _load(gk, at, by, inside, kk, K)
            if not STRONG:
                sums = _sums_within(gk_c, i, PRECISION)
                end = tl.load(total + state * K + kk, mask=kk < K, other=0.0)
                k_out = k_c * tl.exp(-sums)
                P += _dot(q_c * tl.exp(sums), tl.trans(k_out), DOT, PRECISION)
                dv_c += _dot(k_out * tl.exp(end)[None, :], D_c, DOT, PRECISION)
            else:
                dv_c += _dot(k_c * tl.exp(_channel_sums(gk_c, True)[0]), D_c, DOT, PRECISION)
                P += _columns(q_c, k_c, None, k, gk, at, first, length, i, kk, H, K, C)[0]

    # 3. Inside the chunk.
    if g is not None:
        hi, lo, _, _, hi_end, lo_end = _decay_sums(g, at, by, inside)
        P *= _between(hi, lo, i)
        dv_c *= tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
    else:
        P = tl.where(i[:, None] >= i[None, :], P, 0.0)
    do_c = _load(do_, at, by, inside, vv, V)
    dv_c += _dot(tl.trans(scale * P), do_c, DOT, PRECISION)
    _store_rows(dv_c, dv, at, by, inside, vv, V)


def tiles(K: int, V: int, dot: str, hopper: bool) -> dict[str, int]:
    """Block sizes and warps: the tiles of a program are few enough for 99 KiB of shared memory."""
    meta = key_tiles(K, V, dot)
    return meta | {"C": 64 if dot == "bf16" and meta["BV"] <= 128 and hopper else 32}


def value_tiles(keys: dict[str, int], channel: bool) -> dict[str, int]:
    """Those of dv: key channels are loaded ahead, but not beside the branch of decays a channel."""
    return keys | {"num_stages": 1 if channel or keys["C"] < 64 else 3}


def linear_attn_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    do: Tensor,
    dfinal: Tensor,
) -> Gradients:
    """dq, dk, dv, dg and dstate of ``linear_attn`` with decays of the key side.

    Args:
        q, k: [B, T, H, K].
        v, do: [B, T, H, V].
        g: fp32 natural-log decay, [B, T, H], [B, T, H, K] or None.
        state, dfinal: [N, H, K, V] fp32.
        cu_seqlens: [N + 1] bounds of packed sequences or None.
        scale: factor of the output.
    """
    B, T, H, K = q.shape
    V = v.shape[3]
    dot = dot_of(q.dtype, k.dtype, v.dtype)
    meta = tiles(K, V, dot, is_hopper(q.device))
    q, k, v, do, state, dfinal = (x.contiguous() for x in (q, k, v, do, state, dfinal))
    chunks = chunks_of(cu_seqlens, state.shape[0], T, meta["C"])
    S, _, total = states(k, v, g, state, cu_seqlens, chunks, 1.0, False, dot)
    D, dstate, _ = states(q, do, g, dfinal, cu_seqlens, chunks, scale, True, dot)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scalar, channel = by_kind(g)
    blocks = triton.cdiv(K, meta["BK"])
    dg = None if scalar is None else q.new_empty(blocks, B, T, H, dtype=torch.float32)
    dgk = None if channel is None else torch.empty_like(channel)
    where = (cu_seqlens, chunks.sequences, chunks.places)
    sizes = (scale, T, H, state.shape[0], chunks.each)
    ahead = value_tiles(meta, channel is not None)
    common = {"K": K, "V": V, "LIMIT": LIMITS[dot], **DOTS[dot]}
    for strong in (False,) if channel is None else (False, True):
        launch(
            _keys_kernel, (chunks.total * H * blocks,), q, k, v, scalar, channel, do, S, D, total,
            *where, dq, dk, dg, dgk, *sizes, B * T * H, STRONG=strong, **common, **meta,
        )  # fmt: skip
        launch(
            _values_kernel, (chunks.total * H,), q, k, scalar, channel, do, D, total, *where, dv,
            *sizes, STRONG=strong, ALL=max(16, triton.next_power_of_2(K)), **common, **ahead,
        )  # fmt: skip
    return dq, dk, dv, dgk if dg is None else dg.sum(0), dstate
