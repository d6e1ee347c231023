"""The selective state space of Mamba (Gu & Dao 2023, arXiv 2312.00752).

    h_t = e^{dt_t A} h_{t-1} + dt_t u_t B_t^T        y_t = h_t C_t

The states of all tokens, [B, T, D, N], would be N times the input: no device ever holds them. A
span of tokens at a time is worked through, and the states before each span are what the forward
keeps; from them the backward makes a span's states again.
"""

from typing import Any

import torch
from torch import Tensor

from flacompile.ops import context
from flacompile.ops.define import define
from flacompile.ops.pairs import scan_, scan_chunks, sequences
from flacompile.ops.validate import check_selective_scan

# Tokens: few enough [D, N] states for a CPU's cache or a GPU's registers. The op takes it as an
# argument, as it decides a shape: Inductor's cache knows a call by its arguments alone.
SPAN = 16

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Pair:
    """y_t = h_t C_t with h_t = e^{dt_t A} h_{t-1} + dt_t u_t B_t^T.

    Under autocast u, B and C are taken in the autocast dtype; sums are fp32 always.

    Args:
        u: [B, T, D].
        dt: step sizes, >= 0, fp32, [B, T, D].
        A: natural-log decay of a unit step, <= 0, fp32, [D, N].
        B, C: [B, T, G, N], each group for D / G channels, in the dtype of u.
        state: h before the first token, [batch or number of packed sequences, D, N] fp32; None is
            zero.
        cu_seqlens: bounds of the packed sequences, one more than there are, int32 or int64, first
            0, last T; then the batch is 1. Sequences may be empty.

    Returns:
        y [B, T, D] in the dtype of u, and the final state.

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also dt < 0 or A > 0.
    """
    device = u.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        u, B, C = u.to(dtype), B.to(dtype), C.to(dtype)
    check_selective_scan(u, dt, A, B, C, state, cu_seqlens)
    if state is None:
        num_sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dtype = torch.promote_types(u.dtype, torch.float32)
        state = u.new_zeros(num_sequences, *A.shape, dtype=dtype)
    dt, A = dt.to(state.dtype), A.to(state.dtype)
    if context.active():
        context.whole_sequences(cu_seqlens)
        left = _forward(u, dt, A, B, C, state, None, SPAN)[1]
        state = context.incoming(state, left, (dt.sum(1)[..., None] * A).exp())
    return _forward(u, dt, A, B, C, state, cu_seqlens, SPAN)[:2]


def selective_scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor
) -> Pair:
    """One token of ``selective_scan`` in plain PyTorch.

    Args:
        u, dt: [B, D].
        A: [D, N].
        B, C: [B, G, N].
        state: [B, D, N] fp32.

    Returns:
        y [B, D] in the dtype of u, and the new state.
    """
    wide = [x.to(state.dtype) for x in (u, dt, A, B, C)]
    a, x = _recurrence(*wide[:4])
    state = a * state + x
    return _read(state, wide[4]).to(u.dtype), state


def _outer(s: Tensor, z: Tensor) -> Tensor:
    """s_d z_n for the group of d: [*, D], [*, G, N] -> [*, D, N]."""
    s = s.unflatten(-1, (z.shape[-2], -1))
    return (s[..., None] * z[..., None, :]).flatten(-3, -2)


def _read(h: Tensor, z: Tensor) -> Tensor:
    """sum_n h_dn z_n for the group of d: [*, D, N], [*, G, N] -> [*, D]."""
    h = h.unflatten(-2, (z.shape[-2], -1))
    return (h @ z[..., None]).flatten(-3)


def _gather(s: Tensor, h: Tensor, groups: int) -> Tensor:
    """sum_d s_d h_dn over the d of each group: [*, D], [*, D, N] -> [*, G, N]."""
    s, h = s.unflatten(-1, (groups, -1)), h.unflatten(-2, (groups, -1))
    return (s[..., None, :] @ h).squeeze(-2)


def _recurrence(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Pair:
    """a and x of h_t = a_t h_{t-1} + x_t, [*, D, N]."""
    return (dt[..., None] * A).exp_(), _outer(dt * u, B)


def decomposed(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, span: int,
) -> Triple:  # fmt: skip
    """The op as a fixed number of aten operations, for exporters; not for packed sequences.

    What must hold any T without a loop holds the states of all tokens, [B, T, D, N]. The states
    before each span stay zero: only a backward reads them.
    """
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None in an exported graph, got packed sequences")
    wide = [z.to(state.dtype) for z in (u, B, C)]
    g, x = dt[..., None] * A, _outer(dt * wide[0], wide[1])
    h, final = scan_chunks(g.flatten(2), x.flatten(2), state.flatten(1))
    y = _read(h.unflatten(2, A.shape), wide[2])
    starts = state.new_zeros(_starts_shape(u, state, cu_seqlens, span))
    return y.to(u.dtype), final.reshape(state.shape).contiguous(), starts


def _spans(time: int, cu_seqlens: Tensor | None, span: int) -> list[tuple[slice, int, slice]]:
    """(rows of the state, slot, tokens) of every span; for the slots see ``_starts_shape``."""
    found = []
    for n, tokens in sequences(time, cu_seqlens):
        slot = 0 if cu_seqlens is None else tokens.start // span + n.start
        for i, first in enumerate(range(tokens.start, tokens.stop, span)):
            found.append((n, slot + i, slice(first, min(first + span, tokens.stop))))
    return found


def _starts_shape(
    u: Tensor, state: Tensor, cu_seqlens: Tensor | None, span: int
) -> tuple[int, ...]:
    """The states before each span, [B, slots, D, N]; what no span has is zero.

    The slots of packed sequence n begin at cu_seqlens[n] // span + n, which needs no count of the
    spans before it. There is one more than that takes: a trace would specialise on a single slot.
    """
    in_a_row = 1 if cu_seqlens is None else state.shape[0]
    return u.shape[0], u.shape[1] // span + in_a_row + 1, *state.shape[1:]


@torch.autocast("cpu", enabled=False)  # sums are fp32, whatever the caller's context
def selective_scan_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, span: int,
) -> Triple:  # fmt: skip
    """y, the final state and the states before each span, on a CPU."""
    for name, log_decay in (("dt", -dt), ("A", A)):
        if log_decay.numel() and log_decay.max() > 0:
            raise ValueError(f"{name}: expected dt >= 0 and A <= 0, got one of the other sign")
    y, h = u.new_empty(u.shape), state.clone()
    starts = state.new_zeros(_starts_shape(u, state, cu_seqlens, span))
    for n, slot, tokens in _spans(u.shape[1], cu_seqlens, span):
        starts[:, slot] = h[n]
        u_n, dt_n, B_n, C_n = (z[:, tokens].to(state.dtype) for z in (u, dt, B, C))
        _, states = _states(u_n, dt_n, A, B_n, h[n])
        h[n] = states[:, -1]
        y[:, tokens] = _read(states, C_n)
    return y, h, starts


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, start: Tensor) -> Pair:
    """The decays and states of a span, [B, T, D, N]."""
    a, x = _recurrence(u, dt, A, B)
    x[:, 0] += a[:, 0] * start
    return a, scan_(a[:, 1:], x)


