"""Softmax over time as a recurrence: what ABC and LightNet weigh tokens with.

    m_t = max(m_{t-1}, x_t)
    h_t = e^{m_{t-1} - m_t} h_{t-1} + e^{x_t - m_t}        m_t + log h_t = log Σ_{s<=t} e^{x_s}

A state that decays and grows as h does, S_t = e^{m_{t-1} - m_t} S_{t-1} + e^{x_t - m_t} v_t, gives
S_t / h_t, the mean of v under softmax(x_1 .. x_t). No exponent is positive and no sum of many
tokens is below one, whatever x is; neither mean nor gradient depends on m, a constant of autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flacompile.blocks import at_least_fp32
from flacompile.layers.base import Tokens
from flacompile.ops import scan, scan_step

LOWEST = -(2.0**100)  # the maximum of no tokens: finite, so that differences are

State = tuple[Tensor, Tensor]


def running_softmax(
    x: Tensor, state: State | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, State]:
    """Weights, decays and sums of weights.

    Args:
        x: logits [B, T, H, M]; -inf is a token without weight.
        state: m and h of N sequences [N, H, M] in fp32, h zero where no token was seen; None is
            that everywhere.
        cu_seqlens: bounds of packed sequences, [N + 1] int64.

    Returns:
        e^{x_t - m_t}, m_{t-1} - m_t and h_t, [B, T, H, M] in fp32, h one where it would be zero,
        and the next state.
    """
    x = at_least_fp32(x)
    if state is None:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = (x.new_zeros(sequences, *x.shape[2:]),) * 2
    start = _maximum(state)
    before, m, last = _running_maximum(x.detach(), start, cu_seqlens)
    weight, g = _relative(x, before, m)
    h, last_h = scan(
        g.flatten(2), weight.flatten(2), state=state[1].flatten(1), cu_seqlens=cu_seqlens
    )
    h = h.view_as(x)
    return weight, g, torch.where(h > 0, h, 1.0), (last, last_h.view_as(last))


def running_softmax_step(x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
    """One token of ``running_softmax``: x [B, H, M]."""
    x = at_least_fp32(x)
    before = _maximum(state)
    m = torch.maximum(before, x.detach())
    weight, g = _relative(x, before, m)
    _, h = scan_step(g.flatten(1), weight.flatten(1), state=state[1].flatten(1))
    h = h.view_as(x)
    return weight, g, h, (m, h)


def without_padding(x: Tensor, tokens: Tokens) -> Tensor:
    """Logits x [B, T, ...] with -inf at padding."""
    return torch.where(tokens.zero_padding(torch.ones_like(x)) > 0, x, -torch.inf)


def _maximum(state: State) -> Tensor:
    m, h = state
    return torch.where(h > 0, m, LOWEST).detach()


def _relative(x: Tensor, before: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """e^{x_t - m_t}, and m_{t-1} - m_t where there is a state to decay."""
    return (x - m).exp(), torch.where(before > LOWEST, before - m, 0.0)


def _running_maximum(
    x: Tensor, start: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """m_{t-1} and m_t [B, T, H, M], and the last m of each sequence [N, H, M].

    In a pack every sequence is raised above the one before it, which takes its maximum out of the
    next; float64 leaves room for that.
    """
    if cu_seqlens is None:
        m = torch.cat((start[:, None], x), 1).cummax(1).values
        return m[:, :-1], m[:, 1:], m[:, -1]
    time = torch.arange(x.shape[1], device=x.device)
    segment = torch.searchsorted(cu_seqlens, time, right=True) - 1
    low, high = x.double().aminmax(dim=1, keepdim=True)
    raised = (high - low + 1) * segment[:, None, None] - low
    m = ((x + raised).cummax(1).values - raised).to(x.dtype)
    m = torch.maximum(m, start[segment])
    first = (time == cu_seqlens[segment])[:, None, None]
    before = torch.where(first, start[segment], m.roll(1, 1))
    empty = (cu_seqlens.diff() == 0)[:, None, None]
    last = torch.where(empty, start, m[0, (cu_seqlens[1:] - 1).clamp(min=0)])
    return before, m, last
