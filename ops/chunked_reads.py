"""Several reads of one decayed state, on the CPU, by chunks: what the backward of dplr asks for.

    S_t = diag(e^g_t) S_{t-1} + sum_w k_tw v_tw^T        o_tr = S_t x_tr

Read r at i takes k_jw, decayed from j to i, by v_jw . x_ir. A decay for each channel of k is
measured from the middle of a span, span by span, as in ``chunked``: no exponent is positive.
"""

import torch
from torch import Tensor

from flacompile.ops.chunked import after
from flacompile.ops.chunked_dplr import CHUNK, join_chunks, split_chunks, split_decay
from flacompile.ops.prefix import segment_sums


def chunked_reads(
    x: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Every read, in the dtype of the state, linear in T.

    Args:
        x: R reads a token, [B, T, H, R, V].
        k, v: W writes a token, [B, T, H, W, K] and [B, T, H, W, V].
        g: log decay, [B, T, H], [B, T, H, K] or None.
        state: [B, H, K, V].
        chunk: tokens a chunk, a power of two.

    Returns:
        o [B, T, H, R, K] and the final state.
    """
    time = x.shape[1]
    num_chunks = -(-time // chunk)
    x, k, v = (
        split_chunks(z.to(state.dtype), num_chunks, chunk) for z in (x, k, v)
    )  # [B, H, n, C, *, *]
    g = split_decay(g, k[..., 0, :])
    ends = (k * after(g).exp()[..., None, :]).flatten(-3, -2).mT @ v.flatten(-3, -2)
    states = [state]
    for decay, end in zip(g.sum(-2).exp()[..., None].unbind(2), ends.unbind(2), strict=True):
        states.append(torch.addcmul(end, decay, states[-1]))
    starts = torch.stack(states[:-1], 2) if time else ends
    o = (x.flatten(-3, -2) @ starts.mT).unflatten(-2, x.shape[-3:-1])
    o *= g.cumsum(-2).exp()[..., None, :]
    _add_inside(o, x, k, v, g)
    return join_chunks(o, time), states[-1]


def _add_inside(o: Tensor, x: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
    """Adds to o [..., C, R, K] what each read takes from its own chunk, up to its own token."""
    chunk, (reads, writes) = g.shape[-2], (x.shape[-2], k.shape[-2])
    if g.shape[-1] == 1:
        weights = x.flatten(-3, -2) @ v.flatten(-3, -2).mT
        weights = weights.unflatten(-2, (chunk, reads)).unflatten(-1, (chunk, writes))
        weights *= segment_sums(g[..., 0]).exp()[..., :, None, :, None]
        o += (weights.flatten(-4, -3).flatten(-2) @ k.flatten(-3, -2)).unflatten(-2, (chunk, reads))
        return
    o += (x @ v.mT) @ k  # of its own token
    span, dim = 2, g.ndim - 2
    while span <= chunk:

        def halves(z: Tensor, half: int) -> Tensor:
            """[..., C, *] -> [..., C / span, span / 2, *]"""
            return z.unflatten(dim, (-1, 2, span // 2)).select(dim + 1, half)  # noqa: B023

        left = halves(k, 0) * after(halves(g, 0)).exp()[..., None, :]
        weights = halves(x, 1).flatten(-3, -2) @ halves(v, 0).flatten(-3, -2).mT
        part = (weights @ left.flatten(-3, -2)).unflatten(-2, (span // 2, reads))
        right = halves(o, 1)
        right += part * halves(g, 1).cumsum(-2).exp()[..., None, :]
        span *= 2
