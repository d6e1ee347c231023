"""The weights of a softmax over time: what every token counts, and how all before it decay.

    m_t = max(m_{t-1} - r_t, x_t)        weight_t = e^{x_t - m_t}        g_t = m_{t-1} - r_t - m_t

In plain PyTorch; on a GPU by a kernel, where PyTorch's scans take a thread a channel.
"""

from typing import Any

import torch
from torch import Tensor

from flacompile.ops.define import Op, define_cuda, on_plain_cuda

LOWEST = -(2.0**100)  # the maximum of no tokens: finite, so that differences are

Triple = tuple[Tensor, Tensor, Tensor]


def weigh(x: Tensor, rate: Tensor, start: Tensor, cu_seqlens: Tensor | None) -> Triple:
    """weight, g <= 0, and the last maximum of each sequence, a constant of autograd.

    Args:
        x: logits, [B, T, H, M], fp32 or fp64; -inf weighs nothing.
        rate: r, nats by which the weights of old tokens fall at each, in the shape of x, >= 0.
        start: m before the first token, [N, H, M], ``LOWEST`` where no token was seen.
        cu_seqlens: bounds of packed sequences, [N + 1] int64.

    Returns:
        weight and g in the shape of x, g zero where there is no token to decay, and m [N, H, M].
    """
    if x.dtype != torch.float32 or not on_plain_cuda((x, rate, start, cu_seqlens)):
        before, m, last = maxima(x.detach(), rate.detach().double(), start, cu_seqlens)
        return *_relative(x, rate, before, m), last
    flat = x.flatten(2), rate.flatten(2), start.float().flatten(1), cu_seqlens
    weight, g, last = _weigh(*flat)
    return weight.view_as(x), g.view_as(x), last.detach().view_as(start)


def _relative(x: Tensor, rate: Tensor, before: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """e^{x_t - m_t}, and m_{t-1} - r - m_t where there is a state to decay, in the dtype of x."""
    g = torch.where(before > LOWEST, before - m - rate, 0.0)
    g = g - g.detach().clamp(min=0)  # rounding may leave one above zero
    return (x - m).exp().to(x.dtype), g.to(x.dtype)


def weigh_step(x: Tensor, rate: Tensor, before: Tensor) -> Triple:
    """``weigh`` for one token, x, rate and before [B, H, M]."""
    m = torch.maximum(before - rate, x).detach()
    return *_relative(x, rate, before, m), m


def maxima(
    x: Tensor, rate: Tensor, start: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """m_{t-1} and m_t [B, T, H, M], and the last m of each sequence [N, H, M], in float64.

    m_t = max_s(x_s + r s) - r t. In a pack every sequence is raised above the one before it, which
    takes its maximum out of the next.
    """
    fall = rate.cumsum(1)
    if cu_seqlens is None:
        m = torch.cat((start[:, None].double(), x + fall), 1).cummax(1).values
        m = torch.cat((m[:, :1], m[:, 1:] - fall), 1)
        return m[:, :-1], m[:, 1:], m[:, -1]
    time = torch.arange(x.shape[1], device=x.device)
    segment = torch.searchsorted(cu_seqlens, time, right=True) - 1
    first = cu_seqlens[segment]
    low, high = (x + fall).aminmax(dim=1, keepdim=True)
    raised = (high - low + 1) * segment[:, None, None] - low
    m = (x + fall + raised).cummax(1).values - raised
    m = torch.maximum(m, start[segment] + (fall - rate)[:, first]) - fall
    before = torch.where((time == first)[:, None, None], start[segment], m.roll(1, 1))
    empty = (cu_seqlens.diff() == 0)[:, None, None]
    return before, m, torch.where(empty, start, m[0, (cu_seqlens[1:] - 1).clamp(min=0)])


def _cuda(x: Tensor, rate: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Triple:
    from flacompile.ops.kernels import running_softmax as kernels

    return kernels.running_softmax(x, rate, state, cu_seqlens, LOWEST)


def _fake(x: Tensor, rate: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Triple:
    return x.new_empty(x.shape), x.new_empty(x.shape), state.new_empty(state.shape)


_weigh = Op(define_cuda("running_softmax", _cuda, _fake), _cuda)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    ctx.save_for_backward(output[0])


def _backward(ctx: Any, dweight: Tensor, dg: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    """Neither mean nor gradients depend on m; and a state of no tokens takes no gradient."""
    (weight,) = ctx.saved_tensors
    return weight * dweight, -dg, None, None


def _flops(x: Any, *args: Any, **kwargs: Any) -> int:
    """A maximum and two differences a token and channel."""
    batch, time, channels = x
    return 3 * batch * time * channels


_weigh.differentiate(_setup, _backward, _flops)
