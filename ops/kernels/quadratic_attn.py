"""Triton kernel of `quadratic_attn`: a walk over chunks whose features exist in registers alone.

    w_ts = c0 + c1 a + c2 a²  with a = q_t·k_s        z_t = eps + Σ_{s<=t} w_ts
    o_t = Σ_{s<=t} w_ts v_s / z_t

Inside a chunk w is the polynomial of the scores. Between chunks it is ψ(q_t)·φ(k_s), where ψ(x)
holds the products of two channels of (x, 1), and φ(x) = c ψ(x) counts each as often as it stands in
w; the state is Σ φ(k_s) (v_s, 1). The two factors of all products are dots with matrices of 0 and
1, x E and x E': exact, and their product is where the next dot takes it from.

Tiles are powers of two, and 153 rows of a state no power of two: it is a tuple of tiles.

Grid: one program a (sequence, segment, head, block of BV value channels), with its columns of the
state in registers. Segments are cut and joined as in ``linear_attn``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import _join_kernel, is_hopper, num_segments
from flacompile.ops.kernels.tiles import (
    DOTS,
    _dot,
    _load,
    _owned,
    _sequence,
    _store_rows,
    dot_of,
)

ROWS = tl.constexpr(64)  # of the state in a tile


@triton.jit
def _channels(f, K: tl.constexpr):
    """The two channels of (x, 1) whose product feature f is, as ``features`` orders them."""
    PAIRS: tl.constexpr = K * (K + 1) // 2
    linear = tl.where(f < PAIRS + K, f - PAIRS, K)
    i = tl.where(f < PAIRS, f % K, linear)
    j = tl.where(f < PAIRS, (f % K + f // K) % K, K)
    return i, j


@triton.jit
def _counts(f, c0, c1, c2, K: tl.constexpr):
    """What each feature counts in w; a product of two channels stands for both orders."""
    PAIRS: tl.constexpr = K * (K + 1) // 2
    squares = tl.where(f < K, c2, 2 * c2)
    return tl.where(f < PAIRS, squares, tl.where(f < PAIRS + K, c1, c0))


@triton.jit
def _selects(f, kk, K: tl.constexpr, F: tl.constexpr):
    """E and E' [BK, ROWS]: x E and x E' are the two factors of every feature."""
    i, j = _channels(f, K)
    within = (f < F)[None, :]
    E = tl.where((kk[:, None] == i[None, :]) & within, 1.0, 0.0)
    return E, tl.where((kk[:, None] == j[None, :]) & within, 1.0, 0.0)


@triton.jit
def _factors(
    x, f, kk, K: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """The two factors of the features f of the rows of x [C, BK]."""
    E, E2 = _selects(f, kk, K, F)
    return _dot(x, E, DOT, PRECISION), _dot(x, E2, DOT, PRECISION)


@triton.jit
def _turned(x, f, kk, K: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The same, [ROWS, C]."""
    E, E2 = _selects(f, kk, K, F)
    x = tl.trans(x)
    return _dot(tl.trans(E), x, DOT, PRECISION) * _dot(tl.trans(E2), x, DOT, PRECISION)


@triton.jit
def _with_one(x, there, kk, K: tl.constexpr):
    """(x, 1), and zeros for rows that are not there."""
    return tl.where((kk == K)[None, :] & there[:, None], 1.0, x)


@triton.jit
def _places(first, i, start, length, REVERSE: tl.constexpr):
    """Tokens of a chunk: at + by, and which of them are there."""
    inside = i < tl.minimum(length - first, 1 << 16).to(tl.int32)  # fewer registers than 64 bits
    at = start + length - 1 - first if REVERSE else start + first
    return at, -i if REVERSE else i, inside


@triton.jit
def _counted(mask, at, by, inside):
    """Which of them count. Apart, or compilers take the mask for what is written at the places."""
    there = inside
    if mask is not None:
        there = inside & (tl.load(mask + at + by, mask=inside, other=0) != 0)
    return there


