"""Triton kernels of `linear_attn`: one pass over time with the state in registers.

S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t v_t^T,   o_t = scale * q_t S_t

Grid: one program a (sequence, segment, head, block of BV value channels), the value blocks of a
head next to each other so that they share q and k in cache, as SHARE heads in a row do. A program
walks its rows in chunks of C and holds its [BK, BV] tile of the state in fp32, so that every byte
is moved once. Row p of a sequence is token p, or with REVERSE token (length - 1 - p) with the decay
of the token after it: the same program then runs time backwards, which makes the backward three
calls of it.

A decay a channel has a kernel of its own, in ``diagonal``.

Few sequences and heads do not fill a GPU: there a sequence is cut into segments. A first pass finds
what each adds to the state, ``_join_kernel`` turns that into the state before each, and all of them
run at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.diagonal import _diagonal_kernel
from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.tiles import (
    DOTS,
    LIMITS,
    NARROWEST,
    _dot,
    _load,
    _load_state,
    _owned,
    _rows,
    _sequence,
    _store_end,
    _store_rows,
    _store_state,
    _sums_of,
    dot_of,
    dot_of_sums,
)

PROGRAMS = 264  # fill the largest GPUs, two on each multiprocessor
SHORTEST = 512  # rows of a segment; in a shorter one a second read of k and v does not pay


@triton.jit
def _decays_of(g, first, i, start, length, h, H, REVERSE: tl.constexpr):
    """Log decays of rows first + i, 0 where there is none."""
    at, by, later, _, inside = _rows(first, i, start, length, h, H, REVERSE)
    return tl.load(g + at + later + by, mask=inside, other=0.0)


@triton.jit
def _scalar_kernel(
    q, k, v, g, state, cu_seqlens, o, ends, final_state, total, scale, T, H, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, SHARE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """No decay (g None) or one decay a token and head: it factors out of every dot product.

    Without q and o only the state is found; total takes the segment's log decay.
    """
    scale = tl.cast(scale, tl.float32)  # compilers pass fp64
    # 1. What this program owns.
    if ends is not None and SEGMENTS == 1:
        return  # a first pass over the only segment: nobody reads it
    n, segment, h, block, state_index = _owned(SEGMENTS, H, (V + BV - 1) // BV)
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, state_index, kk, vv, K, V)
    sum_g = 0.0

    begin = segment * SEGMENT
    if g is not None:
        g_next = _decays_of(g, begin, i, start, length, h, H, REVERSE)
    for first in range(begin, tl.minimum(begin + SEGMENT, length), C):
        # 2. Load the chunk. Its decays, which are no factor of a dot, were loaded a chunk before.
        at, by, _later, inside, _ = _rows(first, i, start, length, h, H, REVERSE)
        k_c = _load(k, at // SHARE, by // SHARE, inside, kk, K)
        v_c = _load(v, at, by, inside, vv, V)
        if g is not None:
            hi, lo, _, _, hi_end, lo_end = _sums_of(g_next)
            g_next = _decays_of(g, first + C, i, start, length, h, H, REVERSE)
            sum_g += hi_end + lo_end

        if o is not None:
            # 3. Scores inside the chunk, and the read of the state before it; both decayed.
            q_c = _load(q, at // SHARE, by // SHARE, inside, kk, K)
            A = _dot(q_c, tl.trans(k_c), DOT, PRECISION)
            lower = i[:, None] >= i[None, :]
            if g is not None:
                between = (hi[:, None] - hi[None, :]) + (lo[:, None] - lo[None, :])
                A *= tl.exp(tl.where(lower, between, 0.0))
            A = tl.where(lower, A, 0.0).to(DOT)
            o_c = _dot(q_c, S, DOT, PRECISION)
            if g is not None:
                o_c *= tl.exp(hi + lo)[:, None]
            o_c += _dot(A, v_c, DOT, PRECISION)
            _store_rows(scale * o_c, o, at, by, inside, vv, V)

        # 4. Take the chunk into the state.
        if g is not None:
            S *= tl.exp(hi_end + lo_end)
            v_c = v_c.to(tl.float32) * tl.exp((hi_end - hi) + (lo_end - lo))[:, None]
        S += _dot(tl.trans(k_c), v_c, DOT, PRECISION)

    _store_end(S, ends, final_state, n, segment, SEGMENTS, h, H, kk, vv, K, V)
    if total is not None:
        tl.store(total + state_index, sum_g)


@triton.jit
def _join_kernel(
    ends, total, total_k, total_v, state, H, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What each segment adds becomes the state before it, in place.

    Grid: one program a (sequence, head, block of BK key channels).
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    sequence_head = (tl.program_id(0) // NK).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    kk, vv = (tl.program_id(0) % NK) * BK + tl.arange(0, BK), tl.arange(0, BV)
    S = tl.zeros([BK, BV], tl.float32)
    if state is not None:
        S += _load_state(state, sequence_head, kk, vv, K, V)
    for segment in range(SEGMENTS):
        index = (n * SEGMENTS + segment) * H + h
        added = _load_state(ends, index, kk, vv, K, V)
        _store_state(S, ends, index, kk, vv, K, V)
        if total is not None:
            S *= tl.exp(tl.load(total + index))
        if total_k is not None:
            S *= tl.exp(tl.load(total_k + index * K + kk, mask=kk < K, other=0.0))[:, None]
        if total_v is not None:
            S *= tl.exp(tl.load(total_v + index * V + vv, mask=vv < V, other=0.0))[None, :]
        S += added


def tiles(K: int, V: int, diagonals: int, dot: str, hopper: bool) -> dict[str, int]:
    """Block sizes and warps, so that a thread's registers hold its share of the work.

    Chosen from times on an H200 and from the register and spill counts of binaries for sm_80 and
    sm_90, which tests/compile_kernels.py prints. Exact fp32 dots run without tensor cores and keep
    their operands in registers too, hence the smaller tiles; there a K above 128 still spills. The
    loads of diagonal decays stand beside a branch, where Triton 3.6's pipeline gives wrong values,
    and so do their tensor-core dots with eight warps.

    Args:
        diagonals: how many of gk and gv are diagonal.
        dot: what the factors of a dot are, "bf16", "tf32" or "ieee".
        hopper: whether dots read their factors from shared memory; see ``is_hopper``.
    """
    least = NARROWEST if hopper and dot == "bf16" else 16
    BK = max(least, triton.next_power_of_2(K))
    if dot == "ieee":
        BV, C = 32 if BK <= 64 else 16, 16
    else:
        BV, C = 64 if BK <= 128 else 32, 64 if BK <= 128 and diagonals < 2 else 32
        if dot == "tf32":
            C = min(C, 32)
        if diagonals and not hopper:
            BV, C = 32, min(C, 32)
        if diagonals and BK > 128:
            C = 16
    BV = min(BV, max(least, triton.next_power_of_2(V)))
    on_tensor_cores = dot != "ieee"
    warps = 4 if (128 if on_tensor_cores else 64) >= BK or (diagonals and on_tensor_cores) else 8
    stages = 1 if diagonals or dot == "ieee" else 2
    return {"BK": BK, "BV": BV, "C": C, "num_warps": warps, "num_stages": stages}


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9 to 11: 227 KiB of shared memory a block; 12 has 99 KiB, as 8.6 has."""
    return device.type == "cuda" and 9 <= torch.cuda.get_device_capability(device)[0] < 12


