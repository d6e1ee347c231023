"""Triton kernels of `selective_scan`, forward and backward.

h_t = e^{dt_t A} h_{t-1} + dt_t u_t B_t^T        y_t = h_t C_t
dh_t = dy_t C_t^T + e^{dt_{t+1} A} dh_{t+1}      dg_t = dh_t e^{dt_t A} h_{t-1}, of g_t = dt_t A

Grid: one program a sequence and COLUMNS channels of one group. It takes a span of tokens at a time,
whose states [SPAN, COLUMNS, N] live in registers alone, as a scan along the tokens. The forward
leaves the state before each span in memory; from there the backward, which walks the spans from the
last to the first, makes the states again. Packed sequences find their spans without a count: those
of sequence n begin at slot cu_seqlens[n] // SPAN + n.

dA leaves the kernel as one sum a sequence, dB and dC as one a block of channels, added up by
PyTorch: no atomics, so that two runs give the same bits.

Left out: splitting one long sequence over several programs, for few sequences of few channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch
from flacompile.ops.kernels.rows import _bounds, _store, _tile
from flacompile.ops.kernels.scan import follow


@triton.jit
def _owned(D, G, COLUMNS: tl.constexpr):
    """The sequence, group, block in the group and channels of this program; channel D is none."""
    in_group = D // G
    blocks = tl.cdiv(in_group, COLUMNS)
    n = (tl.program_id(0) // (G * blocks)).to(tl.int64)
    group, block = tl.program_id(0) // blocks % G, tl.program_id(0) % blocks
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    return n, group, block, tl.where(c < in_group, group * in_group + c, D)


@triton.jit
def _first_slot(n, start, cu_seqlens, SLOTS, SPAN: tl.constexpr):
    if cu_seqlens is None:
        return n * SLOTS
    else:
        return start // SPAN + n


@triton.jit
def _drive(u, dt, B, t, inside, group, d, k, D, G, N: tl.constexpr):
    """dt, dt u [SPAN, COLUMNS] and B [SPAN, STATES] of tokens; zero where they are not inside."""
    dt_t = _tile(dt, t, inside, d, D)
    return dt_t, dt_t * _tile(u, t, inside, d, D), _tile(B, t * G + group, inside, k, N)


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, state, cu_seqlens, y, final, starts, T, D, G, SLOTS,
    N: tl.constexpr, STATES: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    # 1. What this program owns.
    n, group, _, d = _owned(D, G, COLUMNS)
    start, end = _bounds(n, cu_seqlens, T)
    slot = _first_slot(n, start, cu_seqlens, SLOTS, SPAN)
    i, k = tl.arange(0, SPAN), tl.arange(0, STATES)
    A_d = _tile(A, d, d < D, k, N)
    h = _tile(state, n * D + d, d < D, k, N)
    for first in range(start, end, SPAN):
        # 2. The states of the span. A token past the end keeps the one before it.
        t = first + i
        inside = t < end
        _store(starts, slot * D + d, d < D, k, N, h)
        dt_t, drive, B_t = _drive(u, dt, B, t, inside, group, d, k, D, G, N)
        a = tl.exp(dt_t[:, :, None] * A_d[None, :, :])
        reach, h_t = tl.associative_scan((a, drive[:, :, None] * B_t[:, None, :]), 0, follow)
        h_t += reach * h[None, :, :]

        # 3. Read them.
        C_t = _tile(C, t * G + group, inside, k, N)
        _store(y, t, inside, d, D, tl.sum(h_t * C_t[:, None, :], 2))
        h = tl.sum(tl.where((i == SPAN - 1)[:, None, None], h_t, 0.0), 0)
        slot += 1
    _store(final, n * D + d, d < D, k, N, h)


@triton.jit
def _backward_kernel(
    u, dt, A, B, C, cu_seqlens, starts, dy, dfinal, du, ddt, dA, dB, dC, dstate,
    T, D, G, SLOTS, NUM_TOKENS,
    N: tl.constexpr, STATES: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    # 1. What this program owns; dh is the gradient of the state after a span.
    n, group, block, d = _owned(D, G, COLUMNS)
    start, end = _bounds(n, cu_seqlens, T)
    slot = _first_slot(n, start, cu_seqlens, SLOTS, SPAN)
    i, k = tl.arange(0, SPAN), tl.arange(0, STATES)
    A_d = _tile(A, d, d < D, k, N)
    dh = _tile(dfinal, n * D + d, d < D, k, N)
    dA_d = tl.zeros([COLUMNS, STATES], tl.float32)
    partial = block.to(tl.int64) * NUM_TOKENS * G + group
    num_spans = tl.cdiv(end - start, SPAN)
    for done in range(num_spans):
        span = num_spans - 1 - done
        t = start + span * SPAN + i
        inside = t < end

        # 2. The state before each token: the scan of the tokens one earlier, the first changing
        #    nothing.
        earlier = (i > 0) & (t - 1 < end)
        dt_p, drive_p, B_p = _drive(u, dt, B, t - 1, earlier, group, d, k, D, G, N)
        a = tl.exp(dt_p[:, :, None] * A_d[None, :, :])
        reach, before = tl.associative_scan((a, drive_p[:, :, None] * B_p[:, None, :]), 0, follow)
        before += reach * _tile(starts, (slot + span) * D + d, d < D, k, N)[None, :, :]

        # 3. The gradient of each state, back in time.
        dy_t, C_t = _tile(dy, t, inside, d, D), _tile(C, t * G + group, inside, k, N)
        a = tl.exp(_tile(dt, t + 1, t + 1 < end, d, D)[:, :, None] * A_d[None, :, :])
        dh_t = dy_t[:, :, None] * C_t[:, None, :]
        reach, dh_t = tl.associative_scan((a, dh_t), 0, follow, reverse=True)
        dh_t += reach * dh[None, :, :]
        dh = tl.sum(tl.where((i == 0)[:, None, None], dh_t, 0.0), 0)

        # 4. The gradients of what made it: of drive = dt u and B, of the decay, of C.
        dt_t, drive, B_t = _drive(u, dt, B, t, inside, group, d, k, D, G, N)
        decayed = before * tl.exp(dt_t[:, :, None] * A_d[None, :, :])
        dg = dh_t * decayed
        dA_d += tl.sum(dg * dt_t[:, :, None], 0)
        ddrive = tl.sum(dh_t * B_t[:, None, :], 2)
        _store(du, t, inside, d, D, dt_t * ddrive)
        ddt_t = _tile(u, t, inside, d, D) * ddrive + tl.sum(dg * A_d[None, :, :], 2)
        _store(ddt, t, inside, d, D, ddt_t)
        row = partial + t * G
        _store(dB, row, inside, k, N, tl.sum(dh_t * drive[:, :, None], 1))
        h_t = decayed + drive[:, :, None] * B_t[:, None, :]
        _store(dC, row, inside, k, N, tl.sum(h_t * dy_t[:, :, None], 1))

    # 5. What the first token lets through, and the sums.
    dt_first = tl.load(dt + start * D + d, mask=(d < D) & (start < end), other=0.0)
    _store(dstate, n * D + d, d < D, k, N, tl.exp(dt_first[:, None] * A_d) * dh)
    _store(dA, n * D + d, d < D, k, N, dA_d)


def tiles(channels: int, N: int) -> dict[str, int]:
    """Block sizes and warps: a thread has one channel and state, and all tokens of a span of it.

    Register and spill counts, which tests/compile_kernels.py prints, decide the number of warps.
    """
    STATES = triton.next_power_of_2(int(N))  # a compiler's symbol would be no number of warps
    COLUMNS = min(max(1, 256 // STATES), triton.next_power_of_2(int(channels)))
    return {"STATES": STATES, "COLUMNS": COLUMNS, "num_warps": max(1, STATES * COLUMNS // 32)}


def _grid(D: int, G: int, sequences: int, columns: int) -> tuple[int]:
    return (sequences * G * triton.cdiv(D // G, columns),)


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
        starts: fp32, [B, slots, D, N].
        span: tokens a span.
    """
    (_, T, D), (G, N) = u.shape, B.shape[2:]
    inputs = [x.contiguous() for x in (u, dt, A, B, C, state)]
    y, final = torch.empty_like(inputs[0]), torch.empty_like(inputs[5])
    meta = tiles(D // G, N)
    launch(
        _forward_kernel, _grid(D, G, state.shape[0], meta["COLUMNS"]),
        *inputs, cu_seqlens, y, final, starts, T, D, G, starts.shape[1], N=N, SPAN=span, **meta,
    )  # fmt: skip
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
    meta = tiles(D // G, N)
    blocks = triton.cdiv(D // G, meta["COLUMNS"])
    du, ddt, dstate = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(dfinal)
    dA = torch.empty(sequences, D, N, dtype=torch.float32, device=u.device)
    dB, dC = (
        torch.empty(blocks, batch, T, G, N, dtype=torch.float32, device=u.device) for _ in "BC"
    )
    launch(
        _backward_kernel, _grid(D, G, sequences, meta["COLUMNS"]),
        u, dt, A, B, C, cu_seqlens, starts, dy, dfinal, du, ddt, dA, dB, dC, dstate,
        T, D, G, starts.shape[1], batch * T, N=N, SPAN=span, **meta,
    )  # fmt: skip
    return du, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dstate