@triton.jit
def _load_columns(state, index, vv, F: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Columns vv of a state [F, V + 1] and its last one, in tiles of rows; zeros without one."""
    S, z = (), ()
    for b in tl.static_range((F + ROWS - 1) // ROWS):
        if state is None:
            S += (tl.zeros([ROWS, BV], tl.float32),)
            z += (tl.zeros([ROWS], tl.float32),)
        else:
            f = tl.arange(0, ROWS) + b * ROWS
            at = state + index * F * (V + 1) + f * (V + 1)
            mask = (f < F)[:, None] & (vv < V)[None, :]
            S += (tl.load(at[:, None] + vv[None, :], mask=mask, other=0.0),)
            z += (tl.load(at + V, mask=f < F, other=0.0),)
    return S, z


@triton.jit
def _store_columns(S, z, state, index, vv, block, F: tl.constexpr, V: tl.constexpr):
    for b in tl.static_range(len(S)):
        f = tl.arange(0, ROWS) + b * ROWS
        at = state + index * F * (V + 1) + f * (V + 1)
        tl.store(at[:, None] + vv[None, :], S[b], mask=(f < F)[:, None] & (vv < V)[None, :])
        tl.store(at + V, z[b], mask=(f < F) & (block == 0))


@triton.jit
def _written(
    S, z, x, y, e, kk, c0, c1, c2,
    K: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after the rows of x with y [C, BV], and in its last column e [C] or 1."""
    new, sums = (), ()
    for b in tl.static_range(len(S)):
        f = tl.arange(0, ROWS) + b * ROWS
        x_b = _turned(x, f, kk, K, F, DOT, PRECISION)
        if c0 is not None:
            x_b *= _counts(f, c0, c1, c2, K)[:, None]
        new += (S[b] + _dot(x_b, y, DOT, PRECISION),)
        sums += (z[b] + tl.sum(x_b if e is None else x_b * e[None, :], 1),)
    return new, sums


@triton.jit
def _forward_kernel(
    q, k, v, mask, state, cu_seqlens, o, z, ends, final, c0, c1, c2, eps, T, H, SEGMENT, SEGMENTS,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Without o only the state is found."""
    c0, c1, c2 = tl.cast(c0, tl.float32), tl.cast(c1, tl.float32), tl.cast(c2, tl.float32)
    # 1. What this program owns.
    n, segment, h, block, owner = _owned(SEGMENTS, H, (V + BV - 1) // BV)
    start, length = _sequence(cu_seqlens, n, T)
    kk, vv, i = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, C)
    S, sums = _load_columns(state, owner, vv, F, V, BV)

    begin = segment * SEGMENT
    for first in range(begin, tl.minimum(begin + SEGMENT, length), C):
        # 2. Load the chunk.
        at, by, inside = _places(first, i, start, length, False)
        there = _counted(mask, at, by, inside)
        at, by = at * H + h, by * H
        k_c, v_c = _load(k, at, by, there, kk, K), _load(v, at, by, there, vv, V)

        if o is not None:
            # 3. What the rows of the chunk add up to, and those before it.
            q_c = _load(q, at, by, inside, kk, K)
            a = _dot(q_c, tl.trans(k_c), DOT, PRECISION)
            meets = (i[:, None] >= i[None, :]) & there[None, :]
            w = tl.where(meets, c0 + a * (c1 + a * c2), 0.0)
            o_c, z_c = _dot(w, v_c, DOT, PRECISION), eps + tl.sum(w, 1)
            q_c = _with_one(q_c, inside, kk, K)
            for b in tl.static_range(len(S)):
                f = tl.arange(0, ROWS) + b * ROWS
                x, y = _factors(q_c, f, kk, K, F, DOT, PRECISION)
                x = x.to(DOT) * y.to(DOT)
                o_c += _dot(x, S[b], DOT, PRECISION)
                z_c += tl.sum(x * sums[b][None, :], 1)
            _store_rows(o_c / z_c[:, None], o, at, by, inside, vv, V)
            tl.store(z + at + by, z_c, mask=inside & (block == 0))

        # 4. Take the chunk into the state.
        k_c = _with_one(k_c, there, kk, K)
        S, sums = _written(S, sums, k_c, v_c, None, kk, c0, c1, c2, K, F, DOT, PRECISION)

    if ends is not None:
        _store_columns(S, sums, ends, owner, vv, block, F, V)
    elif segment == SEGMENTS - 1:
        _store_columns(S, sums, final, n * H + h, vv, block, F, V)


def tiles(hopper: bool) -> dict[str, int]:
    """Block sizes and warps: three tiles of a state and the factors of one stand in registers."""
    size = 64 if hopper else 32
    return {"BK": 32, "BV": size, "C": size, "num_warps": 4, "num_stages": 1}


def sizes(q: Tensor, v: Tensor, state: Tensor) -> dict[str, Any]:
    """What every kernel of tensors of these shapes is compiled for."""
    widths = {"K": q.shape[3], "V": v.shape[3], "F": state.shape[2]}
    return widths | tiles(is_hopper(q.device)) | DOTS[dot_of(q.dtype)]


def cut(run: Any, state: Tensor, time: Any, meta: dict[str, Any]) -> tuple[Tensor, Any, Any]:
    """The states before segments, the length of these and how many there are.

    Args:
        run: ``run(ends, length, segments)`` finds what each segment adds to its start.
        state: [N, H, F, V + 1], before the first.
        time: T.
        meta: of the kernels.
    """
    N, H, F, width = state.shape
    blocks = triton.cdiv(meta["V"], meta["BV"])
    segments = num_segments(N * H * blocks, time)
    length = -(-time // (segments * meta["C"])) * meta["C"]
    if isinstance(segments, int) and segments == 1:
        return state, length, segments
    ends = state.new_empty(N, segments, H, F, width)
    run(ends, length, segments)
    launch(
        _join_kernel, (N * H * triton.cdiv(F, 16),), ends, None, None, None, state, H, segments,
        K=F, V=width, BK=16, BV=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return ends, length, segments


def quadratic_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor,
    cu_seqlens: Tensor | None, weights: list[float], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o [B, T, H, V], the final state and z [B, T, H] fp32.

    Args:
        q, k: [B, T, H, K], K <= 16.
        v: [B, T, H, V].
        mask: [B, T] uint8, 0 where no token is.
        state: [N, H, F, V + 1] fp32.
        cu_seqlens: [N + 1] bounds of packed sequences or None.
        weights: c0, c1, c2.
        eps: added to the sum of the weights.
    """
    q, k, v, state = (x.contiguous() for x in (q, k, v, state))
    (B, T, H, _), meta = q.shape, sizes(q, v, state)
    o, final = torch.empty_like(v), torch.empty_like(state)
    z = state.new_empty(B, T, H)
    programs = state.shape[0] * H * triton.cdiv(meta["V"], meta["BV"])

    def run(start: Any, o: Any, z: Any, ends: Any, length: Any, segments: Any) -> None:
        """One launch: the walk, or without o the first one, which finds the ends of segments."""
        launch(
            _forward_kernel, (programs * segments,), q, k, v, mask, start, cu_seqlens, o, z, ends,
            final, *weights, eps, T, H, length, segments, **meta,
        )  # fmt: skip

    start, *segments = cut(lambda *to: run(None, None, None, *to), state, T, meta)
    run(start, o, z, None, *segments)
    return o, final, z
