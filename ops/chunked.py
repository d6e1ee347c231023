"""The CPU form of linear_attn: chunks of 64 tokens and a tree over them, no loop over either.

With S the state before a chunk and i a token in it,

    o_i = scale (q_i e^{gk_1+..+gk_i}) S e^{gv_1+..+gv_i} + scale sum_{j<=i} w_ij (q_i . k_j) v_j

where w_ij is the decay from j to i. One decay for all channels makes w a number and the sum a
masked product of matrices. A decay for each channel is measured from the middle of a span that
holds j in its left half and i in its right half: the span 64, then 32, ..., then 2, and i = j last.
Every exponent is a sum of decays between two tokens, so none is positive, whatever the decays are.
"""

import torch.nn.functional as F
from torch import Tensor

from flacompile.ops.heads import repeat_heads
from flacompile.ops.prefix import decayed_prefix, segment_sums

CHUNK = 64


def chunked(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, state: Tensor,
    *, scale: float, chunk: int = CHUNK, levels: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """linear_attn in float32 (float64 for float64 inputs), linear in T.

    Args:
        q, k: [B, T, G, K], each group for H / G heads.
        v: [B, T, H, V].
        gk: log decay of the key side, [B, T, H], [B, T, H, K] or None.
        gv: log decay of the value side, [B, T, H], [B, T, H, V] or None.
        state: [B, H, K, V].
        scale: factor on the output.
        chunk: tokens a chunk, a power of two.
        levels: folds of the tree over the chunks (see ``decayed_prefix``).

    Returns:
        o [B, T, H, V] and the final state [B, H, K, V], both in the dtype of the state.
    """
    time, key_dim, value_dim = q.shape[1], q.shape[-1], v.shape[-1]
    num_chunks = (time + chunk - 1) // chunk

    def split(x: Tensor) -> Tensor:
        """[B, T, H, X] -> [B, H, n, C, X]"""
        x = F.pad(x.to(state.dtype), (0, 0, 0, 0, 0, num_chunks * chunk - time))
        return x.unflatten(1, (num_chunks, chunk)).permute(0, 3, 1, 2, 4)

    q, k, v = (split(repeat_heads(x, v.shape[2])) for x in (q, k, v))
    scalar = [g[..., None] for g in (gk, gv) if g is not None and g.ndim == 3]
    gk = gk if gk is not None and gk.ndim == 4 else None
    gv = gv if gv is not None and gv.ndim == 4 else None
    if gk is None and gv is None:
        g = split(sum(scalar)) if scalar else q.new_zeros(*q.shape[:-1], 1)  # [B, H, n, C, 1]
        o, gk, gv = _inside_scalar(q, k, v, g[..., 0]), g, g[..., :1] * 0
    else:
        zero = q.new_zeros(1, 1, 1, 1, 1).expand(*q.shape[:-1], 1)
        gk = zero if gk is None else split(gk)
        gv = zero if gv is None else split(gv)
        gk = gk + split(sum(scalar)) if scalar else gk
        o = _inside_diagonal(q, k, v, gk, gv)

    to_end_k, to_end_v = after(gk).exp(), after(gv).exp()
    ends = (k * to_end_k).mT @ (v * to_end_v)  # [B, H, n, K, V]
    starts, final = _across_chunks(ends, gk.sum(-2), gv.sum(-2), state, levels)
    o = o + (q * gk.cumsum(-2).exp()) @ starts * gv.cumsum(-2).exp()
    o = o.permute(0, 2, 3, 1, 4).reshape(q.shape[0], num_chunks * chunk, -1, value_dim)[:, :time]
    return o * scale, final.reshape(-1, state.shape[1], key_dim, value_dim)


def after(g: Tensor) -> Tensor:
    """What decays an entry to the end of its span: the sum of the g after it (dim -2)."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _inside_scalar(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """sum_{j<=i} e^{g_{j+1}+..+g_i} (q_i . k_j) v_j for g [..., C]."""
    return (q @ k.mT * segment_sums(g).exp()) @ v


def _inside_diagonal(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, gv: Tensor) -> Tensor:
    """The same sum for gk [..., C, K or 1] and gv [..., C, V or 1], by halving spans."""
    chunk = q.shape[-2]
    o = (q * k).sum(-1, keepdim=True) * v
    span = chunk
    while span > 1:

        def halves(x: Tensor, half: int) -> Tensor:
            """[..., C, X] -> [..., C / span, span / 2, X]"""
            return x.unflatten(-2, (chunk // span, 2, span // 2))[..., half, :, :]  # noqa: B023

        right = halves(q, 1) * halves(gk, 1).cumsum(-2).exp()
        left = halves(k, 0) * after(halves(gk, 0)).exp()
        part = right @ left.mT @ (halves(v, 0) * after(halves(gv, 0)).exp())
        part = part * halves(gv, 1).cumsum(-2).exp()
        o = o + F.pad(part[..., None, :, :], (0, 0, 0, 0, 1, 0)).flatten(-4, -2)
        span //= 2
    return o


def _across_chunks(
    ends: Tensor, gk: Tensor, gv: Tensor, state: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """States before every chunk [B, H, n, K, V] and after the last [B, H, K, V].

    The decays that differ by channel become a batch axis X, the rest of the state the axis Y.

    Args:
        ends: what each chunk adds, [B, H, n, K, V].
        gk, gv: log decay of each chunk, [B, H, n, K or 1] and [B, H, n, V or 1].
    """
    batch, heads, _, key_dim, value_dim = ends.shape
    by_key, by_value = gk.shape[-1] > 1, gv.shape[-1] > 1
    z = ends if by_key or not by_value else ends.mT  # the axis with decays comes first
    first = state if by_key or not by_value else state.mT
    g = (gk[..., :, None] + gv[..., None, :]).flatten(-2)  # [B, H, n, X]
    x, shape = g.shape[-1], z.shape[-2:]
    z = z.reshape(batch, heads, -1, x, key_dim * value_dim // x).transpose(2, 3)
    starts, final = decayed_prefix(z, g.mT, first.reshape(batch, heads, x, -1), levels)
    starts = starts.transpose(2, 3).reshape(batch, heads, -1, *shape)
    final = final.reshape(batch, heads, *shape)
    return (starts, final) if by_key or not by_value else (starts.mT, final.mT)
