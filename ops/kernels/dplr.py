"""Triton kernel of the dplr sweep: one pass over time with the state in registers.

    u_t = S_{t-1}^T a_t + c_t        o_t = S_{t-1}^T q_t
    S_t = diag(e^g_t) S_{t-1} + b_t u_t^T + k_t v_t^T

Grid: one program a (sequence, head, block of BV value channels). A program walks its sequence in
chunks of C rows and holds its [BK, BV] tile of the state in fp32. With S the state before a chunk
and A the strictly lower matrix of a_i . b_j, decayed by the rows between them, all its u solve

    (1 - A) U = (a decayed) S + C + A_ak V

by the inverse of 1 - A, which forward substitution finds in registers. REVERSE takes the rows from
the last token to the first. No exponent is positive, as in the kernels of linear_attn.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import (
    _decay_sums,
    _load,
    _load_row,
    _load_state,
    _rows,
    _sequence,
    _store_rows,
    _store_state,
    linear_attn_forward,
)


@triton.jit
def _with_column(A, is_j, x, y_j):
    """A with the products of the rows of x and y_j in column j."""
    return tl.where(is_j, tl.sum(x * y_j[None, :], 1)[:, None], A)


@triton.jit
def _inverse(A, i, C: tl.constexpr):
    """(1 - A)^-1 of a strictly lower matrix, row by row: X_i = e_i + sum_j A_ij X_j."""
    X = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, C):
        A_i = tl.sum(tl.where(i[None, :] == row, tl.trans(A), 0.0), 1)
        X_i = tl.sum(A_i[:, None] * X, 0)
        X += tl.where(i[:, None] == row, X_i[None, :], 0.0)
    return X


@triton.jit
def _sweep_kernel(
    a, b, q, k, v, c, g, gk, state, cu_seqlens, u, o, final_state, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Without q there is no o; without k and v, b u^T is the only write; g or gk."""
    # 1. What this program owns.
    NV: tl.constexpr = (V + BV - 1) // BV
    sequence_head = (tl.program_id(0) // NV).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv = tl.arange(0, BK), (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    lower = i[:, None] > i[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    S += _load_state(state, sequence_head, kk, vv, K, V)

    for first in range(0, length, C):
        # 2. Load the chunk. What is absent is read as what is there, and never used.
        at, by, _later, inside, _g_inside = _rows(first, i, start, length, h, H, REVERSE)
        a_c = _load(a, at, by, inside, kk, K).to(tl.float32)
        b_c = _load(b, at, by, inside, kk, K).to(tl.float32)
        q_c = a_c if q is None else _load(q, at, by, inside, kk, K).to(tl.float32)
        k_c = b_c if k is None else _load(k, at, by, inside, kk, K).to(tl.float32)

        # 3. Products of the rows inside the chunk: read (A, Q) by write (u, v), j before i.
        if gk is None:
            A_u = tl.dot(a_c, tl.trans(b_c), input_precision=PRECISION)
            A_v = tl.dot(a_c, tl.trans(k_c), input_precision=PRECISION)
            Q_u = tl.dot(q_c, tl.trans(b_c), input_precision=PRECISION)
            Q_v = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
            hi, lo, hi_own, lo_own, hi_end, lo_end = _decay_sums(g, at, by, inside)
            hi_start, lo_start = hi - hi_own, lo - lo_own
            gaps = (hi_start[:, None] - hi[None, :]) + (lo_start[:, None] - lo[None, :])
            between = tl.where(lower, tl.exp(tl.where(lower, gaps, 0.0)), 0.0)
            before = tl.exp(hi_start + lo_start)[:, None]
            after = tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
            S_decay = tl.exp(hi_end + lo_end)
            A_u, A_v, Q_u, Q_v = A_u * between, A_v * between, Q_u * between, Q_v * between
        else:
            A_u = tl.zeros([C, C], tl.float32)
            A_v, Q_u, Q_v = A_u, A_u, A_u
            before = tl.zeros([C, BK], tl.float32)
            after = tl.zeros([C, BK], tl.float32)
            end = tl.zeros([BK], tl.float32)
            for step in range(C):
                j = C - 1 - step
                at_j, _by_j, _later_j, in_j, _g_in_j = _rows(
                    first + j, 0, start, length, h, H, REVERSE
                )
                is_j = (i[None, :] == j) & lower
                b_j = _load_row(b, at_j, in_j, kk, K)
                k_j = b_j if k is None else _load_row(k, at_j, in_j, kk, K)
                decay = tl.exp(before)
                A_u = _with_column(A_u, is_j, a_c * decay, b_j)
                A_v = _with_column(A_v, is_j, a_c * decay, k_j)
                Q_u = _with_column(Q_u, is_j, q_c * decay, b_j)
                Q_v = _with_column(Q_v, is_j, q_c * decay, k_j)
                g_j = _load_row(gk, at_j, in_j, kk, K)
                before += tl.where((i > j)[:, None], g_j[None, :], 0.0)
                after += tl.where((i < j)[:, None], g_j[None, :], 0.0)
                end += g_j
            before, after, S_decay = tl.exp(before), tl.exp(after), tl.exp(end)[:, None]
        a_c, q_c, b_c, k_c = a_c * before, q_c * before, b_c * after, k_c * after

        # 4. Solve for u, which reads the state before the chunk and all writes since.
        U = tl.dot(a_c, S, input_precision=PRECISION)
        if c is not None:
            U += _load(c, at, by, inside, vv, V).to(tl.float32)
        if v is not None:
            v_c = _load(v, at, by, inside, vv, V).to(tl.float32)
            U += tl.dot(A_v, v_c, input_precision=PRECISION)
        U = tl.dot(_inverse(A_u, i, C), U, input_precision=PRECISION)
        _store_rows(U, u, at, by, inside, vv, V)

        # 5. Read o in the same way.
        if q is not None:
            O = tl.dot(q_c, S, input_precision=PRECISION)  # noqa: E741
            O += tl.dot(Q_u, U, input_precision=PRECISION)  # noqa: E741
            if v is not None:
                O += tl.dot(Q_v, v_c, input_precision=PRECISION)  # noqa: E741
            _store_rows(O, o, at, by, inside, vv, V)

        # 6. Take the chunk into the state.
        S *= S_decay
        S += tl.dot(tl.trans(b_c), U, input_precision=PRECISION)
        if v is not None:
            S += tl.dot(tl.trans(k_c), v_c, input_precision=PRECISION)

    _store_state(S, final_state, sequence_head, kk, vv, K, V)


def tiles(K: int, V: int, exact: bool) -> dict[str, int]:
    """Block sizes and warps, chosen as in linear_attn; there are up to four [C, K] tiles to hold.

    Left out: parts of K in turn, without which a K of 128 spills some and one of 256 much.
    """
    BK = max(16, triton.next_power_of_2(K))
    BV = 16 if exact else 32
    BV = min(BV, max(16, triton.next_power_of_2(V)))
    return {"BK": BK, "BV": BV, "C": 16, "num_warps": 4 if BK <= 64 else 8, "num_stages": 1}


def dplr_sweep(
    a: Tensor,
    b: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    *,
    exact: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One sweep over time.

    Args:
        a, b: [B, T, H, K], any float dtype, as every tensor up to c.
        q: [B, T, H, K] or None: no o.
        k, v: [B, T, H, K] and [B, T, H, V], or None: one write.
        c: [B, T, H, V] or None.
        g: fp32 natural-log decay, [B, T, H], [B, T, H, K] or None.
        state: [N, H, K, V] fp32.
        cu_seqlens: [N + 1] bounds of packed sequences, from 0 to T, on the device; B is then 1.
        reverse: from the last token of each sequence to the first.
        exact: dots in fp32 rather than tf32.

    Returns:
        u and o [B, T, H, V] and the final state, fp32.
    """
    T, H, K = a.shape[1:]
    N, V = state.shape[0], state.shape[-1]
    a, b, state = a.contiguous(), b.contiguous(), state.contiguous()
    q, k, v, c, g = (x if x is None else x.contiguous() for x in (q, k, v, c, g))
    u = torch.empty(*a.shape[:3], V, dtype=torch.float32, device=a.device)
    o = None if q is None else torch.empty_like(u)
    final_state = torch.empty_like(state)
    g = state.new_zeros(a.shape[:3]) if g is None else g
    decays = (g, None) if g.ndim == 3 else (None, g)
    meta = tiles(K, V, exact)
    launch(
        _sweep_kernel, (N * H * triton.cdiv(V, meta["BV"]),),
        a, b, q, k, v, c, *decays, state, cu_seqlens, u, o, final_state, T, H, K=K, V=V,
        REVERSE=reverse, PRECISION="ieee" if exact else "tf32", **meta,
    )  # fmt: skip
    return u, o, final_state


def dplr_reads(
    queries: list[Tensor],
    writes: list[tuple[Tensor, Tensor]],
    g: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    *,
    exact: bool,
) -> list[Tensor]:
    """S_t x_t of each query x, S the decayed sum of the writes, by the kernels of linear_attn.

    A state is linear in what is written: every pair of query and write is a head of its own.

    Args:
        queries: [B, T, H, V] each.
        writes: [B, T, H, K] and [B, T, H, V] each.
        g, state, cu_seqlens, exact: as in ``dplr_sweep``.
        reverse: run back in time, position t with the decay of t + 1.

    Returns:
        [B, T, H, K] fp32 for each query.
    """
    pairs = list(product(queries, writes))
    x, values, keys = (
        torch.cat(parts, 2)
        for parts in zip(*((query, value, key) for query, (key, value) in pairs), strict=True)
    )
    start = state.mT
    starts = [start, *[torch.zeros_like(start)] * (len(writes) - 1)] * len(queries)
    o, _ = linear_attn_forward(
        x, values, keys, None, None if g is None else torch.cat([g] * len(pairs), 2),
        torch.cat(starts, 1), cu_seqlens, 1.0, reverse, out_dtype=torch.float32, exact=exact,
    )  # fmt: skip
    return [y.sum(2) for y in o.unflatten(2, (len(queries), len(writes), -1)).unbind(2)]
