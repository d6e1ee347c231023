"""Triton kernels of `linear_attn`: one pass over time with the state in registers.

S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t v_t^T,   o_t = scale * q_t S_t

Grid: one program a (sequence, head, block of BV value channels), the value blocks of a head next
to each other so that they share q and k in cache. A program walks its sequence in chunks of C rows
and holds its [BK, BV] tile of the state in fp32, so that every byte is moved once. Row p of a
sequence is token p, or with REVERSE token (length - 1 - p) with the decay of the token after it:
the same program then runs time backwards, which makes the backward three calls of it.

Every exponent is <= 0, so no decay overflows, and no exponent is a difference of rounded large
numbers, so a strong decay does not blur the weak ones after it.

Left out: splitting one long sequence over several programs, for few (sequence, head) pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch


@triton.jit
def _sequence(cu_seqlens, n, T):
    """First token and number of tokens of sequence n."""
    if cu_seqlens is None:
        start = n.to(tl.int64) * T
        length = start * 0 + T
    else:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - start
    return start, length


@triton.jit
def _rows(p, start, length, h, H, REVERSE: tl.constexpr):
    """Row p of the sequence: its index in [B * T * H], that of its decay, and their masks."""
    inside = p < length
    if REVERSE:
        row = (start + length - 1 - p) * H + h
        return row, row + H, inside, inside & (p > 0)
    else:
        row = (start + p) * H + h
        return row, row, inside, inside


@triton.jit
def _tile(pointer, row, inside, col, WIDTH: tl.constexpr):
    """Rows of a [*, WIDTH] tensor in fp32, zero outside; bf16 arithmetic starts nowhere."""
    mask = inside[:, None] & (col < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * WIDTH + col[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _decay_row(scalar, diagonal, row, inside, col, WIDTH: tl.constexpr):
    """Log decay of one row for every channel: the diagonal one plus the scalar one, if any."""
    g = tl.load(diagonal + row * WIDTH + col, mask=inside & (col < WIDTH), other=0.0)
    if scalar is not None:
        g += tl.load(scalar + row, mask=inside, other=0.0)
    return g


@triton.jit
def _decay_sums(g, row, inside):
    """Running sums of the log decays of a chunk, each row's own, and the sums of all: hi and lo.

    g = hi + lo with hi a multiple of 2^-10: sums of up to 128 hi are exact, so a difference of sums
    is as good as the sum between. e^-128 is 0 in fp32 already.
    """
    g_c = tl.load(g + row, mask=inside, other=0.0)
    g_c = tl.where(g_c < -128.0, -128.0, g_c)
    hi = tl.floor(g_c * 1024.0) * (1.0 / 1024.0)
    lo = g_c - hi
    return tl.cumsum(hi, 0), tl.cumsum(lo, 0), hi, lo, tl.sum(hi, 0), tl.sum(lo, 0)


@triton.jit
def _load_state(state, sequence_head, kk, vv, K: tl.constexpr, V: tl.constexpr):
    offsets = sequence_head * K * V + kk[:, None] * V + vv[None, :]
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    return tl.load(state + offsets, mask=mask, other=0.0)


@triton.jit
def _store_state(S, state, sequence_head, kk, vv, K: tl.constexpr, V: tl.constexpr):
    offsets = sequence_head * K * V + kk[:, None] * V + vv[None, :]
    tl.store(state + offsets, S, mask=(kk < K)[:, None] & (vv < V)[None, :])


@triton.jit
def _scalar_kernel(
    q, k, v, g, state, cu_seqlens, o, final_state, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """No decay (g None) or one decay a token and head: it factors out of every dot product."""
    # 1. What this program owns.
    NV: tl.constexpr = (V + BV - 1) // BV
    sequence_head = (tl.program_id(0) // NV).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv = tl.arange(0, BK), (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, sequence_head, kk, vv, K, V)

    for first in range(0, length, C):
        # 2. Load the chunk.
        row, g_row, inside, g_inside = _rows(first + i, start, length, h, H, REVERSE)
        q_c = _tile(q, row, inside, kk, K)
        k_c = _tile(k, row, inside, kk, K)
        v_c = _tile(v, row, inside, vv, V)

        # 3. Scores inside the chunk, and the read of the state before it.
        A = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
        A = tl.where(i[:, None] >= i[None, :], A, 0.0)
        o_c = tl.dot(q_c, S, input_precision=PRECISION)

        # 4. Decay.
        if g is not None:
            hi, lo, _, _, hi_end, lo_end = _decay_sums(g, g_row, g_inside)
            between = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
            A *= tl.exp(tl.where(i[:, None] >= i[None, :], between, 0.0))
            o_c *= tl.exp(hi + lo)[:, None]
            S *= tl.exp(hi_end + lo_end)

        # 5. Write the output, then take the chunk into the state.
        o_c = scale * (o_c + tl.dot(A, v_c, input_precision=PRECISION))
        o_mask = inside[:, None] & (vv < V)[None, :]
        tl.store(o + row[:, None] * V + vv[None, :], o_c.to(o.dtype.element_ty), mask=o_mask)
        if g is not None:
            v_c *= tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
        S += tl.dot(tl.trans(k_c), v_c, input_precision=PRECISION)

    _store_state(S, final_state, sequence_head, kk, vv, K, V)


@triton.jit
def _diagonal_kernel(
    q, k, v, g, gk, gv, state, cu_seqlens, o, final_state, scale, T, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A decay a channel of k, of v, or of both; a scalar one, g, is added to one of them.

    Inside a chunk the decay between rows i and j stands inside the dot product. Taking the columns
    j from the last to the first, it is a running sum, `before`, which ends as the decay from the
    chunk's start; `after` is its mirror image, the decay from a row to the chunk's end.
    """
    # 1. What this program owns.
    NV: tl.constexpr = (V + BV - 1) // BV
    sequence_head = (tl.program_id(0) // NV).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv = tl.arange(0, BK), (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, sequence_head, kk, vv, K, V)

    for first in range(0, length, C):
        # 2. Load the chunk.
        row, _, inside, _ = _rows(first + i, start, length, h, H, REVERSE)
        q_c = _tile(q, row, inside, kk, K)
        k_c = _tile(k, row, inside, kk, K)
        v_c = _tile(v, row, inside, vv, V)

        # 3. Inside the chunk, column by column: A_ij = sum_k q_ik k_jk e^(gk_{j+1} + .. + gk_i).
        o_c = tl.zeros([C, BV], tl.float32)
        if gk is None:
            A = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
        else:
            A = tl.zeros([C, C], tl.float32)
            before_k = tl.zeros([C, BK], tl.float32)
            after_k = tl.zeros([C, BK], tl.float32)
            end_k = tl.zeros([BK], tl.float32)
        if gv is not None:
            before_v = tl.zeros([C, BV], tl.float32)
            after_v = tl.zeros([C, BV], tl.float32)
            end_v = tl.zeros([BV], tl.float32)
        for step in range(C):
            j = C - 1 - step
            row_j, g_row_j, in_j, g_in_j = _rows(first + j, start, length, h, H, REVERSE)
            if gk is not None:
                k_j = tl.load(k + row_j * K + kk, mask=in_j & (kk < K), other=0.0).to(tl.float32)
                A_j = tl.sum(q_c * tl.exp(before_k) * k_j[None, :], 1)
                g_j = _decay_row(g, gk, g_row_j, g_in_j, kk, K)
                before_k += tl.where((i >= j)[:, None], g_j[None, :], 0.0)
                after_k += tl.where((i < j)[:, None], g_j[None, :], 0.0)
                end_k += g_j
            else:
                A_j = tl.sum(tl.where(i[None, :] == j, A, 0.0), 1)
            if gv is None:
                A = tl.where(i[None, :] == j, A_j[:, None], A)
            else:
                v_j = tl.load(v + row_j * V + vv, mask=in_j & (vv < V), other=0.0).to(tl.float32)
                A_j = tl.where(i >= j, A_j, 0.0)
                o_c += A_j[:, None] * tl.exp(before_v) * v_j[None, :]
                # The scalar decay was added to gk where there is one.
                g_v = _decay_row(g if gk is None else None, gv, g_row_j, g_in_j, vv, V)
                before_v += tl.where((i >= j)[:, None], g_v[None, :], 0.0)
                after_v += tl.where((i < j)[:, None], g_v[None, :], 0.0)
                end_v += g_v

        # 4. Read the state before the chunk, decayed to each row.
        if gk is not None:
            q_c *= tl.exp(before_k)
        from_state = tl.dot(q_c, S, input_precision=PRECISION)
        if gv is None:
            A = tl.where(i[:, None] >= i[None, :], A, 0.0)
            o_c = from_state + tl.dot(A, v_c, input_precision=PRECISION)
        else:
            o_c += from_state * tl.exp(before_v)
        o_mask = inside[:, None] & (vv < V)[None, :]
        o_c = (scale * o_c).to(o.dtype.element_ty)
        tl.store(o + row[:, None] * V + vv[None, :], o_c, mask=o_mask)

        # 5. Take the chunk into the state, both decayed to the chunk's end.
        if gk is not None:
            k_c *= tl.exp(after_k)
            S *= tl.exp(end_k)[:, None]
        if gv is not None:
            v_c *= tl.exp(after_v)
            S *= tl.exp(end_v)[None, :]
        S += tl.dot(tl.trans(k_c), v_c, input_precision=PRECISION)

    _store_state(S, final_state, sequence_head, kk, vv, K, V)


def tiles(K: int, V: int, diagonal: bool, exact: bool) -> dict[str, int]:
    """Block sizes and warps, so that a thread's registers hold its share of the work.

    Chosen from the register and spill counts of binaries for sm_80 and sm_90, which
    tests/compile_kernels.py prints. Exact fp32 dots run without tensor cores and keep their
    operands in registers too, hence the smaller tiles; there a K above 128 still spills.
    """
    BK = max(16, triton.next_power_of_2(K))
    if exact:
        BV, C = 32 if BK <= 64 else 16, 16
    else:
        BV, C = 64 if BK <= 128 else 32, 16 if diagonal or BK > 128 else 32
    BV = min(BV, max(16, triton.next_power_of_2(V)))
    return {"BK": BK, "BV": BV, "C": C, "num_warps": 4 if BK <= 64 else 8, "num_stages": 1}


def linear_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    *,
    out_dtype: torch.dtype | None = None,
    exact: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel the decays call for.

    Args:
        q, k: [B, T, H, K], k and v in q's or any other float dtype.
        v: [B, T, H, V].
        gk: fp32 natural-log decay, [B, T, H] or [B, T, H, K].
        gv: fp32 natural-log decay, [B, T, H] or [B, T, H, V].
        state: [N, H, K, V] fp32; default zero.
        cu_seqlens: [N + 1] bounds of packed sequences, from 0 to T, on the device; B is then 1.
        scale: factor of the output.
        reverse: run time backwards inside each sequence, position t with the decay of t + 1.
        out_dtype: dtype of o; default v's.
        exact: dots in fp32 rather than tf32; default where an input is fp32.

    Returns:
        o [B, T, H, V] and the state after the last row taken [N, H, K, V] fp32.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    scalars = [g for g in (gk, gv) if g is not None and g.ndim == 3]
    g = sum(scalars[1:], scalars[0]).contiguous() if scalars else None
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gk, gv = (None if d is None or d.ndim == 3 else d.contiguous() for d in (gk, gv))
    state = None if state is None else state.contiguous()
    o = torch.empty_like(v, dtype=out_dtype)
    final_state = torch.empty(N, H, K, V, dtype=torch.float32, device=v.device)

    diagonal = gk is not None or gv is not None
    exact = torch.float32 in (q.dtype, k.dtype, v.dtype) if exact is None else exact
    meta = tiles(K, V, diagonal, exact)
    grid = (N * H * triton.cdiv(V, meta["BV"]),)
    decays = (g, gk, gv) if diagonal else (g,)
    launch(
        _diagonal_kernel if diagonal else _scalar_kernel, grid,
        q, k, v, *decays, state, cu_seqlens, o, final_state, scale, T, H, K=K, V=V,
        REVERSE=reverse, PRECISION="ieee" if exact else "tf32", **meta,
    )  # fmt: skip
    return o, final_state
