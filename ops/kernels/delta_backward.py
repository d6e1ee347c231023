"""Triton kernel of the gradients of `delta_rule`, of all chunks at once.

In the letters of ``delta``, with A_ij = scale D_ij do_i . u_j (i >= j), E_ij = -D_ij dR_i . u_j
(i > j), which is what 1 + L gets, and y what the keys that read get:

    dQ = A K + scale e^b dO S^T              Y = E K - e^b dR S^T
    dK = A^T Q + (beta E)^T K + e^{b_C - b} U G^T + beta Y
    dV = beta dR        dbeta_i = k_i . y_i + dR_i . v_i
    db_i = q_i dq_i + 2 beta_i k_i y_i - k_i dk_i
    db_C = e^{b_C} sum_v S G + sum_j k_j (e^{b_C - b_j} G u_j)
    dg_i = db_C + sum_{m >= i} db_m

Grid: one program a (chunk, head, block of BK key channels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.columns import _between, _block_of, _columns, _passes_over
from flacompile.ops.kernels.delta import delta_rule_walk_back, tiles
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import is_hopper
from flacompile.ops.kernels.states import _carried, by_kind, chunks_of, states
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    NARROWEST,
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

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]
PART = tl.constexpr(NARROWEST)  # columns of the values that a program takes at once


@triton.jit
def _keys_kernel(
    q, k, v, g, gk, beta, u, do_, dr, S, G, total, cu_seqlens, sequences, places, dq, dk, dv, dg,
    dgk, dbeta, scale, T, H, N, CHUNKS, ROWS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr, STRONG: tl.constexpr,
):  # fmt: skip
    """dq, dk and dgk of a block of channels, shares of dbeta and dg, a share of dv's columns."""
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    block, state, there, first, length, i, at, by, inside, kk = _block_of(
        cu_seqlens, sequences, places, T, H, N, CHUNKS, K, BK, C
    )
    if _passes_over(total, state, there, kk, K, LIMIT, STRONG):
        return
    vv = tl.arange(0, BV)
    beta_c = tl.load(beta + at + by, mask=inside, other=0.0).to(tl.float32)

    # 2. What the values get: a share of their columns.
    dbeta_c = tl.zeros([C], tl.float32)
    for column in range(block * PART, V, PART * ((K + BK - 1) // BK)):
        part = column + tl.arange(0, PART)
        dr_p, v_p = _load(dr, at, by, inside, part, V), _load(v, at, by, inside, part, V)
        dbeta_c += tl.sum(dr_p.to(tl.float32) * v_p, 1)
        _store_rows(beta_c[:, None] * dr_p, dv, at, by, inside, part, V)

    # 3. What stands inside the chunk, and the decays.
    u_c, do_c = _load(u, at, by, inside, vv, V), _load(do_, at, by, inside, vv, V)
    dr_c = _load(dr, at, by, inside, vv, V)
    A = scale * _dot(do_c, tl.trans(u_c), DOT, PRECISION)
    E = -_dot(dr_c, tl.trans(u_c), DOT, PRECISION)
    if g is not None:
        hi, lo, _, _, hi_end, lo_end = _decay_sums(g, at, by, inside)
        A *= _between(hi, lo, i)
        E *= _between(hi, lo, i)
    A = tl.where(i[:, None] >= i[None, :], A, 0.0)
    E = tl.where(i[:, None] > i[None, :], E, 0.0)
    A_turned, E_turned = tl.trans(A).to(DOT), tl.trans(beta_c[:, None] * E).to(DOT)
    k_c = _load(k, at, by, inside, kk, K)
    if gk is not None:
        gk_c = _load(gk, at, by, inside, kk, K)
        sums = _channel_sums(gk_c, False)[0] if STRONG else _sums_within(gk_c, i, PRECISION)

    # 4. dq, from the state and from the rows of the chunk; then y.
    S_c = _load_state(S, state, kk, vv, K, V)
    G_c = _load_state(G, state, kk, vv, K, V)
    if g is not None or gk is not None:
        carried = _carried(S, G, S_c, G_c, state, kk, K, V, BK, DOT, PRECISION)
    q_c, S_c = _load(q, at, by, inside, kk, K), tl.trans(S_c)
    dq_c = scale * _dot(do_c, S_c, DOT, PRECISION)
    y_c = -_dot(dr_c, S_c, DOT, PRECISION)
    if gk is None:
        if g is not None:
            dq_c *= tl.exp(hi + lo)[:, None]
            y_c *= tl.exp(hi + lo)[:, None]
        dq_c += _dot(A, k_c, DOT, PRECISION)
        y_c += _dot(E, k_c, DOT, PRECISION)
    elif not STRONG:
        into, k_out = tl.exp(sums), (k_c * tl.exp(-sums)).to(DOT)
        q_in, k_in = (q_c * into).to(DOT), (k_c * into).to(DOT)
        dq_c += _dot(A, k_out, DOT, PRECISION)
        y_c += _dot(E, k_out, DOT, PRECISION)
        dq_c, y_c = into * dq_c, into * y_c
    else:
        _P, dq_in, dk_in = _columns(q_c, k_c, A, k, gk, at, first, length, i, kk, H, K, C)
        k_beta = beta_c[:, None] * k_c
        _P, y_in, dk_y = _columns(k_beta, k_c, E, k, gk, at, first, length, i, kk, H, K, C)
        dq_c, y_c = tl.exp(sums) * dq_c + dq_in, tl.exp(sums) * y_c + y_in
    _store_rows(dq_c, dq, at, by, inside, kk, K)
    read = k_c * y_c
    change = q_c * dq_c + beta_c[:, None] * read  # of 2 beta k y one is in - k dk below
    dbeta_c += tl.sum(read, 1)
    tl.store(dbeta + block * ROWS + at + by, dbeta_c, mask=inside)

    # 5. dk, of the keys that write and of those that read.
    dk_c = _dot(u_c, tl.trans(G_c), DOT, PRECISION)
    if gk is None:
        if g is not None:
            dk_c *= tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
            carried = tl.exp(hi_end + lo_end) * carried + tl.sum(k_c * dk_c, 0)
        dk_c += _dot(A_turned, q_c, DOT, PRECISION)
        dk_c += _dot(E_turned, k_c, DOT, PRECISION)
    else:
        end = tl.exp(tl.load(total + state * K + kk, mask=kk < K, other=0.0))
        if not STRONG:
            carried = end * (carried + tl.sum(k_c * tl.exp(-sums) * dk_c, 0))
            dk_c *= end[None, :]
            dk_c += _dot(A_turned, q_in, DOT, PRECISION)
            dk_c += _dot(E_turned, k_in, DOT, PRECISION)
            dk_c *= tl.exp(-sums)
        else:
            dk_c *= tl.exp(_channel_sums(gk_c, True)[0])
            carried = end * carried + tl.sum(k_c * dk_c, 0)
            dk_c += dk_in + dk_y
    change -= k_c * dk_c
    _store_rows(dk_c + beta_c[:, None] * y_c, dk, at, by, inside, kk, K)

    # 6. What the decays get.
    if g is not None:
        dg_c = tl.cumsum(tl.sum(change, 1), 0, reverse=True) + tl.sum(carried)
        tl.store(dg + block * ROWS + at + by, dg_c, mask=inside)
    if gk is not None:
        dg_c = _sums_after(change, i, DOT) + carried[None, :]
        _store_rows(dg_c, dgk, at, by, inside, kk, K)


def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    u: Tensor,
    do: Tensor,
    dfinal: Tensor,
) -> Gradients:
    """dq, dk, dv, dg, dbeta and dstate; see ``delta_rule_forward``."""
    B, T, H, K = q.shape
    V, dot = v.shape[3], dot_of(q.dtype, k.dtype, v.dtype)
    q, k, v, beta, state = (x.contiguous() for x in (q, k, v, beta, state))
    u, do, dfinal = u.contiguous(), do.contiguous(), dfinal.contiguous()
    decays = by_kind(g)
    meta = tiles(K, V, dot, is_hopper(q.device))
    chunks = chunks_of(cu_seqlens, state.shape[0], T, meta["C"])
    S, _, total = states(k, u, g, state, cu_seqlens, chunks, 1.0, False, dot)
    dr, G, dstate = delta_rule_walk_back(
        q, k, decays, beta, do, dfinal, cu_seqlens, chunks, scale, meta, dot
    )
    keys = {"C": meta["C"], **key_tiles(K, V, dot)}
    blocks = triton.cdiv(K, keys["BK"])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbeta = state.new_empty(blocks, B, T, H)
    dg = None if decays[0] is None else torch.empty_like(dbeta)
    dgk = None if decays[1] is None else torch.empty_like(decays[1])
    for strong in (False,) if dgk is None else (False, True):
        launch(
            _keys_kernel, (chunks.total * H * blocks,), q, k, v, *decays, beta, u, do, dr, S, G,
            total, cu_seqlens, chunks.sequences, chunks.places, dq, dk, dv, dg, dgk, dbeta, scale,
            T, H, state.shape[0], chunks.each, B * T * H, K=K, V=V, LIMIT=LIMITS[dot],
            STRONG=strong, **keys, **DOTS[dot],
        )  # fmt: skip
    dg = dgk if dg is None else dg.sum(0)
    return dq, dk, dv, dg, dbeta.sum(0).to(beta.dtype), dstate
