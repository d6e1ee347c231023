"""Triton kernels of `scan`, forward and backward: one pass over time.

h_t = e^{g_t} h_{t-1} + x_t
dx_t = dh_t + e^{g_{t+1}} dx_{t+1}        dg_t = dx_t e^{g_t} h_{t-1}        dstate = e^{g_1} dx_1

Grid: one program a sequence and COLUMNS channels. It takes ROWS tokens at a time, a scan in
registers, and carries h from one block to the next, so that every byte is moved once.

Left out: splitting one long sequence over several programs, for few sequences of few channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.rows import _bounds, _store, _tile

TILE = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4}


@triton.jit
def follow(a, x, a_next, x_next):
    """h -> a h + x, then h -> a_next h + x_next, as one such step: what a scan is made of."""
    return a * a_next, a_next * x + x_next


@triton.jit
def _owned(D, COLUMNS: tl.constexpr):
    """The sequence and the channels of this program."""
    blocks = tl.cdiv(D, COLUMNS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    return n, (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _forward_kernel(
    g, x, state, cu_seqlens, h, final, T, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    n, d = _owned(D, COLUMNS)
    start, end = _bounds(n, cu_seqlens, T)
    i = tl.arange(0, ROWS)
    carry = tl.load(state + n * D + d, mask=d < D, other=0.0)
    for first in range(start, end, ROWS):
        t = first + i
        inside = t < end
        a, x_t = tl.exp(_tile(g, t, inside, d, D)), _tile(x, t, inside, d, D)
        reach, h_t = tl.associative_scan((a, x_t), 0, follow)
        h_t += reach * carry[None, :]
        _store(h, t, inside, d, D, h_t)
        carry = tl.sum(tl.where((i == ROWS - 1)[:, None], h_t, 0.0), 0)  # rows past the end keep h
    tl.store(final + n * D + d, carry, mask=d < D)


@triton.jit
def _backward_kernel(
    g, state, cu_seqlens, h, dh, dfinal, dg, dx, dstate, T, D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # 1. What this program owns; carry is the gradient that comes from the token after a block.
    n, d = _owned(D, COLUMNS)
    start, end = _bounds(n, cu_seqlens, T)
    i = tl.arange(0, ROWS)
    state_d = tl.load(state + n * D + d, mask=d < D, other=0.0)
    carry = tl.load(dfinal + n * D + d, mask=d < D, other=0.0)
    num_blocks = tl.cdiv(end - start, ROWS)
    for done in range(num_blocks):
        # 2. The recurrence back in time, each token with the decay of the one after it.
        t = start + (num_blocks - 1 - done) * ROWS + i
        inside = t < end
        a_next = tl.exp(_tile(g, t + 1, t + 1 < end, d, D))
        dh_t = _tile(dh, t, inside, d, D)
        reach, dx_t = tl.associative_scan((a_next, dh_t), 0, follow, reverse=True)
        dx_t += reach * carry[None, :]
        carry = tl.sum(tl.where((i == 0)[:, None], dx_t, 0.0), 0)
        _store(dx, t, inside, d, D, dx_t)

        # 3. The gradient of the decay.
        before = _tile(h, t - 1, inside & (t > start), d, D)
        before = tl.where((t == start)[:, None], state_d[None, :], before)
        _store(dg, t, inside, d, D, dx_t * tl.exp(_tile(g, t, inside, d, D)) * before)
    g_first = tl.load(g + start * D + d, mask=(d < D) & (start < end), other=0.0)
    tl.store(dstate + n * D + d, tl.exp(g_first) * carry, mask=d < D)


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
    grid = (N * triton.cdiv(D, TILE["COLUMNS"]),)
    launch(_forward_kernel, grid, g, x, state, cu_seqlens, h, final, T, D, **TILE)
    return h, final


def scan_backward(
    g: Tensor, state: Tensor, cu_seqlens: Tensor | None, h: Tensor, dh: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, dx in the dtype of h, and dstate, of arguments as in ``scan_forward``."""
    (_, T, D), N = h.shape, state.shape[0]
    g, state, h = g.contiguous(), state.contiguous(), h.contiguous()
    dh, dfinal = dh.contiguous(), dfinal.contiguous()
    dg, dx, dstate = torch.empty_like(g), torch.empty_like(h), torch.empty_like(state)
    grid = (N * triton.cdiv(D, TILE["COLUMNS"]),)
    launch(
        _backward_kernel, grid,
        g, state, cu_seqlens, h, dh, dfinal, dg, dx, dstate, T, D, **TILE,
    )  # fmt: skip
    return dg, dx, dstate
