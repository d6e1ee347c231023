"""Triton kernels of `scan`, forward and backward.

h_t = e^{g_t} h_{t-1} + x_t
dx_t = dh_t + e^{g_{t+1}} dx_{t+1}        dg_t = dx_t e^{g_t} h_{t-1}        dstate = e^{g_1} dx_1

Grid: one program a (sequence, segment, COLUMNS channels). It takes STRIPS strips of ROWS tokens at
a time, [ROWS, STRIPS, COLUMNS]: each strip is the work of one thread, and what the strips make of
h is a scan across threads of one pair a strip. h is carried from one block to the next, so that
every byte is moved once.

Few sequences of few channels do not fill a GPU: there a sequence is cut into segments. A first pass
finds what each leaves of h and adds to it; from those of the segments before it, every program then
finds the h that it starts from.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.linear_attn import num_segments
from flacompile.ops.kernels.rows import _segment, _store, _tile

PROGRAMS = 396  # fill the largest GPUs, three on each multiprocessor
# A thread has eight channels, 16 bytes of bf16, of one strip; 64 of all channels are 128 in a row.
FORWARD = {"ROWS": 4, "STRIPS": 16, "COLUMNS": 64, "num_warps": 4}
BACKWARD = {"ROWS": 4, "STRIPS": 16, "COLUMNS": 64, "num_warps": 4}


@triton.jit
def follow(a, x, a_next, x_next):
    """h -> a h + x, then h -> a_next h + x_next, as one such step: what a scan is made of."""
    return a * a_next, a_next * x + x_next


@triton.jit
def _follow_and_before(a, x, b, y, a_next, x_next, b_next, y_next):
    """``follow``, and in (b, y) the same without its last step."""
    return a * a_next, a_next * x + x_next, a * b_next, b_next * x + y_next


@triton.jit
def _owned(D, SEGMENTS, COLUMNS: tl.constexpr):
    """Sequence, segment and channels of this program."""
    blocks = tl.cdiv(D, COLUMNS)
    n = (tl.program_id(0) // (blocks * SEGMENTS)).to(tl.int64)
    segment = tl.program_id(0) // blocks % SEGMENTS
    d = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    return n, segment, d


@triton.jit
def _scan(a, x, h, ROWS: tl.constexpr, STRIPS: tl.constexpr):
    """The h of all tokens of a block, from the h before it; the block's decay; h after it."""
    # 1. Each strip by itself, and what it makes of the h before it.
    reach, x = tl.associative_scan((a, x), 0, follow)
    last = (tl.arange(0, ROWS) == ROWS - 1)[:, None, None]
    a_strip = tl.sum(tl.where(last, reach, 0.0), 0)
    x_strip = tl.sum(tl.where(last, x, 0.0), 0)

    # 2. The same of all strips up to each, with it (a, x) and without (b, y).
    b, y = tl.full(a_strip.shape, 1.0, tl.float32), tl.zeros(a_strip.shape, tl.float32)
    a_all, x_all, b, y = tl.associative_scan((a_strip, x_strip, b, y), 0, _follow_and_before)
    x += reach * (b * h[None, :] + y)[None, :, :]
    last_strip = (tl.arange(0, STRIPS) == STRIPS - 1)[:, None]
    decay = tl.sum(tl.where(last_strip, a_all, 0.0), 0)
    return x, decay, decay * h + tl.sum(tl.where(last_strip, x_all, 0.0), 0)


@triton.jit
def _join(h, decays, ends, first, count, step, d, D):
    """h after ``count`` segments, the slots of which are ``step`` apart."""
    for i in range(count):
        slot = (first + i * step) * D + d
        decay = tl.load(decays + slot, mask=d < D, other=0.0)
        h = decay * h + tl.load(ends + slot, mask=d < D, other=0.0)
    return h


