"""Triton kernels of the dplr sweep: what stands inside chunks at once, then one pass over time.

Forward:                                     Back in time, with REVERSE:

    u_t = S_{t-1}^T a_t + c_t                    D_t = S_{t+1} + k_t v_t^T
    S_t = diag(e^g_t) S_{t-1}                    u_t = D_t^T a_t + c_t        o_t = D_t^T q_t
          + b_t u_t^T + k_t v_t^T                S_t = diag(e^g_t) D_t + b_t u_t^T
    o_t = S_t^T q_t

With S the state before a chunk of C rows, and A the strictly lower matrix of a_i . b_j, decayed by
the rows between them, all u of the chunk solve (1 - A) U = (a decayed) S + C + A_v V. The matrices
of a chunk do not depend on the state:

    X = (1 - A)^-1        XV = X A_v        QU, QV: q_i . b_j and q_i . k_j, decayed

``_inside_kernel`` finds them, one program a (chunk, head), X by forward substitution. Then

    U = X ((a decayed) S + C) + XV V        O = (q decayed) S + QU U + QV V

``_sweep_kernel`` walks the chunks, one program a (sequence, head, block of BV value channels), its
[BK, BV] tile of the state in fp32 registers. No exponent is positive, but where a chunk's decays
are mild: see the kernels of linear_attn.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import PROGRAMS, linear_attn_forward
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    _decay_sums,
    _dot,
    _load,
    _load_row,
    _load_state,
    _rows,
    _sequence,
    _store_rows,
    _store_state,
    dot_of,
)


@triton.jit
def _inverse(A, i, C: tl.constexpr, PRECISION: tl.constexpr):
    """(1 - A)^-1 of a strictly lower matrix.

    First of its 8 x 8 blocks on the diagonal, all at once, row by row: X_i = e_i + sum_j A_ij X_j.
    Then of blocks twice as large, from A below the diagonal in each: X + X A X.
    """
    row, col = i[:, None], i[None, :]
    X = tl.where(row == col, 1.0, 0.0)
    inside = tl.trans(tl.where(row // 8 == col // 8, A, 0.0))
    for r in range(1, 8):
        A_r = tl.sum(tl.where(col % 8 == r, inside, 0.0), 1)  # of row r of every block
        X_r = tl.sum(A_r[:, None] * X, 0)
        X += tl.where((row % 8 == r) & (row // 8 == col // 8), X_r[None, :], 0.0)
    size = 8
    while size < C:
        joins = (row // (2 * size) == col // (2 * size)) & (row // size > col // size)
        below = tl.dot(tl.where(joins, A, 0.0), X, input_precision=PRECISION)
        X += tl.dot(X, below, input_precision=PRECISION)
        size *= 2
    return X


@triton.jit
def _decayed(x, exponent):
    return x.to(tl.float32) * tl.exp(exponent)


@triton.jit
def _with_column(A, is_j, x, y_j):
    """A with the products of the rows of x and y_j in column j."""
    return tl.where(is_j, tl.sum(x * y_j[None, :], 1)[:, None], A)


@triton.jit
def _columns(
    a_c, b, q_c, k, gk, first, start, length, h, H, i, kk,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A, A_v, QU and QV of a chunk with any decay, from the last column to the first.

    reach is the decay from after column j to before row i, of what was written after its decay and
    is read before it; through also has row i, or with REVERSE column j.
    """
    A = tl.zeros([C, C], tl.float32)
    A_v, QU, QV = A, A, A
    reach = tl.zeros([C, BK], tl.float32)
    through = tl.zeros([C, BK], tl.float32)
    for step in range(C):
        j = C - 1 - step
        at, _by, _later, inside, _ = _rows(first + j, 0, start, length, h, H, REVERSE)
        below, from_j = (i[None, :] == j) & (i > j)[:, None], (i[None, :] == j) & (i >= j)[:, None]
        b_j, g_j = _load_row(b, at, inside, kk, K), _load_row(gk, at, inside, kk, K)
        k_j = b_j if k is None else _load_row(k, at, inside, kk, K)
        a_j, q_j = a_c * tl.exp(reach), q_c * tl.exp(reach)
        A = _with_column(A, below, a_j, b_j)
        if REVERSE:
            QU = _with_column(QU, below, q_j, b_j)
            reach += tl.where((i > j)[:, None], g_j[None, :], 0.0)
            A_v = _with_column(A_v, from_j, a_c * tl.exp(reach), k_j)
            QV = _with_column(QV, from_j, q_c * tl.exp(reach), k_j)
        else:
            A_v = _with_column(A_v, below, a_j, k_j)
            q_j = q_c * tl.exp(through)
            QU = _with_column(QU, from_j, q_j, b_j)
            QV = _with_column(QV, from_j, q_j, k_j)
            reach += tl.where((i > j)[:, None], g_j[None, :], 0.0)
            through += tl.where((i >= j)[:, None], g_j[None, :], 0.0)
    return A, A_v, QU, QV


