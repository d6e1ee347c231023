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

from flacompile.ops.kernels.columns import _block_of, _columns, _passes_over
from flacompile.ops.kernels.dplr import _backward_kernel, by_channel, inside, tiles
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import is_hopper
from flacompile.ops.kernels.states import _carried, chunks_of, states
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    _channel_sums,
    _dot,
    _load,
    _load_state,
    _store_rows,
    _sums_after,
    _sums_before,
    _sums_within,
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
    q, k, v, a, b, gk, u, do_, dr, S, G, total, cu_seqlens, sequences, places, dq, dk, da, db, dgk,
    scale, T, H, N, CHUNKS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dq, dk, da, db and dgk of a block of channels."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    _block, state, there, first, length, i, at, by, inside, kk = _block_of(
        cu_seqlens, sequences, places, T, H, N, CHUNKS, K, BK, C
    )
    if _passes_over(total, state, there, kk, K, LIMIT, STRONG):
        return
    vv = tl.arange(0, BV)
    gk_c = _load(gk, at, by, inside, kk, K)
    if STRONG:
        sums = _channel_sums(gk_c, False)[0]
        early = sums - tl.maximum(gk_c, -128.0)
    else:
        sums, early = _sums_within(gk_c, i, PRECISION), _sums_before(gk_c, i, PRECISION)

    # 2. What stands inside the chunk.
    below, up_to = i[:, None] > i[None, :], i[:, None] >= i[None, :]
    u_c, v_c = _load(u, at, by, inside, vv, V), _load(v, at, by, inside, vv, V)
    do_c, dr_c = _load(do_, at, by, inside, vv, V), _load(dr, at, by, inside, vv, V)
    A = scale * _products(do_c, u_c, up_to, DOT, PRECISION)
    B = scale * _products(do_c, v_c, up_to, DOT, PRECISION)
    E = _products(dr_c, u_c, below, DOT, PRECISION)
    F = _products(dr_c, v_c, below, DOT, PRECISION)
    A_turned, B_turned = tl.trans(A).to(DOT), tl.trans(B).to(DOT)
    E_turned, F_turned = tl.trans(E).to(DOT), tl.trans(F).to(DOT)

    # 3. dq and da, from the state and from the rows of the chunk.
    S_c, G_c = _load_state(S, state, kk, vv, K, V), _load_state(G, state, kk, vv, K, V)
    carried = _carried(S, G, S_c, G_c, state, kk, K, V, BK, DOT, PRECISION)
    S_c, G_c = tl.trans(S_c), tl.trans(G_c)
    b_c, k_c = _load(b, at, by, inside, kk, K), _load(k, at, by, inside, kk, K)
    q_c, a_c = _load(q, at, by, inside, kk, K), _load(a, at, by, inside, kk, K)
    dq_c = scale * _dot(do_c, S_c, DOT, PRECISION)
    if not STRONG:
        out_b, out_k = (b_c * tl.exp(-sums)).to(DOT), (k_c * tl.exp(-sums)).to(DOT)
        into_q, into_a = (q_c * tl.exp(sums)).to(DOT), (a_c * tl.exp(early)).to(DOT)
        dq_c += _dot(A, out_b, DOT, PRECISION)
        dq_c += _dot(B, out_k, DOT, PRECISION)
        dq_c *= tl.exp(sums)
    else:
        _0, dq_b, db_q = _columns(q_c, b_c, A, b, gk, at, first, length, i, kk, H, K, C)
        _0, dq_k, dk_q = _columns(q_c, k_c, B, k, gk, at, first, length, i, kk, H, K, C)
        dq_c = tl.exp(sums) * dq_c + dq_b + dq_k
    _store_rows(dq_c, dq, at, by, inside, kk, K)
    change = q_c * dq_c
    da_c = _dot(dr_c, S_c, DOT, PRECISION)
    if not STRONG:
        da_c += _dot(E, out_b, DOT, PRECISION)
        da_c += _dot(F, out_k, DOT, PRECISION)
        da_c *= tl.exp(early)
    else:
        _0, da_b, db_a = _columns(a_c, b_c, E, b, gk, at, first, length, i, kk, H, K, C, True)
        _0, da_k, dk_a = _columns(a_c, k_c, F, k, gk, at, first, length, i, kk, H, K, C, True)
        da_c = tl.exp(early) * da_c + da_b + da_k
    _store_rows(da_c, da, at, by, inside, kk, K)
    own = a_c * da_c  # which the decay of the row does not reach

    # 4. db and dk, in the same way.
    end = tl.exp(tl.load(total + state * K + kk, mask=kk < K, other=0.0))
    rest = tl.exp(-sums) if not STRONG else tl.exp(_channel_sums(gk_c, True)[0])
    db_c = rest * _dot(u_c, G_c, DOT, PRECISION)
    if not STRONG:
        carried += tl.sum(b_c * db_c, 0)
        db_c *= end[None, :]
        db_c += rest * _dot(A_turned, into_q, DOT, PRECISION)
        db_c += rest * _dot(E_turned, into_a, DOT, PRECISION)
    else:
        carried = end * carried + tl.sum(b_c * db_c, 0)
        db_c += db_q + db_a
    _store_rows(db_c, db, at, by, inside, kk, K)
    change -= b_c * db_c
    dk_c = rest * _dot(v_c, G_c, DOT, PRECISION)
    if not STRONG:
        carried = end * (carried + tl.sum(k_c * dk_c, 0))
        dk_c *= end[None, :]
        dk_c += rest * _dot(B_turned, into_q, DOT, PRECISION)
        dk_c += rest * _dot(F_turned, into_a, DOT, PRECISION)
    else:
        carried += tl.sum(k_c * dk_c, 0)
        dk_c += dk_q + dk_a
    _store_rows(dk_c, dk, at, by, inside, kk, K)

    # 5. What the decays get.
    change -= k_c * dk_c
    dg_c = _sums_after(change + own, i, DOT) - own + carried[None, :]
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
    x = inside(q, k, a, b, gk, cu_seqlens, chunks, scale, N, dot, True)
    dr, dv, G = torch.empty_like(v), torch.empty_like(v), torch.empty_like(S)
    dstate = walked(
        _backward_kernel, x.around(do), dfinal, cu_seqlens, chunks, (dr, dv, G), scale,
        q.shape[:2], meta | DOTS[dot],
    )  # fmt: skip
    keys = {"C": meta["C"], **key_tiles(K, V, dot)}
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
