"""Triton kernels of the gradients of `quadratic_attn`: a walk either way, no states kept.

With d_t = do_t / z_t, e_t = -(o_t·do_t) / z_t and A_ts = d_t·v_s + e_t, the gradient of w_ts,

    dq_t = Σ_{s<=t} A_ts (c1 + 2 c2 a_ts) k_s          S_t = Σ_{s<=t} c ψ(k_s) (v_s, 1)
    dk_s = Σ_{t>=s} A_ts (c1 + 2 c2 a_ts) q_t          D_s = Σ_{t>=s} ψ(q_t) (d_t, e_t)
    dv_s = Σ_{t>=s} w_ts d_t

Inside a chunk as it stands here; over the chunks before, ψ(q) gets S (d, e), which its products
hand on to q; over those after, ψ(k) gets c D (v, 1), and v what ψ(k) reads of c D. The second walk
runs back in time.

Grid: one program a (sequence, segment, head, block of BV value channels); of dq and dk each block
has its share.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.quadratic_attn import (
    ROWS,
    _counted,
    _counts,
    _factors,
    _forward_kernel,
    _load_columns,
    _places,
    _selects,
    _store_columns,
    _with_one,
    _written,
    cut,
    sizes,
)
from flacompile.ops.kernels.tiles import _dot, _load, _owned, _sequence, _store_rows


@triton.jit
def _shares_kernel(o, do_, z, rows, TOKENS, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr):
    """(1 / z, e) of C rows of [TOKENS, V] tensors."""
    first, i, vv = tl.program_id(0).to(tl.int64) * C, tl.arange(0, C), tl.arange(0, BV)
    inside = first + i < TOKENS
    o_c, do_c = _load(o, first, i, inside, vv, V), _load(do_, first, i, inside, vv, V)
    r = 1.0 / tl.load(z + first + i, mask=inside, other=1.0)
    at = rows + (first + i) * 2
    tl.store(at, r, mask=inside)
    tl.store(at + 1, -r * tl.sum(o_c.to(tl.float32) * do_c.to(tl.float32), 1), mask=inside)


@triton.jit
def _of_output(do_, rows, at, by, inside, vv, block, V: tl.constexpr, DOT: tl.constexpr):
    """d and e of a chunk; e belongs to the first block.

    One load and sums of it: a load of e in every layout that it is used in would take registers.
    """
    two = tl.arange(0, 2)
    found = _load(rows, at, by, inside, two, 2)
    r = tl.sum(tl.where(two == 0, found, 0.0), 1)
    d = _load(do_, at, by, inside, vv, V).to(tl.float32) * r[:, None]
    return d.to(DOT), tl.sum(tl.where((two == 1) & (block == 0), found, 0.0), 1)


@triton.jit
def _handed_on(
    dx, G, x, y, f, kk, K: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """dx with what G, the gradients of features f, gives; x and y are their factors."""
    E, E2 = _selects(f, kk, K, F)
    dx += _dot(G * y, tl.trans(E), DOT, PRECISION)
    return dx + _dot(G * x, tl.trans(E2), DOT, PRECISION)


@triton.jit
def _queries_kernel(
    q, k, v, mask, state, cu_seqlens, do_, rows, dq, c0, c1, c2, T, H, SEGMENT, SEGMENTS, TOKENS,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, forward in time."""
    c0, c1, c2 = tl.cast(c0, tl.float32), tl.cast(c1, tl.float32), tl.cast(c2, tl.float32)
    # 1. What this program owns.
    _n, segment, h, block, owner = _owned(SEGMENTS, H, (V + BV - 1) // BV)
    start, length = _sequence(cu_seqlens, _n, T)
    kk, vv, i = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, C)
    S, sums = _load_columns(state, owner, vv, F, V, BV)

    begin = segment * SEGMENT
    for first in range(begin, tl.minimum(begin + SEGMENT, length), C):
        # 2. Inside the chunk.
        at, by, inside = _places(first, i, start, length, False)
        there = _counted(mask, at, by, inside)
        at, by = at * H + h, by * H
        q_c, k_c = _load(q, at, by, inside, kk, K), _load(k, at, by, there, kk, K)
        v_c = _load(v, at, by, there, vv, V)
        d, e_c = _of_output(do_, rows, at, by, inside, vv, block, V, DOT)
        a = _dot(q_c, tl.trans(k_c), DOT, PRECISION)
        A = _dot(d, tl.trans(v_c), DOT, PRECISION) + e_c[:, None]
        meets = (i[:, None] >= i[None, :]) & there[None, :]
        dq_c = _dot(tl.where(meets, A * (c1 + 2 * c2 * a), 0.0), k_c, DOT, PRECISION)

        # 3. From the chunks before it.
        q_c = _with_one(q_c, inside, kk, K)
        for b in tl.static_range(len(S)):
            G = _dot(d, tl.trans(S[b]), DOT, PRECISION) + e_c[:, None] * sums[b][None, :]
            f = tl.arange(0, ROWS) + b * ROWS
            x, y = _factors(q_c, f, kk, K, F, DOT, PRECISION)
            dq_c = _handed_on(dq_c, G, x, y, f, kk, K, F, DOT, PRECISION)
        _store_rows(dq_c, dq, block * TOKENS + at, by, inside, kk, K)

        # 4. Take the chunk into the state.
        k_c = _with_one(k_c, there, kk, K)
        S, sums = _written(S, sums, k_c, v_c, None, kk, c0, c1, c2, K, F, DOT, PRECISION)


@triton.jit
def _of_first(sums, block):
    """The sums in the first block, in the others zeros."""
    new = ()
    for b in tl.static_range(len(sums)):
        new += (tl.where(block == 0, sums[b], 0.0),)
    return new


