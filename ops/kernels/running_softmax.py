"""Triton kernel of `running_softmax`: a scan of maxima, in float64 between the loads and stores.

m_t = max(m_{t-1} - r_t, x_t)        weight_t = e^{x_t - m_t}        g_t = m_{t-1} - r_t - m_t

Grid: one program a (sequence, segment, COLUMNS channels), as in ``scan``. It takes ROWS tokens at a
time. What is scanned is each token's predecessor, which gives m_{t-1}; m_t is one step more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.rows import _segment, _store, _tile
from flacompile.ops.kernels.scan import _owned, cut

TILE = {"ROWS": 32, "STRIPS": 1, "COLUMNS": 32}


@triton.jit
def _rise(fall, m, fall_next, m_next):
    """m -> max(m - fall, x) twice, as one such step."""
    return fall + fall_next, tl.maximum(m - fall_next, m_next)


@triton.jit
def _kernel(
    x, rate, state, cu_seqlens, falls, ends, weight, g, final, T, D, SEGMENT, SEGMENTS,
    LOWEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """weight and g, or without them the fall and the maximum of each segment but the last."""
    # 1. What this program owns, and the maximum before it.
    n, segment, d = _owned(D, SEGMENTS, COLUMNS)
    _, _, begin, stop = _segment(n, segment, T, SEGMENT, cu_seqlens)
    m, total = tl.full([COLUMNS], LOWEST, tl.float64), tl.zeros([COLUMNS], tl.float64)
    if weight is None:
        if segment == SEGMENTS - 1:
            return
    else:
        m = tl.maximum(m, tl.load(state + n * D + d, mask=d < D, other=0.0).to(tl.float64))
        if ends is not None:
            for i in range(segment):
                slot = (n * SEGMENTS + i) * D + d
                fall = tl.load(falls + slot, mask=d < D, other=0.0)
                m = tl.maximum(m - fall, tl.load(ends + slot, mask=d < D, other=0.0))

    # 2. Its blocks. A token past the end leaves m as it is.
    t = tl.arange(0, ROWS)
    for first in range(begin, stop, ROWS):
        here, inside, later = first * D, t < stop - first, (t > 0) & (t <= stop - first)
        r_before = _tile(rate + here, t - 1, later, d, D).to(tl.float64)
        x_before = _tile(x + here, t - 1, later, d, D).to(tl.float64)
        x_before = tl.where(later[:, None], x_before, LOWEST)
        fall, high = tl.associative_scan((r_before, x_before), 0, _rise)
        before = tl.maximum(m[None, :] - fall, high)
        r = _tile(rate + here, t, inside, d, D).to(tl.float64)
        x_t = tl.where(inside[:, None], _tile(x + here, t, inside, d, D).to(tl.float64), LOWEST)
        m_t = tl.maximum(before - r, x_t)
        if weight is not None:
            _store(weight + here, t, inside, d, D, tl.exp((x_t - m_t).to(tl.float32)))
            decay = tl.minimum((before - m_t) - r, 0.0)
            _store(g + here, t, inside, d, D, tl.where(before > LOWEST, decay, 0.0))
        m = tl.max(tl.where((t == ROWS - 1)[:, None], m_t, LOWEST), 0)
        total += tl.sum(r, 0)

    if weight is None:
        tl.store(ends + (n * SEGMENTS + segment) * D + d, m, mask=d < D)
        tl.store(falls + (n * SEGMENTS + segment) * D + d, total, mask=d < D)
    elif segment == SEGMENTS - 1:
        tl.store(final + n * D + d, m.to(tl.float32), mask=d < D)


def running_softmax(
    x: Tensor, rate: Tensor, state: Tensor, cu_seqlens: Tensor | None, lowest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """weight and g [B, T, D], and the last maximum [N, D], all fp32.

    Args:
        x: logits, [B, T, D] fp32; -inf weighs nothing.
        rate: r, [B, T, D] fp32, >= 0.
        state: the maximum before the first token, [N, D] fp32, at least ``lowest``.
        cu_seqlens: [N + 1] bounds of packed sequences, on the device; B is then 1.
        lowest: the maximum of no tokens.
    """
    (_, T, D), N = x.shape, state.shape[0]
    x, rate, state = x.contiguous(), rate.contiguous(), state.contiguous()
    weight, g, final = torch.empty_like(x), torch.empty_like(x), torch.empty_like(state)
    grid, sizes, falls, ends = cut(N, T, D, TILE, x.device, torch.float64)

    def run(*outputs: Any) -> None:
        """One launch: the walk, or the first one, which finds the ends of segments."""
        launch(
            _kernel, grid, x, rate, state, cu_seqlens, falls, ends, *outputs, T, D, *sizes,
            LOWEST=lowest, ROWS=TILE["ROWS"], COLUMNS=TILE["COLUMNS"], num_warps=4,
        )  # fmt: skip

    if ends is not None:
        run(None, None, None)
    run(weight, g, final)
    return weight, g, final
