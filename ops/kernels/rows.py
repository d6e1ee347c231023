"""What the kernels of [*, C] tensors are made of: rows in memory, and the sequences they are of.

A kernel moves its pointers to the first of the tokens it works on, in 64 bits, and counts from
there, in 32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bounds(n, cu_seqlens, T):
    """First token of each sequence n, and the one after its last, in all rows of the batch."""
    if cu_seqlens is None:
        return n * T, n * T + T
    else:
        return tl.load(cu_seqlens + n).to(tl.int64), tl.load(cu_seqlens + n + 1).to(tl.int64)


@triton.jit
def _segment(n, segment, T, SEGMENT, cu_seqlens):
    """Bounds of sequence n, then of one of its segments of SEGMENT tokens."""
    start, end = _bounds(n, cu_seqlens, T)
    begin = tl.minimum(start + segment.to(tl.int64) * SEGMENT, end)
    return start, end, begin, tl.minimum(begin + SEGMENT, end)


@triton.jit
def _sequence_of(t, cu_seqlens, N):
    """The last of N sequences that starts at or before each token t."""
    step = N * 0 + 1
    while step < N:
        step *= 2
    n = t * 0
    while step > 0:
        there = n + step < N
        starts = tl.load(cu_seqlens + n + step, mask=there, other=0)
        n = tl.where(there & (starts <= t), n + step, n)
        step //= 2
    return n.to(tl.int64)


@triton.jit
def _tile(pointer, row, mask, c, C):
    """Rows of a [*, C] tensor in fp32, zero where masked; bf16 arithmetic starts nowhere."""
    mask = tl.expand_dims(mask, -1) & (c < C)
    return tl.load(pointer + tl.expand_dims(row, -1) * C + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, mask, c, C, value):
    mask = tl.expand_dims(mask, -1) & (c < C)
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + tl.expand_dims(row, -1) * C + c, value, mask=mask)
