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

``dplr_inside`` finds them, of all chunks at once. Then

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

from flacompile.ops.kernels.dplr_inside import _decayed, _inside_kernel
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import PROGRAMS, linear_attn_forward
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    _decay_sums,
    _dot,
    _load,
    _load_state,
    _rows,
    _sequence,
    _store_rows,
    _store_state,
    dot_of,
    dot_of_sums,
)


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
        C = 16 if dot == "tf32" else C  # twice the bytes of a shared memory of 99 KiB
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
        dtype: of the factors of dots; without g, else see ``dot_of_sums``.
        reverse: run back in time, position t with the decay of t + 1.

    Returns:
        [B, T, H, K] fp32 for each query.
    """
    start = state.mT.contiguous()
    dot = dot_of(dtype) if g is None else dot_of_sums(dot_of(dtype))

    def read(x: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> Tensor:
        return linear_attn_forward(
            x, value, key, None, g, first, cu_seqlens, 1.0, reverse, out_dtype=torch.float32,
            dot=dot,
        )[0]  # fmt: skip

    found = []
    for x in queries:
        o = read(x, *writes[0], start)
        for write in writes[1:]:
            o += read(x, *write, None)
        found.append(o)
    return found