@triton.jit
def _inside_kernel(
    a, b, q, k, g, gk, cu_seqlens, sequences, places, X, XV, QU, QV, T, H, N, CHUNKS,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The matrices of one chunk; without q no QU and QV, without k no XV and QV."""
    # 1. What this program owns.
    h, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    n, place = chunk // CHUNKS, chunk % CHUNKS
    if cu_seqlens is not None:
        n, place = tl.load(sequences + chunk), tl.load(places + chunk)
        if n >= N:
            return
    start, length = _sequence(cu_seqlens, n, T)
    first = place * C
    i, kk = tl.arange(0, C), tl.arange(0, BK)
    below, up_to = i[:, None] > i[None, :], i[:, None] >= i[None, :]

    # 2. Load it. What is absent is read as what is there, and never used.
    at, by, _later, inside, _ = _rows(first, i, start, length, h, H, REVERSE)
    a_c, b_c = _load(a, at, by, inside, kk, K), _load(b, at, by, inside, kk, K)
    q_c = a_c if q is None else _load(q, at, by, inside, kk, K)
    k_c = b_c if k is None else _load(k, at, by, inside, kk, K)

    # 3. Products of its rows: read by write.
    if gk is None:
        A = _dot(a_c, tl.trans(b_c), DOT, PRECISION)
        A_v, QU_c, QV_c = A, A, A
        if k is not None:
            A_v = _dot(a_c, tl.trans(k_c), DOT, PRECISION)
            QV_c = _dot(q_c, tl.trans(k_c), DOT, PRECISION)
        if q is not None:
            QU_c = _dot(q_c, tl.trans(b_c), DOT, PRECISION)
        hi, lo, hi_own, lo_own, _, _ = _decay_sums(g, at, by, inside)
        hi_s, lo_s = hi - hi_own, lo - lo_own
        reach = (hi_s[:, None] - hi[None, :]) + (lo_s[:, None] - lo[None, :])
        reach = tl.exp(tl.where(below, reach, 0.0))
        if REVERSE:
            through = (hi_s[:, None] - hi_s[None, :]) + (lo_s[:, None] - lo_s[None, :])
            through = tl.exp(tl.where(up_to, through, 0.0))
            A, QU_c, A_v, QV_c = A * reach, QU_c * reach, A_v * through, QV_c * through
        else:
            through = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
            through = tl.exp(tl.where(up_to, through, 0.0))
            A, QU_c, A_v, QV_c = A * reach, QU_c * through, A_v * reach, QV_c * through
    else:
        gk_c = _load(gk, at, by, inside, kk, K)
        if tl.min(tl.sum(gk_c, 0), 0) > -LIMIT:
            sums = tl.cumsum(gk_c, 0)
            early = sums - gk_c
            a_in, b_in = _decayed(a_c, early), _decayed(b_c, -sums)
            q_in, k_in = _decayed(q_c, sums), _decayed(k_c, -sums)
            if REVERSE:
                q_in, k_in = _decayed(q_c, early), _decayed(k_c, -early)
            A = _dot(a_in, tl.trans(b_in), DOT, PRECISION)
            A_v, QU_c, QV_c = A, A, A
            if k is not None:
                A_v = _dot(a_in, tl.trans(k_in), DOT, PRECISION)
                QV_c = _dot(q_in, tl.trans(k_in), DOT, PRECISION)
            if q is not None:
                QU_c = _dot(q_in, tl.trans(b_in), DOT, PRECISION)
        else:
            A, A_v, QU_c, QV_c = _columns(
                a_c.to(tl.float32), b, q_c.to(tl.float32), k, gk, first, start, length, h, H, i, kk,
                K, BK, C, REVERSE,
            )  # fmt: skip
    if REVERSE:
        QU_c, A_v = tl.where(below, QU_c, 0.0), tl.where(up_to, A_v, 0.0)
    else:
        QU_c, A_v = tl.where(up_to, QU_c, 0.0), tl.where(below, A_v, 0.0)

    # 4. Solve and store.
    X_c = _inverse(tl.where(below, A, 0.0), i, C, PRECISION)
    _store_rows(X_c, X, at, by, inside, i, C)
    if XV is not None:
        XV_c = tl.dot(X_c, A_v, input_precision=PRECISION)
        _store_rows(XV_c, XV, at, by, inside, i, C)
    if QU is not None:
        _store_rows(QU_c, QU, at, by, inside, i, C)
    if QV is not None:
        _store_rows(tl.where(up_to, QV_c, 0.0), QV, at, by, inside, i, C)


@triton.jit
def _sweep_kernel(
    a, b, q, k, v, c, g, gk, X, XV, QU, QV, state, cu_seqlens, u, o, final_state, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Without q there is no o; without k and v, b u^T is the only write; g or gk."""
    # 1. What this program owns.
    NV: tl.constexpr = (V + BV - 1) // BV
    sequence_head = (tl.program_id(0) // NV).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv = tl.arange(0, BK), (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    S += _load_state(state, sequence_head, kk, vv, K, V)

    for first in range(0, length, C):
        # 2. The decays to each row from the chunk's start, and from each row to its end.
        at, by, _later, inside, _ = _rows(first, i, start, length, h, H, REVERSE)
        if gk is None:
            hi, lo, hi_own, lo_own, hi_end, lo_end = _decay_sums(g, at, by, inside)
            early = ((hi - hi_own) + (lo - lo_own))[:, None]
            late = (hi + lo)[:, None]
            rest = ((hi_end - hi) + (lo_end - lo))[:, None]
            rest_early = ((hi_end - (hi - hi_own)) + (lo_end - (lo - lo_own)))[:, None]
            end = hi_end + lo_end
        else:
            gk_c = tl.maximum(_load(gk, at, by, inside, kk, K), -128.0)  # e^-128 is 0 in fp32
            late, rest_early = tl.cumsum(gk_c, 0), tl.cumsum(gk_c, 0, reverse=True)
            early, rest = late - gk_c, rest_early - gk_c
            end = tl.sum(gk_c, 0)[:, None]

        # 3. Solve for u, which reads the state before the chunk and all writes since.
        a_c = _decayed(_load(a, at, by, inside, kk, K), early)
        U = _dot(a_c, S, DOT, PRECISION)
        if c is not None:
            U += _load(c, at, by, inside, vv, V)
        U = _dot(_load(X, at, by, inside, i, C), U, DOT, PRECISION)
        if v is not None:
            v_c = _load(v, at, by, inside, vv, V)
            U += _dot(_load(XV, at, by, inside, i, C), v_c, DOT, PRECISION)
        _store_rows(U, u, at, by, inside, vv, V)

        # 4. Read o in the same way.
        if q is not None:
            q_c = _decayed(_load(q, at, by, inside, kk, K), early if REVERSE else late)
            O = _dot(q_c, S, DOT, PRECISION)  # noqa: E741
            O += _dot(_load(QU, at, by, inside, i, C), U, DOT, PRECISION)  # noqa: E741
            if v is not None:
                O += _dot(_load(QV, at, by, inside, i, C), v_c, DOT, PRECISION)  # noqa: E741
            _store_rows(scale * O, o, at, by, inside, vv, V)

        # 5. Take the chunk into the state.
        b_c = _decayed(_load(b, at, by, inside, kk, K), rest)
        S = S * tl.exp(end) + _dot(tl.trans(b_c), U, DOT, PRECISION)
        if v is not None:
            k_c = _decayed(_load(k, at, by, inside, kk, K), rest_early if REVERSE else rest)
            S += _dot(tl.trans(k_c), v_c, DOT, PRECISION)

    _store_state(S, final_state, sequence_head, kk, vv, K, V)


def tiles(K: int, V: int, dot: str, programs: Any) -> dict[str, int]:
    """Block sizes and warps, chosen as in linear_attn; dots as there.

    Args:
        programs: (sequence, head) pairs: where they are few, narrow blocks of V keep a GPU busy.
    """
    BK, BV = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(V))
    if dot == "ieee":
        widest, C = 16, 16
    else:
        widest, C = (64, 32) if BK <= 128 else (32, 16)
        if isinstance(programs, int) and 2 * programs * triton.cdiv(V, widest) <= PROGRAMS:
            widest = 16
    warps = 4 if (64 if dot == "ieee" else 128) >= BK else 8
    stages = 1 if dot == "ieee" else 2
    return {
        "BK": BK, "BV": min(BV, widest), "C": C, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _places(cu_seqlens: Tensor, time: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Of each chunk of a pack, its sequence and its place in it; the former is N for none."""
    counts = -(cu_seqlens.diff() // -chunk)
    ends = counts.cumsum(0)
    chunks = torch.arange(time // chunk + counts.shape[0], device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, chunks, right=True)
    return sequence, chunks - (ends - counts)[sequence.clamp(max=counts.shape[0] - 1)]


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
    scale: float,
    reverse: bool,
    *,
    dtype: torch.dtype,
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
        scale: factor of o.
        reverse: from the last token of each sequence to the first.
        dtype: of u, o and the factors of dots.

    Returns:
        u and o [B, T, H, V], and the final state in fp32.
    """
    B, T, H, K = a.shape
    N, V = state.shape[0], state.shape[-1]
    a, b, state = a.contiguous(), b.contiguous(), state.contiguous()
    q, k, v, c, g = (x if x is None else x.contiguous() for x in (q, k, v, c, g))
    u = b.new_empty(B, T, H, V, dtype=dtype)
    o = None if q is None else torch.empty_like(u)
    final_state = torch.empty_like(state)
    g = state.new_zeros(B, T, H) if g is None else g
    decays = (g, None) if g.ndim == 3 else (None, g)

    dot = dot_of(dtype)
    meta = {"K": K, "REVERSE": reverse, **tiles(K, V, dot, N * H), **DOTS[dot]}
    C, BV = meta["C"], meta.pop("BV")

    def matrices(wanted: bool) -> Tensor | None:
        kept = torch.bfloat16 if dot == "bf16" else torch.float32
        return b.new_empty(B, T, H, C, dtype=kept) if wanted else None

    has_q, has_k = q is not None, k is not None
    inside = [matrices(x) for x in (True, has_k, has_q, has_q and has_k)]
    chunks = -(-T // C)
    sequences, places = (None, None) if cu_seqlens is None else _places(cu_seqlens, T, C)
    total = N * chunks if sequences is None else sequences.shape[0]
    launch(
        _inside_kernel, (total * H,), a, b, q, k, *decays, cu_seqlens, sequences, places, *inside,
        T, H, N, chunks, LIMIT=LIMITS[dot], **meta,
    )  # fmt: skip
    launch(
        _sweep_kernel, (N * H * triton.cdiv(V, BV),), a, b, q, k, v, c, *decays, *inside, state,
        cu_seqlens, u, o, final_state, scale, T, H, V=V, BV=BV, **meta,
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
    dtype: torch.dtype,
) -> list[Tensor]:
    """S_t x_t of each query x, S the decayed sum of the writes, by the kernels of linear_attn.

    A state is linear in what is written, so each write is a run of its own.

    Args:
        queries: [B, T, H, V] each.
        writes: [B, T, H, K] and [B, T, H, V] each.
        g, state, cu_seqlens: as in ``dplr_sweep``.
        dtype: of the factors of dots.
        reverse: run back in time, position t with the decay of t + 1.

    Returns:
        [B, T, H, K] fp32 for each query.
    """
    start = state.mT.contiguous()

    def read(x: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
        return linear_attn_forward(
            x, value, key, None, g, first, cu_seqlens, 1.0, reverse, out_dtype=torch.float32,
            dot=dot_of(dtype),
        )[0]  # fmt: skip

    found = []
    for x in queries:
        o = read(x, *writes[0], start)
        for write in writes[1:]:
            o += read(x, *write, None)
        found.append(o)
    return found
