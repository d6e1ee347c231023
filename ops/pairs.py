"""The CPU form of the elementwise recurrence h_t = a_t h_{t-1} + x_t: pairs, and pairs of pairs.

The second of each pair takes in the first; the seconds are a recurrence of half the length, whose
factors are products of two; once it is solved, each first takes in the second before it. That is
log2 T steps over T + T/2 + T/4 + ... numbers, all in place. A factor is a product of the decays
between two tokens, each at most 1, so nothing overflows and a strong decay blurs nothing after it.
"""

import itertools

import torch.nn.functional as F
from torch import Tensor

from flacompile.ops.prefix import decayed_prefix

CHUNK = 64


def scan_(links: Tensor, x: Tensor, reverse: bool = False) -> Tensor:
    """h_t = links_{t-1} h_{t-1} + x_t in place of x, or back in time h_t = links_t h_{t+1} + x_t.

    Args:
        links: the factors between neighbours, [B, T - 1, *].
        x: [B, T, *].
    """
    if x.shape[1] < 2:
        return x
    first, second = x[:, ::2], x[:, 1::2]
    inside, between = links[:, ::2], links[:, 1::2]  # a pair's own factor, that to the next pair
    last, pairs = between.shape[1], inside.shape[1]
    if reverse:
        first[:, :pairs].addcmul_(inside, second)
        scan_(inside[:, :last] * between, first, reverse)
        second[:, :last].addcmul_(between, first[:, 1:])
    else:
        second.addcmul_(inside, first[:, :pairs])
        scan_(between[:, : pairs - 1] * inside[:, 1:], second)
        first[:, 1:].addcmul_(between, second[:, :last])
    return x


def scan_chunks(g: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence by chunks: the same operations whatever T is and none in place, for exporters.

    In a chunk each token takes in the one 1, 2, 4, ... before it, with all which that one holds.

    Args:
        g: natural-log decay, [B, T, D].
        x: [B, T, D], in the dtype of the state.
        state: [B, D].

    Returns:
        h [B, T, D] and the final state [B, D].
    """
    time = x.shape[1]
    num_chunks = (time + CHUNK - 1) // CHUNK

    def split(z: Tensor) -> Tensor:
        """[B, T, D] -> [B n, C, D]"""
        z = F.pad(z, (0, 0, 0, num_chunks * CHUNK - time))
        return z.reshape(-1, CHUNK, z.shape[2])

    def join(z: Tensor) -> Tensor:
        """[B n, *, D] -> [B, n *, D]"""
        return z.reshape(x.shape[0], -1, x.shape[2])

    g, h = split(g), split(x)
    reach, span = g.exp(), 1  # the decay from as far back as h has taken in
    while span < CHUNK:
        h = h + reach * F.pad(h[:, :-span], (0, 0, span, 0))
        reach = reach * F.pad(reach[:, :-span], (0, 0, span, 0), value=1.0)
        span *= 2
    ends, decays = join(h[:, -1:]), join(g.sum(1, keepdim=True))  # [B, n, D]
    starts, final = decayed_prefix(ends.mT[..., None], decays.mT, state[..., None], 1)
    h = h + reach * starts[..., 0].mT.reshape(-1, 1, x.shape[2])
    return join(h)[:, :time], final[..., 0]


def sequences(time: int, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """(rows of the state, tokens) of every sequence that has any: all of a batch, or one a time."""
    if cu_seqlens is None:
        return [(slice(None), slice(0, time))] if time else []
    bounds = enumerate(itertools.pairwise(cu_seqlens.tolist()))
    return [(slice(n, n + 1), slice(*ends)) for n, ends in bounds if ends[0] < ends[1]]
