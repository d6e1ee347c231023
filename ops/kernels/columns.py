"""What stands inside a chunk under decays: e^{b_i - b_j} of rows i and earlier rows j.

b_i is the sum of the log decays of the chunk's first i rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flacompile.ops.kernels.states import _place, _rows_of
from flacompile.ops.kernels.tiles import _load_row


@triton.jit
def _between(hi, lo, i):
    """e^{b_i - b_j} of rows i >= j, else 0."""
    lower = i[:, None] >= i[None, :]
    between = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
    return tl.where(lower, tl.exp(tl.where(lower, between, 0.0)), 0.0)


@triton.jit
def _block_of(
    cu_seqlens, sequences, places, T, H, N, CHUNKS,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Chunk and head of a program, its block of key channels, and whether there is such a chunk."""
    NK: tl.constexpr = (K + BK - 1) // BK
    block, owner = tl.program_id(0) % NK, tl.program_id(0) // NK
    h, chunk = owner % H, (owner // H).to(tl.int64)
    n, place = _place(cu_seqlens, sequences, places, chunk, CHUNKS)
    first, length, i, at, by, inside = _rows_of(cu_seqlens, tl.minimum(n, N - 1), place, h, T, H, C)
    kk = block * BK + tl.arange(0, BK)
    return block, chunk * H + h, n < N, first, length, i, at, by, inside, kk


@triton.jit
def _passes_over(
    total, index, there, kk, K: tl.constexpr, LIMIT: tl.constexpr, STRONG: tl.constexpr
):
    """Whether a chunk is not there, or not of the kind a launch is for.

    A chunk is strong where some channel decays too fast to be factored. Column by column takes
    registers that the other chunks need, so that a kernel is launched for either kind.
    """
    passes = there == 0
    if total is not None:
        given = tl.load(total + index * K + kk, mask=there & (kk < K), other=0.0)
        passes = passes | ((tl.min(given, 0) <= -LIMIT) != STRONG)
    return passes


@triton.jit
def _columns(
    q_c, k_c, A, k, gk, at, first, length, i, kk, H,
    K: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """What stands inside a chunk with any decay, column by column: P, and dq and dk from A.

    From the last column j to the first, reach is the decay of the rows after j up to each row; with
    EARLY up to the row before, and a row does not meet itself.
    """
    q_c, k_c = q_c.to(tl.float32), k_c.to(tl.float32)
    P = tl.zeros([C, C], tl.float32)
    dq, dk, reach = q_c * 0.0, k_c * 0.0, q_c * 0.0
    for step in range(C):
        j = C - 1 - step
        inside = first + j < length
        k_j = _load_row(k, at + j * H, inside, kk, K)[None, :]
        meets = ((i > j) if EARLY else (i >= j))[:, None]
        q_in = tl.where(meets, q_c * tl.exp(reach), 0.0)
        P = tl.where(i[None, :] == j, tl.sum(q_in * k_j, 1)[:, None], P)
        if A is not None:
            A_j = tl.sum(tl.where(i[None, :] == j, A, 0.0), 1)[:, None]
            dq += tl.where(meets, A_j * tl.exp(reach) * k_j, 0.0)
            dk = tl.where((i == j)[:, None], tl.sum(A_j * q_in, 0)[None, :], dk)
        g_j = tl.maximum(_load_row(gk, at + j * H, inside, kk, K), -128.0)
        reach += tl.where(meets, g_j[None, :], 0.0)
    return P, dq, dk