def num_segments(programs: Any, time: Any, fewest: int = 2, fill: int = PROGRAMS) -> Any:
    """Into how many segments a sequence is cut, where ``programs`` walk one each without.

    Args:
        fewest: that pay.
        fill: programs that fill a GPU.
    """
    most = fill // torch.sym_max(programs, 1)
    if isinstance(most, int):
        most = most if most >= fewest else 1
    return torch.sym_max(1, torch.sym_min(most, time // SHORTEST))


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
    dot: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel the decays call for.

    Args:
        q, k: [B, T, H, K], or [B, T, G, K] with decays of heads; k and v in q's or any other float
            dtype.
        v: [B, T, H, V].
        gk: fp32 natural-log decay, [B, T, H] or [B, T, H, K].
        gv: fp32 natural-log decay, [B, T, H] or [B, T, H, V].
        state: [N, H, K, V] fp32; default zero.
        cu_seqlens: [N + 1] bounds of packed sequences, from 0 to T, on the device; B is then 1.
        scale: factor of the output.
        reverse: run time backwards inside each sequence, position t with the decay of t + 1.
        out_dtype: dtype of o; default v's.
        dot: what the factors of a dot are; default by the dtypes of q, k and v, and tf32 where an
            fp32 o of bf16 tensors is asked for.

    Returns:
        o [B, T, H, V] and the state after the last row taken [N, H, K, V] fp32.
    """
    B, T, H, V = v.shape
    K = q.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    scalars = [g for g in (gk, gv) if g is not None and g.ndim == 3]
    g = sum(scalars[1:], scalars[0]).contiguous() if scalars else None
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gk, gv = (None if d is None or d.ndim == 3 else d.contiguous() for d in (gk, gv))
    state = None if state is None else state.contiguous()
    o = torch.empty_like(v, dtype=out_dtype)
    final_state = torch.empty(N, H, K, V, dtype=torch.float32, device=v.device)

    diagonals = (gk is not None) + (gv is not None)
    if dot is None:
        dot = dot_of(q.dtype, k.dtype, v.dtype)
        dot = dot_of_sums(dot) if o.dtype == torch.float32 else dot
    meta = tiles(K, V, diagonals, dot, is_hopper(v.device))
    meta |= {"K": K, "V": V, "REVERSE": reverse, **DOTS[dot]}
    meta |= {"LIMIT": LIMITS[dot]} if diagonals else {"SHARE": H // q.shape[2]}
    kernel, decays = (_diagonal_kernel, (g, gk, gv)) if diagonals else (_scalar_kernel, (g,))
    programs = N * H * triton.cdiv(V, meta["BV"])
    segments = num_segments(programs, T)
    length = -(-T // (segments * meta["C"])) * meta["C"]

    def run(q: Any, state: Any, o: Any, ends: Any, totals: tuple[Any, ...]) -> None:
        """One launch: the walk, or the first one, which finds the ends of segments."""
        launch(
            kernel, (programs * segments,), q, k, v, *decays, state, cu_seqlens, o, ends,
            final_state, *totals, scale, T, H, length, segments, **meta,
        )  # fmt: skip

    nothing = (None,) * (2 if diagonals else 1)
    if isinstance(segments, int) and segments == 1:
        run(q, state, o, None, nothing)
        return o, final_state
    ends = final_state.new_empty(N, segments, H, K, V)
    shapes = ((gk, K), (gv, V)) if diagonals else ((g, None),)
    totals = tuple(
        x if x is None else ends.new_empty(N, segments, H, *([width] if width else []))
        for x, width in shapes
    )
    run(None, None, None, ends, totals)
    BK = min(16, meta["BK"])
    total = totals if not diagonals else (None, *totals)
    launch(
        _join_kernel, (N * H * triton.cdiv(K, BK),), ends, *(*total, None, None)[:3], state, H,
        segments, K=K, V=V, BK=BK, BV=max(16, triton.next_power_of_2(V)), num_warps=4,
    )  # fmt: skip
    run(q, ends, o, None, nothing)
    return o, final_state
