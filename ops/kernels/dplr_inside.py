"""Triton kernel of the dplr sweep's matrices of one chunk, which do not depend on the state.

With A the strictly lower matrix of a_i . b_j, decayed by the rows between them,

    X = (1 - A)^-1        XV = X A_v        QU, QV: q_i . b_j and q_i . k_j, decayed

What reads and writes when: see ``dplr``. One program a (chunk, head).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flacompile.ops.kernels.tiles import (
    _decay_sums,
    _dot,
    _load,
    _load_row,
    _rows,
    _sequence,
    _store_rows,
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
