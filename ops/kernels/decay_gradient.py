"""Triton kernel for the gradient of a decay a channel: dg_t = dg_{t+1} + change_t, from the end.

change = p dp - m dm of the pair (p, dp) in plus and (m, dm) in minus. Grid: one program a
(sequence, head, block of channels), which walks time backwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.tiles import _load, _rows, _sequence, _store_rows

Pairs = list[tuple[Tensor, Tensor]]


@triton.jit
def _product(x, dx, at, by, inside, col, X: tl.constexpr):
    x = _load(x, at, by, inside, col, X).to(tl.float32)
    return x * _load(dx, at, by, inside, col, X).to(tl.float32)


@triton.jit
def _channel_kernel(
    p, dp, m, dm, end, cu_seqlens, dg, T, H,
    X: tl.constexpr, BX: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (X + BX - 1) // BX
    sequence_head = (tl.program_id(0) // BLOCKS).to(tl.int64)
    n, h = sequence_head // H, sequence_head % H
    start, length = _sequence(cu_seqlens, n, T)
    i, col = tl.arange(0, C), (tl.program_id(0) % BLOCKS) * BX + tl.arange(0, BX)
    after = tl.load(end + sequence_head * X + col, mask=col < X, other=0.0)
    for first in range(0, length, C):
        at, by, _later, inside, _ = _rows(first, i, start, length, h, H, True)
        change = _product(p, dp, at, by, inside, col, X)
        change -= _product(m, dm, at, by, inside, col, X)
        _store_rows(tl.cumsum(change, 0) + after[None, :], dg, at, by, inside, col, X)
        after += tl.sum(change, 0)


def decay_gradient(
    plus: Pairs, minus: Pairs, end: Tensor, g: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """dg as ``closed_backward.decay_gradient`` gives it of one pair on either side."""
    _, T, H, X = plus[0][0].shape
    tensors = [x.contiguous() for pair in plus + minus for x in pair]
    dg, BX = torch.empty_like(g), min(32, triton.next_power_of_2(X))
    launch(
        _channel_kernel, (end.shape[0] * H * triton.cdiv(X, BX),), *tensors, end.contiguous(),
        cu_seqlens, dg, T, H, X=X, BX=BX, C=64, num_warps=4,
    )  # fmt: skip
    return dg
