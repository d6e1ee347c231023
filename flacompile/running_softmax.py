"""Softmax over time as a recurrence: what ABC and LightNet weigh tokens with.

    m_t = max(m_{t-1} - r, x_t)
    h_t = e^{m_{t-1} - r - m_t} h_{t-1} + e^{x_t - m_t}

A state that decays and grows as h does, S_t = e^{m_{t-1} - r - m_t} S_{t-1} + e^{x_t - m_t} v_t,
gives S_t / h_t, the mean of v under softmax_s(x_s - r (t - s)), s <= t. The papers have r = 0 and
write m_t + log h_t = logcumsumexp(x)_t. No exponent is positive and no sum of many tokens falls
below one, whatever x is; neither mean nor gradients depend on m, a constant of autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flacompile.blocks import at_least_fp32
from flacompile.layers.base import Tokens
from flacompile.ops import context, scan, scan_step
from flacompile.ops.validate import check_shape, expect

LOWEST = -(2.0**100)  # the maximum of no tokens: finite, so that differences are

State = tuple[Tensor, ...]
Weights = tuple[Tensor, Tensor, Tensor, State]


class RunningSoftmax(nn.Module):
    """Weights, decays and sums of weights of H heads with M slots.

    A state is m and h of N sequences, [N, H, M] in fp32, h zero where no token was seen.

    Args:
        num_heads: H.
        num_slots: M.
        recency: whether every slot forgets at a rate r = e^log_rate of its own, in nats a token.
    """

    def __init__(self, num_heads: int, num_slots: int, recency: bool) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.zeros(num_heads, num_slots)) if recency else None

    def forward(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Weights:
        """Weighs T tokens.

        Args:
            x: logits [B, T, H, M]; -inf is a token without weight, for which time stands still.
            state: before the first token; None is the empty one.
            cu_seqlens: bounds of packed sequences, [N + 1] int64.

        Returns:
            e^{x_t - m_t}, m_{t-1} - r - m_t and h_t, [B, T, H, M] in fp32, h one where it would be
            zero, and the next state.
        """
        x = at_least_fp32(x)
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        empty = x.new_zeros(sequences, *x.shape[2:])
        start, start_h = _start((empty, empty) if state is None else state)
        rate = self._rate(x)
        x_, rate_ = x.detach(), rate.detach().double()
        if context.active():
            last = _maxima(x_, rate_, start, None)[2]
            start = context.fold(start.double(), _next_maximum, last, rate_.sum(1))
        before, m, last = _maxima(x_, rate_, start, cu_seqlens)
        weight, g = _relative(x, rate, before, m)
        h, last_h = scan(
            g.flatten(2), weight.flatten(2), state=start_h.flatten(1), cu_seqlens=cu_seqlens
        )
        h, last_h = h.view_as(x), last_h.view_as(last)
        return weight, g, torch.where(h > 0, h, 1.0), (last.to(x.dtype), last_h)

    def step(self, x: Tensor, state: State) -> Weights:
        """``forward`` for one token, x [B, H, M]."""
        x = at_least_fp32(x)
        rate, (before, start_h) = self._rate(x), _start(state)
        m = torch.maximum(before - rate, x).detach()
        weight, g = _relative(x, rate, before, m)
        _, h = scan_step(g.flatten(1), weight.flatten(1), state=start_h.flatten(1))
        h = h.view_as(x)
        return weight, g, h, (m, h)

    @torch.no_grad()
    def set_half_life(self, tokens: Tensor) -> None:
        """The slots of head h forget half in 1 to tokens[h] tokens, evenly spread in logarithm."""
        expect(self.log_rate is not None, "recency", "True in the config", False)
        assert self.log_rate is not None
        heads, slots = self.log_rate.shape
        check_shape("tokens", tokens, (heads,))
        spread = torch.linspace(0, 1, slots, device=tokens.device)
        self.log_rate.copy_(math.log(math.log(2)) - spread * tokens.float().log()[:, None])

    def _rate(self, x: Tensor) -> Tensor:
        """r at every token, zero where x is -inf."""
        if self.log_rate is None:
            return torch.zeros_like(x)
        return torch.where(x > -torch.inf, self.log_rate.to(x.dtype).exp(), 0.0)


def without_padding(x: Tensor, tokens: Tokens) -> Tensor:
    """Logits x [B, T, ...] with -inf at padding."""
    return torch.where(tokens.zero_padding(torch.ones_like(x)) > 0, x, -torch.inf)


def _start(state: State) -> State:
    """m and h to go on from, m LOWEST where no token was seen."""
    m, h = state
    return torch.where(h > 0, m, LOWEST).detach(), h


def _relative(x: Tensor, rate: Tensor, before: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """e^{x_t - m_t}, and m_{t-1} - r - m_t where there is a state to decay, in the dtype of x."""
    g = torch.where(before > LOWEST, before - m - rate, 0.0)
    g = g - g.detach().clamp(min=0)  # rounding may leave one above zero
    return (x - m).exp().to(x.dtype), g.to(x.dtype)


def _next_maximum(m: Tensor, last: Tensor, fall: Tensor) -> Tensor:
    """The maximum after a rank whose tokens leave ``last`` and fall by ``fall`` in all."""
    return torch.maximum(m - fall, last)


def _maxima(
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
