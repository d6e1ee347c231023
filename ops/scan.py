"""The elementwise recurrence of HGRN (Qin et al. 2023).

h_t = e^{g_t} h_{t-1} + x_t
"""

from typing import Any

import torch
from torch import Tensor

from flacompile.ops import context
from flacompile.ops.define import define
from flacompile.ops.pairs import scan_, scan_chunks, sequences
from flacompile.ops.validate import check_log_decay, check_scan

Pair = tuple[Tensor, Tensor]


def scan(
    g: Tensor, x: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Pair:
    """h_t = e^{g_t} h_{t-1} + x_t for every channel.

    Under autocast x is taken in the autocast dtype; sums are fp32 always.

    Args:
        g: natural-log decay, <= 0, fp32, [B, T, D].
        x: [B, T, D].
        state: h before the first token, [N, D] fp32; None is zero. N is B, or the number of packed
            sequences.
        cu_seqlens: bounds of the packed sequences, [N + 1], int32 or int64, first 0, last T; then
            B is 1. Sequences may be empty.

    Returns:
        h [B, T, D] in the dtype of x, and the final state [N, D].

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also g > 0.
    """
    device = g.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    check_scan(g, x, state, cu_seqlens)
    if state is None:
        num_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        state = x.new_zeros(num_sequences, x.shape[2], dtype=dtype)
    g = g.to(state.dtype)
    if context.active():
        context.whole_sequences(cu_seqlens)
        left = _forward(g, x, state, None)[1]
        state = context.incoming(state, left, g.sum(1).exp())
    return _forward(g, x, state, cu_seqlens)


def scan_step(g: Tensor, x: Tensor, *, state: Tensor) -> Pair:
    """One token of ``scan`` in plain PyTorch.

    Args:
        g, x: [B, D].
        state: [B, D] fp32.

    Returns:
        h [B, D] in the dtype of x, and the new state.
    """
    state = g.to(state.dtype).exp() * state + x.to(state.dtype)
    return state.to(x.dtype), state


def decomposed(g: Tensor, x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Pair:
    """The op as a fixed number of aten operations, for exporters; not for packed sequences."""
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None in an exported graph, got packed sequences")
    h, final = scan_chunks(g, x.to(state.dtype), state)
    return h.to(x.dtype), final.contiguous()


def scan_forward(g: Tensor, x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Pair:
    """The op on a CPU. The sign of g is checked here, where reading it costs no sync."""
    check_log_decay("g", g)
    a, h, final = g.exp(), x.to(state.dtype, copy=True), state.clone()
    for n, tokens in sequences(x.shape[1], cu_seqlens):
        a_n, h_n = a[:, tokens], h[:, tokens]
        h_n[:, 0] += a_n[:, 0] * state[n]
        scan_(a_n[:, 1:], h_n)
        final[n] = h_n[:, -1]
    return h.to(x.dtype), final


def _forward_cuda(g: Tensor, x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Pair:
    from flacompile.ops.kernels import scan as kernels

    return kernels.scan_forward(g, x, state, cu_seqlens)


def _forward_fake(g: Tensor, x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Pair:
    return x.new_empty(x.shape), state.new_empty(state.shape)


def scan_backward(
    g: Tensor, state: Tensor, cu_seqlens: Tensor | None, h: Tensor, dh: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dg, dx and dstate on a CPU; dx_t = dh_t + e^{g_{t+1}} dx_{t+1}, dg_t = dx_t e^{g_t} h_{t-1}.

    Args:
        h: what the forward returned.
        dh, dfinal: gradients of h and of the final state.
    """
    a, dx, dstate = g.exp(), dh.to(state.dtype, copy=True), dfinal.clone()
    dg = torch.empty_like(g, memory_format=torch.contiguous_format)
    for n, tokens in sequences(h.shape[1], cu_seqlens):
        a_n, dx_n = a[:, tokens], dx[:, tokens]
        dx_n[:, -1] += dfinal[n]
        scan_(a_n[:, 1:], dx_n, reverse=True)
        before = torch.cat([state[n, None], h[:, tokens][:, :-1]], 1)
        dg[:, tokens] = dx_n * a_n * before
        dstate[n] = dx_n[:, 0] * a_n[:, 0]
    return dg, dx.to(h.dtype), dstate


def _backward_cuda(
    g: Tensor, state: Tensor, cu_seqlens: Tensor | None, h: Tensor, dh: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flacompile.ops.kernels import scan as kernels

    return kernels.scan_backward(g, state, cu_seqlens, h, dh, dfinal)


def _backward_fake(
    g: Tensor, state: Tensor, cu_seqlens: Tensor | None, h: Tensor, dh: Tensor, dfinal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return g.new_empty(g.shape), h.new_empty(h.shape), state.new_empty(state.shape)


_forward = define(scan_forward, _forward_cuda, _forward_fake)
_backward = define(scan_backward, _backward_cuda, _backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    g, _, state, cu_seqlens = inputs
    ctx.save_for_backward(g, state, cu_seqlens, output[0])


def _backward_of_op(ctx: Any, dh: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*ctx.saved_tensors, dh, dfinal), None


def _flops(g: Any, x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One multiply-add a token and channel."""
    batch, time, channels = x
    return 2 * batch * time * channels


_forward.differentiate(_setup, _backward_of_op, _flops)
