"""What the kernels of `selective_scan` are made of: states [CR, NR, CL, NL] of a program's threads.

A thread has CR channels and NR states of each, and threads are CL channels by NL states. Beside
STEP tokens in front, [STEP, CR, CL] are numbers of channels and [STEP, NR, NL] those of states.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _owned(D, G, SEGMENTS, CR: tl.constexpr, CL: tl.constexpr):
    """Sequence, segment, group, block in the group, channels [CR, CL] and which of them exist."""
    in_group = D // G
    blocks = tl.cdiv(in_group, CR * CL)
    block = tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks % G
    segment = tl.program_id(0) // (blocks * G) % SEGMENTS
    n = (tl.program_id(0) // (blocks * G * SEGMENTS)).to(tl.int64)
    c = block * (CR * CL) + tl.arange(0, CR)[:, None] * CL + tl.arange(0, CL)[None, :]
    return n, segment, group, block, group * in_group + c, c < in_group


@triton.jit
def _load(pointer, t, inside, column, there, WIDTH):
    """Columns [*, *] of tokens t in fp32, zero where they are not inside."""
    at = t[:, None, None] * WIDTH + column[None, :, :]
    mask = inside[:, None, None] & there[None, :, :]
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, t, inside, column, there, WIDTH, value):
    at = t[:, None, None] * WIDTH + column[None, :, :]
    mask = inside[:, None, None] & there[None, :, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _states_at(row, c, c_there, k, k_there, D, N: tl.constexpr):
    """Offsets and mask of the [D, N] states at a row, [CR, NR, CL, NL]."""
    at = row * D * N + (c[:, None, :, None] * N + k[None, :, None, :])
    return at, c_there[:, None, :, None] & k_there[None, :, None, :]


@triton.jit
def _of_channels(z):
    """[STEP, CR, CL] beside states."""
    return z[:, :, None, :, None]


@triton.jit
def _of_states(z):
    """[STEP, NR, NL] beside channels."""
    return z[:, None, :, None, :]


@triton.jit
def _over_channels(z):
    """[STEP, NR, NL], first of a thread's own."""
    return tl.sum(tl.sum(z, 1), 2)


@triton.jit
def _over_states(z):
    """[STEP, CR, CL], first of a thread's own."""
    return tl.sum(tl.sum(z, 2), 3)


@triton.jit
def _token(z, i, j):
    """z_j of a step. Its tokens are a thread's own registers: nothing is left of this in a binary.

    Of a sum of floats something would be, as x + 0.0 is not x where x is -0.0; of bits it is.
    """
    bits = tl.where(i == j, z.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _inputs(u, dt, B, first, t, inside, c, c_there, k, k_there, D, W):
    """u and dt [STEP, CR, CL] and B of the tokens of a step, zero where they are not inside."""
    u_t = _load(u + first * D, t, inside, c, c_there, D)
    dt_t = _load(dt + first * D, t, inside, c, c_there, D)
    return u_t, dt_t, _of_states(_load(B + first * W, t, inside, k, k_there, W))


@triton.jit
def _recurrence(u, dt, B, A):
    """a and x of h_t = a_t h_{t-1} + x_t."""
    return tl.exp2(_of_channels(dt) * A), _of_channels(dt * u) * B


@triton.jit
def _join(h, A, totals, ends, first, count, step, c, c_there, k, k_there, D, N: tl.constexpr):
    """h after ``count`` segments, the rows of which are ``step`` apart."""
    for i in range(count):
        row = first + i * step
        at, mask = _states_at(row, c, c_there, k, k_there, D, N)
        total = tl.load(totals + row * D + c, mask=c_there, other=0.0)[:, None, :, None]
        h = tl.exp2(total * A) * h + tl.load(ends + at, mask=mask, other=0.0)
    return h


@triton.jit
def _slot(n, start, cu_seqlens, SLOTS, SPAN: tl.constexpr):
    """The slot of a sequence's first span."""
    if cu_seqlens is None:
        return n * SLOTS
    else:
        return start // SPAN + n