def _forward_cuda(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, span: int,
) -> Triple:  # fmt: skip
    from flacompile.ops.kernels import selective_scan as kernels

    starts = state.new_empty(_starts_shape(u, state, cu_seqlens, span))
    y, final = kernels.selective_scan_forward(u, dt, A, B, C, state, cu_seqlens, starts, span)
    return y, final, starts


def _forward_fake(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor,
    cu_seqlens: Tensor | None, span: int,
) -> Triple:  # fmt: skip
    return (
        u.new_empty(u.shape),
        state.new_empty(state.shape),
        state.new_empty(_starts_shape(u, state, cu_seqlens, span)),
    )


@torch.autocast("cpu", enabled=False)
def selective_scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None,
    starts: Tensor, dy: Tensor, dfinal: Tensor, span: int,
) -> Gradients:  # fmt: skip
    """Gradients of every input, on a CPU: spans from the last to the first, each made again."""
    du, ddt, dB, dC = (torch.empty_like(x, dtype=A.dtype) for x in (u, dt, B, C))
    dA, dh, groups = torch.zeros_like(A), dfinal.clone(), B.shape[2]
    for n, slot, tokens in reversed(_spans(u.shape[1], cu_seqlens, span)):
        u_n, dt_n, B_n, C_n, dy_n = (z[:, tokens].to(A.dtype) for z in (u, dt, B, C, dy))
        a, h = _states(u_n, dt_n, A, B_n, starts[:, slot])
        dx = _outer(dy_n, C_n)
        dx[:, -1] += dh[n]
        scan_(a[:, 1:], dx, reverse=True)  # the gradient of each x is that of its h
        dg = a.mul_(dx)  # in place, as every temporary this large costs more than the arithmetic
        dh[n] = dg[:, 0]
        dg[:, 0] *= starts[:, slot]
        dg[:, 1:] *= h[:, :-1]
        d_drive = _read(dx, B_n)  # of dt u
        du[:, tokens] = dt_n * d_drive
        ddt[:, tokens] = u_n * d_drive + torch.einsum("btdn,dn->btd", dg, A)
        dA += dg.mul_(dt_n[..., None]).sum((0, 1))
        dB[:, tokens] = _gather(dt_n * u_n, dx, groups)
        dC[:, tokens] = _gather(dy_n, h, groups)
    return du.to(u.dtype), ddt, dA, dB.to(B.dtype), dC.to(C.dtype), dh


def _backward_cuda(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None,
    starts: Tensor, dy: Tensor, dfinal: Tensor, span: int,
) -> Gradients:  # fmt: skip
    from flacompile.ops.kernels import selective_scan as kernels

    return kernels.selective_scan_backward(u, dt, A, B, C, cu_seqlens, starts, dy, dfinal, span)


def _backward_fake(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None,
    starts: Tensor, dy: Tensor, dfinal: Tensor, span: int,
) -> Gradients:  # fmt: skip
    new = [x.new_empty(x.shape) for x in (u, dt, A, B, C, dfinal)]
    return new[0], new[1], new[2], new[3], new[4], new[5]


_forward = define(selective_scan_forward, _forward_cuda, _forward_fake)
_backward = define(selective_scan_backward, _backward_cuda, _backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    u, dt, A, B, C, _, cu_seqlens, ctx.span = inputs
    ctx.set_materialize_grads(False)  # of the states before spans it would be as large as they are
    ctx.save_for_backward(u, dt, A, B, C, cu_seqlens, output[2])


def _backward_of_op(
    ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dstarts: None
) -> tuple[Tensor | None, ...]:
    u, dt, A, B, C, cu_seqlens, starts = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(u)
    if dfinal is None:
        num_sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dfinal = A.new_zeros(num_sequences, *A.shape)
    inputs = (u, dt, A, B, C, cu_seqlens, starts, dy, dfinal)
    return *_backward(*inputs, ctx.span), None, None


def _flops(u: Any, dt: Any, A: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Three multiply-adds a token, channel and state: the decay's exponent, h and y."""
    batch, time, channels = u
    return 6 * batch * time * channels * A[1]


_forward.differentiate(_setup, _backward_of_op, _flops)
