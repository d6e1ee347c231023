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
from flacompile.ops.running_softmax import LOWEST, maxima, weigh, weigh_step
from flacompile.ops.validate import check_shape, expect

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
        if context.active():
            falls = rate.detach().double()
            last = maxima(x.detach(), falls, start, None)[2]
            start = context.fold(start.double(), _next_maximum, last, falls.sum(1))
        weight, g, last = weigh(x, rate, start, cu_seqlens)
        h, last_h = scan(
            g.flatten(2), weight.flatten(2), state=start_h.flatten(1), cu_seqlens=cu_seqlens
        )
        h, last_h = h.view_as(x), last_h.view_as(last)
        return weight, g, torch.where(h > 0, h, 1.0), (last.to(x.dtype), last_h)

    def step(self, x: Tensor, state: State) -> Weights:
        """``forward`` for one token, x [B, H, M]."""
        x = at_least_fp32(x)
        rate, (before, start_h) = self._rate(x), _start(state)
        weight, g, m = weigh_step(x, rate, before)
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


def _next_maximum(m: Tensor, last: Tensor, fall: Tensor) -> Tensor:
    """The maximum after a rank whose tokens leave ``last`` and fall by ``fall`` in all."""
    return torch.maximum(m - fall, last)