@triton.jit
def _keys_kernel(
    q, k, v, mask, state, cu_seqlens, do_, rows, dk, dv, ends, final, c0, c1, c2,
    T, H, SEGMENT, SEGMENTS, TOKENS,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, back in time: rows meet those up to them. Without dv only D is found."""
    c0, c1, c2 = tl.cast(c0, tl.float32), tl.cast(c1, tl.float32), tl.cast(c2, tl.float32)
    # 1. What this program owns.
    n, segment, h, block, owner = _owned(SEGMENTS, H, (V + BV - 1) // BV)
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv, i = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, C)
    D, sums = _load_columns(state, owner, vv, F, V, BV)
    if state is not None:
        sums = _of_first(sums, block)

    begin = segment * SEGMENT
    for first in range(begin, tl.minimum(begin + SEGMENT, length), C):
        at, by, inside = _places(first, i, start, length, True)
        there = _counted(mask, at, by, inside)
        at, by = at * H + h, by * H
        q_c = _load(q, at, by, inside, kk, K)
        d, e_c = _of_output(do_, rows, at, by, inside, vv, block, V, DOT)
        if dv is not None:
            # 2. Inside the chunk, turned.
            k_c, v_c = _load(k, at, by, there, kk, K), _load(v, at, by, there, vv, V)
            a = _dot(k_c, tl.trans(q_c), DOT, PRECISION)
            meets = (i[:, None] >= i[None, :]) & there[:, None]
            w = tl.where(meets, c0 + a * (c1 + a * c2), 0.0)
            dv_c = _dot(w, d, DOT, PRECISION)
            A = _dot(v_c, tl.trans(d), DOT, PRECISION) + e_c[None, :]
            dk_c = _dot(tl.where(meets, A * (c1 + 2 * c2 * a), 0.0), q_c, DOT, PRECISION)

            # 3. From the chunks after it.
            k_c = _with_one(k_c, there, kk, K)
            for b in tl.static_range(len(D)):
                f = tl.arange(0, ROWS) + b * ROWS
                counts = _counts(f, c0, c1, c2, K)
                D_b = (counts[:, None] * D[b]).to(DOT)
                x, y = _factors(k_c, f, kk, K, F, DOT, PRECISION)
                dv_c += _dot(x * y, D_b, DOT, PRECISION)
                G = _dot(v_c, tl.trans(D_b), DOT, PRECISION) + (counts * sums[b])[None, :]
                dk_c = _handed_on(dk_c, G, x, y, f, kk, K, F, DOT, PRECISION)
            _store_rows(dk_c, dk, block * TOKENS + at, by, inside, kk, K)
            _store_rows(dv_c, dv, at, by, inside, vv, V)

        # 4. Take the chunk into D.
        q_c = _with_one(q_c, inside, kk, K)
        D, sums = _written(D, sums, q_c, d, e_c, kk, None, None, None, K, F, DOT, PRECISION)

    if ends is not None:
        _store_columns(D, sums, ends, owner, vv, block, F, V)
    elif segment == SEGMENTS - 1:
        _store_columns(D, sums, final, n * H + h, vv, block, F, V)


def quadratic_attn_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, weights: list[float], o: Tensor, z: Tensor, do: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and dstate; o and z as ``quadratic_attn_forward`` gave them.

    Args:
        do: [B, T, H, V].
        dfinal: [N, H, F, V + 1] fp32.
    """
    q, k, v, o, do = (x.contiguous() for x in (q, k, v, o, do))
    state, dfinal = state.contiguous(), dfinal.contiguous()
    (B, T, H, _), meta = q.shape, sizes(q, v, state)
    V, TOKENS = meta["V"], B * T * H
    blocks = triton.cdiv(V, meta["BV"])
    shares = {"size": (blocks, *q.shape), "dtype": q.dtype if blocks == 1 else torch.float32}
    dv, dstate, rows = torch.empty_like(v), torch.empty_like(state), z.new_empty(*z.shape, 2)
    launch(
        _shares_kernel, (triton.cdiv(TOKENS, 32),), o, do, z, rows, TOKENS, V=V,
        BV=triton.next_power_of_2(V), C=32, num_warps=4,
    )  # fmt: skip
    inputs, c = (q, k, v, mask), (*weights,)

    def ahead(ends: Any, length: Any, segments: Any) -> None:
        """What each segment adds to the state."""
        grid = (state.shape[0] * H * blocks * segments,)
        launch(
            _forward_kernel, grid, *inputs, None, cu_seqlens, None, None, ends, None, *c, 0.0,
            T, H, length, segments, **meta,
        )  # fmt: skip

    def back(start: Any, dk: Any, dv: Any, ends: Any, length: Any, segments: Any) -> None:
        """The walk back in time, or without dv what each segment adds to D."""
        launch(
            _keys_kernel, (state.shape[0] * H * blocks * segments,), *inputs, start, cu_seqlens,
            do, rows, dk, dv, ends, dstate, *c, T, H, length, segments, TOKENS, **meta,
        )  # fmt: skip

    start, length, segments = cut(ahead, state, T, meta)
    dq = q.new_empty(**shares)
    launch(
        _queries_kernel, (state.shape[0] * H * blocks * segments,), *inputs, start, cu_seqlens,
        do, rows, dq, *c, T, H, length, segments, TOKENS, **meta,
    )  # fmt: skip
    dq = dq[0] if blocks == 1 else dq.sum(0).to(q.dtype)
    start, length, segments = cut(lambda *to: back(None, None, None, *to), dfinal, T, meta)
    dk = q.new_empty(**shares)
    back(start, dk, dv, None, length, segments)
    return dq, dk[0] if blocks == 1 else dk.sum(0).to(k.dtype), dv, dstate
