"""Triton kernels of `selective_scan`, forward and backward.

h_t = e^{dt_t A} h_{t-1} + dt_t u_t B_t^T        y_t = h_t C_t
dh_t = dy_t C_t^T + p_t        p_{t-1} = e^{dt_t A} dh_t        d(dt_t A) = p_{t-1} h_{t-1}

Grid: one program a (sequence, segment, block of channels of one group). It takes STEP tokens at a
time, whose states [STEP, CR, NR, CL, NL] live in registers alone: a thread has CR channels and NR
states of each of those tokens, and threads are CL channels by NL states. So the recurrence stays in
a thread, and a sum over states or channels adds up most in a thread before it goes across threads.

The forward leaves the state before each span of tokens in memory. The backward walks the spans from
the last to the first, and makes the states of each again from there. Few sequences of few channels
do not fill a GPU: there a sequence is cut into segments, as in ``scan``.

dA leaves the backward as one sum a segment, dB and dC as one a block of channels, which are then
added up in one order: no atomics, so that two runs give the same bits.

The exponentials, one a token, channel and state, bound the forward and not memory: a multiprocessor
makes 16 a cycle, so B T D N = 2^30 of them take 0.29 ms of an H100; a segment that is not the last
has them twice. The backward makes 1 + 3/4 of them and about 40 other operations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import PROGRAMS, num_segments
from flacompile.ops.kernels.rows import _segment
from flacompile.ops.kernels.selective_tiles import (
    _inputs,
    _join,
    _load,
    _of_channels,
    _of_states,
    _over_channels,
    _over_states,
    _owned,
    _recurrence,
    _slot,
    _states_at,
    _store,
    _token,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FORWARD = {"STEP": 4, "CR": 2, "num_warps": 8}
MANY = {"STEP": 8, "CR": 1, "num_warps": 4}  # of a forward whose channels fill a GPU by themselves
BACKWARD = {"STEP": 4, "CR": 2, "num_warps": 4}
SUMS = {"WIDTH": 1024, "num_warps": 4}


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, state, cu_seqlens, totals, ends, y, final, starts,
    T, D, G, SEQUENCES, SLOTS, SEGMENT, SEGMENTS, N: tl.constexpr, SPAN: tl.constexpr,
    STEP: tl.constexpr, CR: tl.constexpr, NR: tl.constexpr, CL: tl.constexpr, NL: tl.constexpr,
):  # fmt: skip
    """y and the states before spans, or without y the sum of dt and what it adds to the state of
    each segment but the last."""
    # 1. What this program owns, and the state that it starts from.
    n, segment, group, _, c, c_there = _owned(D, G, SEGMENTS, CR, CL)
    start, end, begin, stop = _segment(n, segment, T, SEGMENT, cu_seqlens)
    k = tl.arange(0, NR)[:, None] + tl.arange(0, NL)[None, :] * NR
    k_there, W = k < N, G * N
    B, C = B + group * N, C + group * N
    at, mask = _states_at(0, c, c_there, k, k_there, D, N)
    A_c = LOG2_E * tl.load(A + at, mask=mask, other=0.0)
    h, total = tl.zeros([CR, NR, CL, NL], tl.float32), tl.zeros([CR, CL], tl.float32)
    if y is None:
        if segment == SEGMENTS - 1:
            return
    else:
        h += tl.load(state + n * D * N + at, mask=mask, other=0.0)
        if ends is not None:
            h = _join(h, A_c, totals, ends, n * SEGMENTS, segment, 1, c, c_there, k, k_there, D, N)

    t, i = tl.arange(0, STEP), tl.arange(0, STEP)[:, None, None, None, None]
    for first_of_span in range(begin, stop, SPAN):
        if y is not None:
            slot = _slot(n, start, cu_seqlens, SLOTS, SPAN) + (first_of_span - start) // SPAN
            tl.store(starts + slot * D * N + at, h, mask=mask)
        for step in range(SPAN // STEP):
            # 2. The states of a step, one after the other.
            first = first_of_span + step * STEP
            inside = t < stop - first
            u_t, dt_t, B_t = _inputs(u, dt, B, first, t, inside, c, c_there, k, k_there, D, W)
            a, x = _recurrence(u_t, dt_t, B_t, A_c)
            total += tl.sum(dt_t, 0)
            h_t = x
            for j in tl.static_range(STEP):
                h = _token(a, i, j) * h + _token(x, i, j)
                h_t = tl.where(i == j, h[None, :, :, :, :], h_t)

            # 3. Read them.
            if y is not None:
                C_t = _load(C + first * W, t, inside, k, k_there, W)
                y_t = _over_states(h_t * _of_states(C_t))
                _store(y + first * D, t, inside, c, c_there, D, y_t)

    if y is None:
        row = n * SEGMENTS + segment
        tl.store(ends + row * D * N + at, h, mask=mask)
        tl.store(totals + row * D + c, total, mask=c_there)
    elif segment == SEGMENTS - 1:
        tl.store(final + n * D * N + at, h, mask=mask)
        # 4. Slots between the last span of this sequence and the first of the next.
        slot = _slot(n, start, cu_seqlens, SLOTS, SPAN) + tl.cdiv(end - start, SPAN)
        if cu_seqlens is None:
            after = (n + 1) * SLOTS
        else:
            after = tl.where(n == SEQUENCES - 1, SLOTS, end // SPAN + n + 1)
        for empty in range(slot, after):
            tl.store(starts + empty * D * N + at, h * 0.0, mask=mask)


@triton.jit
def _backward_kernel(
    u, dt, A, B, C, cu_seqlens, totals, ends, starts, dy, dfinal, du, ddt, dA, sums, dstate,
    T, D, G, NUM_TOKENS, SLOTS, SEGMENT, SEGMENTS, N: tl.constexpr, SPAN: tl.constexpr,
    STEP: tl.constexpr, CR: tl.constexpr, NR: tl.constexpr, CL: tl.constexpr, NL: tl.constexpr,
):  # fmt: skip
    """All gradients, or without du the sum of dt and what it adds to p of each segment but the
    first. p is the gradient of the state before the tokens done."""
    # 1. What this program owns, and the p that it starts from.
    n, segment, group, block, c, c_there = _owned(D, G, SEGMENTS, CR, CL)
    start, _, begin, stop = _segment(n, segment, T, SEGMENT, cu_seqlens)
    k = tl.arange(0, NR)[:, None] + tl.arange(0, NL)[None, :] * NR
    k_there, W = k < N, G * N
    B, C = B + group * N, C + group * N
    at, mask = _states_at(0, c, c_there, k, k_there, D, N)
    A_c = LOG2_E * tl.load(A + at, mask=mask, other=0.0)
    p, total = tl.zeros([CR, NR, CL, NL], tl.float32), tl.zeros([CR, CL], tl.float32)
    if du is None:
        if segment == 0:
            return
    else:
        p += tl.load(dfinal + n * D * N + at, mask=mask, other=0.0)
        if ends is not None:
            last = n * SEGMENTS + SEGMENTS - 1
            p = _join(
                p, A_c, totals, ends, last, SEGMENTS - 1 - segment, -1,
                c, c_there, k, k_there, D, N,
            )  # fmt: skip
    dA_c = tl.zeros([CR, NR, CL, NL], tl.float32)
    STEPS: tl.constexpr = SPAN // STEP
    t, i = tl.arange(0, STEP), tl.arange(0, STEP)[:, None, None, None, None]
    s = tl.arange(0, STEPS)[:, None, None, None, None]
    num_spans = tl.cdiv(stop - begin, SPAN)
    for done in range(num_spans):
        span = begin + (num_spans - 1 - done) * SPAN
        num_steps = tl.cdiv(tl.minimum(stop - span, SPAN), STEP)
        h_s = tl.zeros([STEPS, CR, NR, CL, NL], tl.float32)
        if du is not None:
            # 2. The state before each step of the span.
            slot = _slot(n, start, cu_seqlens, SLOTS, SPAN) + (span - start) // SPAN
            h = tl.load(starts + slot * D * N + at, mask=mask, other=0.0)
            h_s += h[None, :, :, :, :]
            for step in range(1, num_steps):
                first = span + (step - 1) * STEP
                u_s, dt_s, B_s = _inputs(
                    u, dt, B, first, t, t < stop - first, c, c_there, k, k_there, D, W
                )
                a_s, x_s = _recurrence(u_s, dt_s, B_s, A_c)
                for j in tl.static_range(STEP):
                    h = _token(a_s, i, j) * h + _token(x_s, i, j)
                h_s = tl.where(s == step, h[None, :, :, :, :], h_s)

        for back in range(num_steps):
            # 3. The states before the tokens of a step, and back in time the gradients after them.
            step = num_steps - 1 - back
            first = span + step * STEP
            inside = t < stop - first
            u_t, dt_t, B_t = _inputs(u, dt, B, first, t, inside, c, c_there, k, k_there, D, W)
            a, x = _recurrence(u_t, dt_t, B_t, A_c)
            total += tl.sum(dt_t, 0)
            dy_t = _of_channels(_load(dy + first * D, t, inside, c, c_there, D))
            C_t = _of_states(_load(C + first * W, t, inside, k, k_there, W))
            before = x
            if du is not None:
                h = _token(h_s, s, step)
                for j in tl.static_range(STEP):
                    before = tl.where(i == j, h[None, :, :, :, :], before)
                    h = _token(a, i, j) * h + _token(x, i, j)
            dh = dy_t * C_t
            for j in tl.static_range(STEP):
                dh_j = _token(dh, i, STEP - 1 - j) + p
                p = _token(a, i, STEP - 1 - j) * dh_j
                dh = tl.where(i == STEP - 1 - j, dh_j[None, :, :, :, :], dh)

            # 4. The gradients of what made the states: of drive = dt u and B, of the decay, of C.
            if du is not None:
                decayed = a * before
                dg = dh * decayed
                dA_c += tl.sum(dg * _of_channels(dt_t), 0)
                ddrive = _over_states(dh * B_t)
                ddt_t = u_t * ddrive + LN_2 * _over_states(dg * A_c[None, :, :, :, :])
                _store(du + first * D, t, inside, c, c_there, D, dt_t * ddrive)
                _store(ddt + first * D, t, inside, c, c_there, D, ddt_t)
                dB_t = _over_channels(dh * _of_channels(dt_t * u_t))
                dC_t = _over_channels((decayed + x) * dy_t)
                row = (block.to(tl.int64) * NUM_TOKENS + first) * W + group * N
                _store(sums + row, t, inside, k, k_there, W, dB_t)
                row += tl.cdiv(D // G, CR * CL).to(tl.int64) * NUM_TOKENS * W
                _store(sums + row, t, inside, k, k_there, W, dC_t)

    # 5. The sums.
    row = n * SEGMENTS + segment
    if du is None:
        tl.store(ends + row * D * N + at, p, mask=mask)
        tl.store(totals + row * D + c, total, mask=c_there)
    else:
        tl.store(dA + row * D * N + at, dA_c, mask=mask)
        if segment == 0:
            tl.store(dstate + n * D * N + at, p, mask=mask)


@triton.jit
def _sums_kernel(sums, dB, dC, SIZE, BLOCKS, WIDTH: tl.constexpr):
    """dB, or dC: what all blocks of channels add to it."""
    i = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    share = sums + tl.program_id(1).to(tl.int64) * BLOCKS * SIZE + i
    total = tl.zeros([WIDTH], tl.float32)
    for _ in range(BLOCKS):
        total += tl.load(share, mask=i < SIZE, other=0.0)
        share += SIZE
    if tl.program_id(1) == 0:
        tl.store(dB + i, total.to(dB.dtype.element_ty), mask=i < SIZE)
    else:
        tl.store(dC + i, total.to(dC.dtype.element_ty), mask=i < SIZE)


def tiles(channels: int, N: int, tile: dict[str, int]) -> dict[str, int]:
    """Block sizes and warps for groups of ``channels`` and N states.

    Four states a thread, so that few threads share a channel, and as many channels as there are
    threads. Of many states a thread has fewer channels, as masks and offsets take registers too:
    tests/compile_kernels.py prints what spills.
    """
    STATES = triton.next_power_of_2(int(N))  # a compiler's symbol would be no block size
    NR, CR = min(4, STATES), tile["CR"] if STATES <= 32 else 1
    CL = max(1, 32 * tile["num_warps"] * NR // STATES)
    CL = min(CL, triton.next_power_of_2(triton.cdiv(int(channels), CR)))
    return tile | {"CR": CR, "NR": NR, "CL": CL, "NL": STATES // NR}


def _cut(
    dt: Tensor, A: Tensor, G: int, sequences: Any, span: int, tile: dict[str, int]
) -> tuple[tuple[Any, ...], Any, Tensor | None, Tensor | None]:
    """The grid, the length and number of segments, and room for what each adds, if many."""
    T, (D, N) = dt.shape[1], A.shape
    programs = sequences * G * triton.cdiv(D // G, tile["CR"] * tile["CL"])
    segments = num_segments(programs, T)
    grid, sizes = (programs * segments,), (-(-T // (segments * span)) * span, segments)
    if isinstance(segments, int) and segments == 1:
        return grid, sizes, None, None
    ends = torch.empty(sequences, segments, D, N, dtype=torch.float32, device=dt.device)
    return grid, sizes, ends.new_empty(sequences, segments, D), ends


def selective_scan_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, starts: Tensor, span: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, T, D] in the dtype of u, and the final state; the states before spans into starts.

    Args:
        u: [B, T, D], any float dtype.
        dt: fp32, [B, T, D].
        A: fp32, [D, N].
        B, C: [B, T, G, N], any float dtype.
        state: fp32, [sequences, D, N].
        cu_seqlens: bounds of packed sequences, on the device; the batch is then 1.
        starts: fp32, [B, slots, D, N]; those of no span become zero.
        span: tokens a span.
    """
    (_, T, D), (G, N), sequences = u.shape, B.shape[2:], state.shape[0]
    u, dt, A, B, C, state = (x.contiguous() for x in (u, dt, A, B, C, state))
    many = isinstance(sequences, int) and sequences * D >= 64 * PROGRAMS // 2
    tile = tiles(D // G, N, MANY if many else FORWARD)
    grid, sizes, totals, ends = _cut(dt, A, G, sequences, span, tile)

    def run(state: Any, y: Any, final: Any, starts: Any) -> None:
        """One launch: the walk, or the first one, which finds the ends of segments."""
        launch(
            _forward_kernel, grid, u, dt, A, B, C, state, cu_seqlens, totals, ends,
            y, final, starts, T, D, G, sequences, slots, *sizes, N=N, SPAN=span, **tile,
        )  # fmt: skip

    slots, y, final = starts.shape[1], torch.empty_like(u), torch.empty_like(state)
    if ends is not None:
        run(None, None, None, None)
    run(state, y, final, starts)
    return y, final


def selective_scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None,
    starts: Tensor, dy: Tensor, dfinal: Tensor, span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """du, ddt, dA, dB, dC and dstate, of arguments as in ``selective_scan_forward``."""
    (batch, T, D), (G, N), sequences = u.shape, B.shape[2:], dfinal.shape[0]
    u, dt, A, B, C, starts, dy, dfinal = (
        x.contiguous() for x in (u, dt, A, B, C, starts, dy, dfinal)
    )
    tile = tiles(D // G, N, BACKWARD)
    grid, sizes, totals, ends = _cut(dt, A, G, sequences, span, tile)
    blocks = triton.cdiv(D // G, tile["CR"] * tile["CL"])
    sums = torch.empty(2, blocks, *B.shape, dtype=torch.float32, device=u.device)
    dA = sums.new_empty(sequences * sizes[1], D, N)

    def run(starts: Any, dfinal: Any, *gradients: Any) -> None:
        """As in ``selective_scan_forward``, from the last token on."""
        launch(
            _backward_kernel, grid, u, dt, A, B, C, cu_seqlens, totals, ends, starts, dy, dfinal,
            *gradients, T, D, G, batch * T, slots, *sizes, N=N, SPAN=span, **tile,
        )  # fmt: skip

    slots, size = starts.shape[1], B.numel()
    du, ddt, dB, dC, dstate = (torch.empty_like(x) for x in (u, dt, B, C, dfinal))
    if ends is not None:
        run(None, None, None, None, None, None, None)
    run(starts, dfinal, du, ddt, dA, sums, dstate)
    grid = (triton.cdiv(size, SUMS["WIDTH"]), 2)
    launch(_sums_kernel, grid, sums, dB, dC, size, blocks, **SUMS)
    return du, ddt, dA.sum(0), dB, dC, dstate
