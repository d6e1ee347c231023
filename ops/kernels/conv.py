"""Triton kernels of `conv`, forward and backward: every token is read from memory once.

y_t = bias + sum_i weight_i x_{t-W+1+i}
dx_t = sum_i weight_i dy_{t+W-1-i} + dfinal_{t+W-1-T}        dweight_i = sum_t dy_t x_{t-W+1+i}

Grid: programs of COLUMNS channels and either the ends of one sequence, its new state or the
gradient of its old one, or a run of RUN tokens in one row of the batch, ROWS at a time. The taps of
those, [TAPS, ROWS, COLUMNS], overlap, so that all but the first read of a token are from cache.
A tap before the first token of a sequence points into its state.

A program adds its share of dweight and dbias up in registers and ``_sums_kernel`` those of all
programs, in one order: no atomics, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.rows import _bounds, _sequence_of, _store, _tile

COLUMNS = 64
RUN = 256  # enough tokens to make the sum over runs cheap, few enough to fill a GPU
# Of a block a thread has eight channels of one token, 16 bytes of bf16, and all their taps.
TILE = {"ROWS": 16, "COLUMNS": COLUMNS, "RUN": RUN, "num_warps": 4}
SUMS = {"ROWS": 32, "COLUMNS": COLUMNS, "num_warps": 4}


@triton.jit
def _run(N, T, RUN: tl.constexpr):
    """Number, row of the batch, first token and the one after the last of this program's tokens."""
    run = tl.program_id(0) - N
    in_a_row = tl.cdiv(T, RUN)
    first = run % in_a_row * RUN
    row = (run // in_a_row).to(tl.int64)
    return run.to(tl.int64), row, first, tl.minimum(first + RUN, T)


@triton.jit
def _sequences(first, t, row, cu_seqlens, T, N):
    """Sequences of tokens first + t and their bounds, counted from ``first``.

    Of a pack there is one sequence a token; of a batch one for all.
    """
    if cu_seqlens is None:
        return row, -first, T - first
    else:
        n = _sequence_of(first + t, cu_seqlens, N)
        start = tl.load(cu_seqlens + n).to(tl.int32) - first
        return n, start, tl.load(cu_seqlens + n + 1).to(tl.int32) - first


@triton.jit
def _input(x, state, at, mask, n, start, c, C, W: tl.constexpr):
    """Inputs at tokens ``at``, those before the start of a sequence from its state."""
    past = state + (n * (W - 1) + (at - start + W - 1)) * C
    rows = tl.expand_dims(tl.where(at >= start, x + at * C, past), -1)
    return tl.load(rows + c, mask=tl.expand_dims(mask, -1) & (c < C), other=0.0).to(tl.float32)


@triton.jit
def _taps(x, state, i, t, inside, n, start, c, C, W: tl.constexpr):
    """The inputs that go into y_t, [TAPS, ROWS, COLUMNS]."""
    at = t[None, :] + i[:, None] - (W - 1)
    return _input(x, state, at, (i < W)[:, None] & inside[None, :], n, start, c, C, W)


@triton.jit
def _input_gradient(dy, dfinal, w, i, t, inside, n, start, end, c, C, W: tl.constexpr):
    """The gradient of ``_input`` at tokens t >= start - (W - 1)."""
    at = t[None, :] + W - 1 - i[:, None]
    mask = (i < W)[:, None] & inside[None, :] & (at >= start) & (at < end)
    late = t + W - 1 - end
    kept = _tile(dfinal, n * (W - 1) + late, inside & (late >= 0) & (late < W - 1), c, C)
    return kept + tl.sum(w[:, None, :] * _tile(dy, at, mask, c, C), 0)


@triton.jit
def _weights(weight, i, c, C, W: tl.constexpr):
    """[TAPS, COLUMNS] in fp32."""
    mask = (i < W)[:, None] & (c < C)[None, :]
    return tl.load(weight + c[None, :] * W + i[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, weight, bias, state, cu_seqlens, y, final, T, N, C,
    W: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """y at a run of tokens, or the last W - 1 inputs of a sequence."""
    i, t = tl.arange(0, TAPS), tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(0) < N:
        n = tl.program_id(0).to(tl.int64)
        start, end = _bounds(n, cu_seqlens, T)
        past, length = i < W - 1, (end - start).to(tl.int32)
        last = _input(x + end * C, state, i - (W - 1), past, n, -length, c, C, W)
        _store(final + n * (W - 1) * C, i, past, c, C, last)
    else:
        _run_number, row, begin, stop = _run(N, T, RUN)
        w = _weights(weight, i, c, C, W)
        level = tl.zeros([COLUMNS], tl.float32)
        if bias is not None:
            level += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        for first in range(begin, stop, ROWS):
            here, inside = (row * T + first) * C, t < T - first
            n, start, end = _sequences(first, t, row, cu_seqlens, T, N)
            X = _taps(x + here, state, i, t, inside, n, start, c, C, W)
            _store(y + here, t, inside, c, C, level + tl.sum(w[:, None, :] * X, 0))


@triton.jit
def _backward_kernel(
    x, weight, state, cu_seqlens, dy, dfinal, dx, dstate, sums, T, N, C,
    W: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """dx at a run of tokens with its share of dweight (W rows of sums) and dbias (the row after),
    or the gradient of the W - 1 inputs before a sequence."""
    i, t = tl.arange(0, TAPS), tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = _weights(weight, i, c, C, W)
    if tl.program_id(0) < N:
        n = tl.program_id(0).to(tl.int64)
        start, end = _bounds(n, cu_seqlens, T)
        past, length = i < W - 1, (end - start).to(tl.int32)
        gradient = _input_gradient(
            dy + start * C, dfinal, w, i, i - (W - 1), past, n, 0, length, c, C, W
        )
        _store(dstate + n * (W - 1) * C, i, past, c, C, gradient)
    else:
        run, row, begin, stop = _run(N, T, RUN)
        dw = tl.zeros([TAPS, ROWS, COLUMNS], tl.float32)
        db = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(begin, stop, ROWS):
            here, inside = (row * T + first) * C, t < T - first
            n, start, end = _sequences(first, t, row, cu_seqlens, T, N)
            dx_t = _input_gradient(dy + here, dfinal, w, i, t, inside, n, start, end, c, C, W)
            _store(dx + here, t, inside, c, C, dx_t)
            dy_t = _tile(dy + here, t, inside, c, C)
            dw += dy_t[None, :, :] * _taps(x + here, state, i, t, inside, n, start, c, C, W)
            db += dy_t
        sums += run * (W + 1) * C
        _store(sums, i, i < W, c, C, tl.sum(dw, 1))
        tl.store(sums + W * C + c, tl.sum(db, 0), mask=c < C)


@triton.jit
def _sums_kernel(
    sums, dweight, dbias, RUNS, C, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One column of dweight, or dbias: what all runs add to it."""
    i = tl.program_id(1)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, RUNS, ROWS):
        run = first + tl.arange(0, ROWS).to(tl.int64)
        total += _tile(sums + i * C, run * (W + 1), run < RUNS, c, C)
    total = tl.sum(total, 0)
    if i < W:
        tl.store(dweight + c * W + i, total.to(dweight.dtype.element_ty), mask=c < C)
    elif dbias is not None:
        tl.store(dbias + c, total.to(dbias.dtype.element_ty), mask=c < C)


def tiles(W: int) -> dict[str, int]:
    """Block sizes and warps of a filter of W taps."""
    return {"W": W, "TAPS": triton.next_power_of_2(W), **TILE}


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
    bias = None if bias is None else bias.contiguous()
    y, final = torch.empty_like(x), torch.empty_like(state)
    launch(
        _forward_kernel, (N + B * triton.cdiv(T, RUN), triton.cdiv(C, COLUMNS)),
        x, weight, bias, state, cu_seqlens, y, final, T, N, C, **tiles(W),
    )  # fmt: skip
    return y, final


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None,
    dy: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dbias (empty without a bias) and dstate, of arguments as in ``conv_forward``."""
    (B, T, C), W, N = x.shape, weight.shape[1], state.shape[0]
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    dy, dfinal = dy.contiguous(), dfinal.contiguous()
    dx, dstate = torch.empty_like(x), torch.empty_like(state)
    dweight = torch.empty_like(weight)
    dbias = dy.new_empty(0) if bias is None else bias.new_empty(C)
    runs, columns = B * triton.cdiv(T, RUN), triton.cdiv(C, COLUMNS)
    sums = torch.empty(runs, W + 1, C, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, (N + runs, columns),
        x, weight, state, cu_seqlens, dy, dfinal, dx, dstate, sums, T, N, C, **tiles(W),
    )  # fmt: skip
    launch(
        _sums_kernel, (columns, W if bias is None else W + 1),
        sums, dweight, None if bias is None else dbias, runs, C, W=W, **SUMS,
    )  # fmt: skip
    return dx, dweight, dbias, dstate
