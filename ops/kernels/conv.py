"""Triton kernels of `conv`, forward and backward.

y_t = bias + sum_i weight_i x_{t-W+1+i}
dx_t = sum_i weight_i dy_{t+W-1-i} + dfinal_{t+W-1-T}        dweight_i = sum_t dy_t x_{t-W+1+i}

Grid: one program a block of ROWS tokens, taken over all sequences, and COLUMNS channels. Its taps
overlap, so that all but the first read of a token are from cache: the work is moving memory. The
ends of a sequence, its new state and the gradient of its old one, have programs of their own: one a
sequence and COLUMNS channels. Tokens before the first one of a sequence are those of its state.

dweight and dbias leave the kernel as one sum a program, added up by PyTorch: no atomics, so that
two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch

COLUMNS = 64
TILE = {"ROWS": 64, "COLUMNS": COLUMNS, "num_warps": 8}  # with more a thread, registers spill


@triton.jit
def _bounds(n, cu_seqlens, T):
    """First token of each sequence n, and the one after its last, in all rows of the batch."""
    if cu_seqlens is None:
        return n * T, n * T + T
    else:
        return tl.load(cu_seqlens + n).to(tl.int64), tl.load(cu_seqlens + n + 1).to(tl.int64)


@triton.jit
def _tokens(block, segment, cu_seqlens, T, NUM_TOKENS, ROWS: tl.constexpr):
    """The tokens of a block, which of them exist, their sequences and the bounds of those."""
    t = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = t < NUM_TOKENS
    if segment is None:
        n = tl.where(inside, t, 0) // T
    else:
        n = tl.load(segment + t, mask=inside, other=0).to(tl.int64)
    start, end = _bounds(n, cu_seqlens, T)
    return t, inside, n, start, end


@triton.jit
def _tile(pointer, row, mask, c, C):
    """Rows of a [*, C] tensor in fp32, zero where masked; bf16 arithmetic starts nowhere."""
    mask = mask[:, None] & (c < C)[None, :]
    return tl.load(pointer + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _input(x, state, t, inside, n, start, c, C, W: tl.constexpr):
    """x_t, or for t before the start of its sequence what the state has in its place."""
    own = t >= start
    y = _tile(x, t, inside & own, c, C)
    if W > 1:
        y += _tile(state, n * (W - 1) + (t - start + W - 1), inside & (t < start), c, C)
    return y


@triton.jit
def _input_gradient(dy, dfinal, weight, t, inside, n, start, end, c, C, W: tl.constexpr):
    """The gradient of ``_input`` at t >= start - (W - 1)."""
    dx = _tile(dfinal, n * (W - 1) + (t + W - 1 - end), inside & (t + W - 1 >= end), c, C)
    for i in range(W):
        later = t + W - 1 - i
        w = tl.load(weight + c * W + i, mask=c < C, other=0.0).to(tl.float32)
        dx += w[None, :] * _tile(dy, later, inside & (later >= start) & (later < end), c, C)
    return dx


@triton.jit
def _store(pointer, row, mask, c, C, value):
    mask = mask[:, None] & (c < C)[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + row[:, None] * C + c[None, :], value, mask=mask)


@triton.jit
def _forward_kernel(
    x, weight, bias, state, segment, cu_seqlens, y, T, NUM_TOKENS, C,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y at one block of tokens and channels."""
    t, inside, n, start, _ = _tokens(tl.program_id(0), segment, cu_seqlens, T, NUM_TOKENS, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for i in range(W):
        w = tl.load(weight + c * W + i, mask=c < C, other=0.0).to(tl.float32)
        total += w[None, :] * _input(x, state, t - (W - 1) + i, inside, n, start, c, C, W)
    _store(y, t, inside, c, C, total)


@triton.jit
def _backward_kernel(
    x, weight, state, segment, cu_seqlens, dy, dfinal, dx, sums, T, NUM_TOKENS, C,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx, and the block's share of dweight (row i of sums) and dbias (row W)."""
    block = tl.program_id(0)
    t, inside, n, start, end = _tokens(block, segment, cu_seqlens, T, NUM_TOKENS, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gradient = _input_gradient(dy, dfinal, weight, t, inside, n, start, end, c, C, W)
    _store(dx, t, inside, c, C, gradient)

    sums += block.to(tl.int64) * (W + 1) * C
    dy_t = _tile(dy, t, inside, c, C)
    for i in range(W):
        tap = _input(x, state, t - (W - 1) + i, inside, n, start, c, C, W)
        tl.store(sums + i * C + c, tl.sum(dy_t * tap, 0), mask=c < C)
    tl.store(sums + W * C + c, tl.sum(dy_t, 0), mask=c < C)


@triton.jit
def _final_kernel(
    x, state, cu_seqlens, final, T, C,
    W: tl.constexpr, PAST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of one sequence; PAST is a power of two >= W - 1."""
    n, j = tl.program_id(0).to(tl.int64), tl.arange(0, PAST)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = _bounds(n, cu_seqlens, T)
    last = _input(x, state, end - (W - 1) + j, j < W - 1, n, start, c, C, W)
    _store(final, n * (W - 1) + j, j < W - 1, c, C, last)


@triton.jit
def _state_gradient_kernel(
    weight, cu_seqlens, dy, dfinal, dstate, T, C,
    W: tl.constexpr, PAST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the W - 1 inputs before one sequence."""
    n, j = tl.program_id(0).to(tl.int64), tl.arange(0, PAST)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = _bounds(n, cu_seqlens, T)
    before = start - (W - 1) + j
    gradient = _input_gradient(dy, dfinal, weight, before, j < W - 1, n, start, end, c, C, W)
    _store(dstate, n * (W - 1) + j, j < W - 1, c, C, gradient)


def _segments(cu_seqlens: Tensor | None, time: int) -> Tensor | None:
    """The sequence of each token of a pack."""
    if cu_seqlens is None:
        return None
    tokens = torch.arange(time, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T, C] in the dtype of x, and the last W - 1 inputs [N, W - 1, C].

    Args:
        x: [B, T, C], any float dtype.
        weight: [C, W], any float dtype.
        bias: [C] or None.
        state: [N, W - 1, C].
        cu_seqlens: [N + 1] bounds of packed sequences, on the device; B is then 1.
    """
    (B, T, C), W, N = x.shape, weight.shape[1], state.shape[0]
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    y, final = torch.empty_like(x), torch.empty_like(state)
    segment, columns = _segments(cu_seqlens, T), triton.cdiv(C, COLUMNS)
    launch(
        _forward_kernel, (triton.cdiv(B * T, TILE["ROWS"]), columns),
        x, weight, bias, state, segment, cu_seqlens, y, T, B * T, C,
        W=W, **TILE,
    )  # fmt: skip
    launch(
        _final_kernel, (N, columns), x, state, cu_seqlens, final, T, C,
        W=W, PAST=triton.next_power_of_2(W), COLUMNS=COLUMNS,
    )  # fmt: skip
    return y, final


def conv_backward(
    x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None, dy: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight and dbias in fp32, and dstate, of arguments as in ``conv_forward``."""
    (B, T, C), W, N = x.shape, weight.shape[1], state.shape[0]
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    dy, dfinal = dy.contiguous(), dfinal.contiguous()
    blocks, columns = triton.cdiv(B * T, TILE["ROWS"]), triton.cdiv(C, COLUMNS)
    dx, dstate = torch.empty_like(x), torch.empty_like(state)
    sums = torch.empty(blocks, W + 1, C, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, (blocks, columns),
        x, weight, state, _segments(cu_seqlens, T), cu_seqlens, dy, dfinal, dx, sums, T, B * T, C,
        W=W, **TILE,
    )  # fmt: skip
    launch(
        _state_gradient_kernel, (N, columns), weight, cu_seqlens, dy, dfinal, dstate, T, C,
        W=W, PAST=triton.next_power_of_2(W), COLUMNS=COLUMNS,
    )  # fmt: skip
    return dx, sums[:, :W].sum(0).T.contiguous(), sums[:, W].sum(0), dstate
