"""Triton kernel of the gradients of `dplr`, of all chunks at once.

In the letters of ``dplr``, with D_ij = e^{s_i - s_j} of a channel, early e^{r_i - s_j}, and

    A_ij = scale do_i . u_j        B_ij = scale do_i . v_j        i >= j
    E_ij = dr_i . u_j              F_ij = dr_i . v_j              i > j

    dq_i = sum_j D_ij (A_ij b_j + B_ij k_j) + scale e^{s_i} S do_i
    da_i = sum_j D_ij (E_ij b_j + F_ij k_j) + e^{r_i} S dr_i       D early, here and below with a
    db_j = sum_i D_ij (A_ij q_i + E_ij a_i) + e^{s_C - s_j} G u_j
    dk_j = sum_i D_ij (B_ij q_i + F_ij a_i) + e^{s_C - s_j} G v_j
    ds_i = q_i dq_i + a_{i+1} da_{i+1} - b_i db_i - k_i dk_i
    ds_C = e^{s_C} sum_v S G + sum_j e^{s_C - s_j} (b_j G u_j + k_j G v_j)
    dg_i = ds_C + sum_{m >= i} ds_m

Grid: one program a (chunk, head, block of BK key channels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.columns import _columns, _passes_over
from flacompile.ops.kernels.dplr import _backward_kernel, by_channel, inside, tiles
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import is_hopper
from flacompile.ops.kernels.states import _carried, _place, _rows_of, chunks_of, states
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    _channel_sums,
    _dot,
    _load,
    _load_state,
    _store_rows,
    dot_of,
    key_tiles,
)
from flacompile.ops.kernels.walk import walked

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _products(x, y, keep, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.where(keep, _dot(x, tl.trans(y), DOT, PRECISION), 0.0)


@triton.jit
def _keys_kernel(
    q, k, v, a, b, gk, u, do, dr, S, G, total, cu_seqlens, sequences, places, dq, dk, da, db, dgk,
    scale, T, H, N, CHUNKS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db and dgk of a block of channels."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    NK: tl.constexpr = (K + BK - 1) // BK
    block, owner = tl.program_id(0) % NK, tl.program_id(0) // NK
    h, chunk = owner % H, (owner // H).to(tl.int64)
    n, place = _place(cu_seqlens, sequences, places, chunk, CHUNKS)
    if n >= N:
        return
    first, length, i, at, by, inside = _rows_of(cu_seqlens, n, place, h, T, H, C)
    state = chunk * H + h
    kk, vv = block * BK + tl.arange(0, BK), tl.arange(0, BV)
    if _passes_over(total, state, kk, K, LIMIT, STRONG):
        return
    gk_c = tl.maximum(_load(gk, at, by, inside, kk, K), -128.0)
    sums, end = _channel_sums(gk_c, False)
    rest = tl.exp(_channel_sums(gk_c, True)[0])

    # 2. From the states.
    u_c, v_c = _load(u, at, by, inside, vv, V), _load(v, at, by, inside, vv, V)
    do_c, dr_c = _load(do, at, by, inside, vv, V), _load(dr, at, by, inside, vv, V)
    S_c = tl.trans(_load_state(S, state, kk, vv, K, V))
    dq_c = tl.exp(sums) * (scale * _dot(do_c, S_c, DOT, PRECISION))
    da_c = tl.exp(sums - gk_c) * _dot(dr_c, S_c, DOT, PRECISION)
    G_c = tl.trans(_load_state(G, state, kk, vv, K, V))
    db_c = rest * _dot(u_c, G_c, DOT, PRECISION)
    dk_c = rest * _dot(v_c, G_c, DOT, PRECISION)

    # 3. From the rows of the chunk.
    below, up_to = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    A = scale * _products(do_c, u_c, up_to, DOT, PRECISION)
    B = scale * _products(do_c, v_c, up_to, DOT, PRECISION)
    E = _products(dr_c, u_c, below, DOT, PRECISION)
    F = _products(dr_c, v_c, below, DOT, PRECISION)
    q_c, a_c = _load(q, at, by, inside, kk, K), _load(a, at, by, inside, kk, K)
    b_c, k_c = _load(b, at, by, inside, kk, K), _load(k, at, by, inside, kk, K)
    carried = tl.exp(end) * _carried(S, G, state, kk, K, V) + tl.sum(b_c * db_c + k_c * dk_c, 0)
    if not STRONG:
        out = tl.exp(-sums)
        out_b, out_k = b_c * out, k_c * out
        from_rows = _dot(A, out_b, DOT, PRECISION) + _dot(B, out_k, DOT, PRECISION)
        dq_c += tl.exp(sums) * from_rows
        from_rows = _dot(E, out_b, DOT, PRECISION) + _dot(F, out_k, DOT, PRECISION)
        da_c += tl.exp(sums - gk_c) * from_rows
        into_q, into_a = q_c * tl.exp(sums), a_c * tl.exp(sums - gk_c)
        from_rows = _dot(tl.trans(A), into_q, DOT, PRECISION)
        db_c += out * (from_rows + _dot(tl.trans(E), into_a, DOT, PRECISION))
        from_rows = _dot(tl.trans(B), into_q, DOT, PRECISION)
        dk_c += out * (from_rows + _dot(tl.trans(F), into_a, DOT, PRECISION))
    else:
        _0, x, y = _columns(q_c, b_c, A, b, gk, at, first, length, i, kk, H, K, C)
        dq_c, db_c = dq_c + x, db_c + y
        _0, x, y = _columns(q_c, k_c, B, k, gk, at, first, length, i, kk, H, K, C)
        dq_c, dk_c = dq_c + x, dk_c + y
        _0, x, y = _columns(a_c, b_c, E, b, gk, at, first, length, i, kk, H, K, C, True)
        da_c, db_c = da_c + x, db_c + y
        _0, x, y = _columns(a_c, k_c, F, k, gk, at, first, length, i, kk, H, K, C, True)
        da_c, dk_c = da_c + x, dk_c + y
    _store_rows(dq_c, dq, at, by, inside, kk, K)
    _store_rows(da_c, da, at, by, inside, kk, K)
    _store_rows(db_c, db, at, by, inside, kk, K)
    _store_rows(dk_c, dk, at, by, inside, kk, K)

    # 4. What the decays get; that of a row does not reach its own a.
    early = a_c * da_c
    change = q_c * dq_c + early - b_c * db_c - k_c * dk_c
    dg_c = tl.cumsum(change, 0, reverse=True) - early + carried[None, :]
    _store_rows(dg_c, dgk, at, by, inside, kk, K)


def dplr_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    u: Tensor,
    do: Tensor,
    dfinal: Tensor,
) -> Gradients:
    """dq, dk, dv, dg [B, T, H, K], da, db and dstate; see ``dplr_forward``."""
    T, H, K = q.shape[1:]
    V, dot = v.shape[3], dot_of(q.dtype, k.dtype, v.dtype)
    q, k, v, a, b, state = (x.contiguous() for x in (q, k, v, a, b, state))
    u, do, dfinal = u.contiguous(), do.contiguous(), dfinal.contiguous()
    meta, N = tiles(K, V, dot, is_hopper(q.device)), state.shape[0]
    chunks = chunks_of(cu_seqlens, N, T, meta["C"])
    gk = by_channel(g, q)
    S, _, total = states(b, u, gk, state, cu_seqlens, chunks, 1.0, False, dot, (k, v))
    x = inside(q, k, a, b, gk, cu_seqlens, chunks, scale, N, dot)
    dr, dv, G = torch.empty_like(v), torch.empty_like(v), torch.empty_like(S)
    dstate = walked(
        _backward_kernel, x.around(do), dfinal, cu_seqlens, chunks, (dr, dv, G), scale,
        q.shape[:2], meta | DOTS[dot],
    )  # fmt: skip
    keys = {"C": meta["C"], **key_tiles(K, V)}
    dq, dk, da, db = (torch.empty_like(x) for x in (q, k, a, b))
    dgk = torch.empty_like(gk)
    for strong in (False, True):
        launch(
            _keys_kernel, (chunks.total * H * triton.cdiv(K, keys["BK"]),), q, k, v, a, b, gk, u,
            do, dr, S, G, total, cu_seqlens, chunks.sequences, chunks.places, dq, dk, da, db, dgk,
            scale, T, H, N, chunks.each, K=K, V=V, LIMIT=LIMITS[dot], STRONG=strong, **keys,
            **DOTS[dot],
        )  # fmt: skip
    return dq, dk, dv, dgk, da, db, dstate