@triton.jit
def _forward_kernel(
    g, x, state, cu_seqlens, decays, ends, h, final, T, D, SEGMENT, SEGMENTS,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h, or without it the decay of each segment but the last and what it adds."""
    # 1. What this program owns, and the h that it starts from.
    n, segment, d = _owned(D, SEGMENTS, COLUMNS)
    _, _, begin, stop = _segment(n, segment, T, SEGMENT, cu_seqlens)
    carry, total = tl.zeros([COLUMNS], tl.float32), tl.full([COLUMNS], 1.0, tl.float32)
    if h is None:
        if segment == SEGMENTS - 1:
            return
    else:
        carry += tl.load(state + n * D + d, mask=d < D, other=0.0)
        if ends is not None:
            carry = _join(carry, decays, ends, n * SEGMENTS, segment, 1, d, D)

    # 2. Its blocks. A token past the end leaves h as it is.
    t = tl.arange(0, STRIPS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    for first in range(begin, stop, ROWS * STRIPS):
        here, inside = first * D, t < stop - first
        a, x_t = tl.exp(_tile(g + here, t, inside, d, D)), _tile(x + here, t, inside, d, D)
        h_t, decay, carry = _scan(a, x_t, carry, ROWS, STRIPS)
        total *= decay
        if h is not None:
            _store(h + here, t, inside, d, D, h_t)

    if h is None:
        tl.store(ends + (n * SEGMENTS + segment) * D + d, carry, mask=d < D)
        tl.store(decays + (n * SEGMENTS + segment) * D + d, total, mask=d < D)
    elif segment == SEGMENTS - 1:
        tl.store(final + n * D + d, carry, mask=d < D)


@triton.jit
def _backward_kernel(
    g, state, cu_seqlens, decays, ends, h, dh, dfinal, dg, dx, dstate, T, D, SEGMENT, SEGMENTS,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dg and dx, or without them decay and addition, back in time, of each segment but the first.

    carry is the gradient of h that comes from the token after a block.
    """
    # 1. What this program owns, and the gradient that it starts from.
    n, segment, d = _owned(D, SEGMENTS, COLUMNS)
    start, end, begin, stop = _segment(n, segment, T, SEGMENT, cu_seqlens)
    carry, total = tl.zeros([COLUMNS], tl.float32), tl.full([COLUMNS], 1.0, tl.float32)
    if dx is None:
        if segment == 0:
            return
    else:
        carry += tl.load(dfinal + n * D + d, mask=d < D, other=0.0)
        state_d = tl.load(state + n * D + d, mask=d < D, other=0.0)
        if ends is not None:
            last = n * SEGMENTS + SEGMENTS - 1
            carry = _join(carry, decays, ends, last, SEGMENTS - 1 - segment, -1, d, D)

    back = tl.arange(0, STRIPS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    t = ROWS * STRIPS - 1 - back
    num_blocks = tl.cdiv(stop - begin, ROWS * STRIPS)
    for done in range(num_blocks):
        # 2. The recurrence back in time, each token with the decay of the one after it.
        first = begin + (num_blocks - 1 - done) * (ROWS * STRIPS)
        here, inside = first * D, t < stop - first
        a_next = tl.exp(_tile(g + here, t + 1, t + 1 < end - first, d, D))
        dh_t = _tile(dh + here, t, inside, d, D)
        dx_t, decay, carry = _scan(a_next, dh_t, carry, ROWS, STRIPS)
        total *= decay

        # 3. The gradient of the decay.
        if dx is not None:
            _store(dx + here, t, inside, d, D, dx_t)
            before = _tile(h + here, t - 1, inside & (t > start - first), d, D)
            is_first = tl.expand_dims(t == start - first, -1)
            before = tl.where(is_first, state_d[None, None, :], before)
            a = tl.exp(_tile(g + here, t, inside, d, D))
            _store(dg + here, t, inside, d, D, dx_t * a * before)

    if dx is None:
        tl.store(ends + (n * SEGMENTS + segment) * D + d, carry, mask=d < D)
        tl.store(decays + (n * SEGMENTS + segment) * D + d, total, mask=d < D)
    elif segment == 0:
        g_first = tl.load(g + start * D + d, mask=(d < D) & (start < end), other=0.0)
        tl.store(dstate + n * D + d, tl.exp(g_first) * carry, mask=d < D)


def tiles(D: int, dtype: torch.dtype, tile: dict[str, int]) -> dict[str, int]:
    """Block sizes and warps, no wider than D.

    Strips are shorter where they take more registers: in fp32, and where rows of memory are not
    aligned, so that a thread loads number by number.
    """
    D = int(D)  # a compiler's symbol would be no block size
    ROWS = tile["ROWS"] // (4 if D % 16 else 2 if dtype == torch.float32 else 1)
    return tile | {"ROWS": ROWS, "COLUMNS": min(tile["COLUMNS"], triton.next_power_of_2(D))}


def cut(
    N: Any, T: Any, D: int, tile: dict[str, int], device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[tuple[Any, ...], Any, Tensor | None, Tensor | None]:  # fmt: skip
    """The grid, the length and number of segments, and room for what each adds, if many."""
    blocks = triton.cdiv(D, tile["COLUMNS"])
    segments, block = num_segments(N * blocks, T, fill=PROGRAMS), tile["ROWS"] * tile["STRIPS"]
    length = -(-T // (segments * block)) * block
    grid, sizes = (N * segments * blocks,), (length, segments)
    if isinstance(segments, int) and segments == 1:
        return grid, sizes, None, None
    decays = torch.empty(N, segments, D, dtype=dtype, device=device)
    return grid, sizes, decays, torch.empty_like(decays)


def scan_forward(
    g: Tensor, x: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] in the dtype of x, and the final state [N, D].

    Args:
        g: fp32 natural-log decay, [B, T, D].
        x: [B, T, D], any float dtype.
        state: [N, D] fp32.
        cu_seqlens: [N + 1] bounds of packed sequences, on the device; B is then 1.
    """
    (_, T, D), N = x.shape, state.shape[0]
    g, x, state = g.contiguous(), x.contiguous(), state.contiguous()
    h, final = torch.empty_like(x), torch.empty_like(state)
    tile = tiles(D, x.dtype, FORWARD)
    grid, sizes, decays, ends = cut(N, T, D, tile, x.device)

    def run(state: Any, h: Any, final: Any) -> None:
        """One launch: the walk, or the first one, which finds the ends of segments."""
        launch(
            _forward_kernel, grid,
            g, x, state, cu_seqlens, decays, ends, h, final, T, D, *sizes, **tile,
        )  # fmt: skip

    if ends is not None:
        run(None, None, None)
    run(state, h, final)
    return h, final


def scan_backward(
    g: Tensor, state: Tensor, cu_seqlens: Tensor | None, h: Tensor, dh: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, dx in the dtype of h, and dstate, of arguments as in ``scan_forward``."""
    (_, T, D), N = h.shape, state.shape[0]
    g, state, h = g.contiguous(), state.contiguous(), h.contiguous()
    dh, dfinal = dh.contiguous(), dfinal.contiguous()
    dg, dx, dstate = torch.empty_like(g), torch.empty_like(h), torch.empty_like(state)
    tile = tiles(D, h.dtype, BACKWARD)
    grid, sizes, decays, ends = cut(N, T, D, tile, h.device)

    def run(*saved_and_gradients: Any) -> None:
        """As in ``scan_forward``, from the last token on."""
        state, h, dfinal, dg, dx, dstate = saved_and_gradients
        launch(
            _backward_kernel, grid, g, state, cu_seqlens, decays, ends, h, dh, dfinal,
            dg, dx, dstate, T, D, *sizes, **tile,
        )  # fmt: skip

    if ends is not None:
        run(None, None, None, None, None, None)
    run(state, h, dfinal, dg, dx, dstate)
    return dg, dx, dstate
