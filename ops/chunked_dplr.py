"""The CPU form of the dplr sweep: chunks of 32 tokens, one dense transition each.

    u_t = S_{t-1}^T a_t + c_t        o_t = S_{t-1}^T q_t
    S_t = diag(e^g_t) S_{t-1} + b_t u_t^T + k_t v_t^T

With S the state before a chunk, w_ij the decay between tokens j < i (of those after j and before i)
and A the strictly lower matrix of (a_i w_ij) . b_j, all u of the chunk solve one triangular system:

    (1 - A) U = (a decayed) S + C + A_ak V        so U = W S + U_0, and S_end = M S + N

with M and N known before any state is. Everything inside chunks is done for all of them at once;
what remains is S -> M S + N from chunk to chunk. No exponent is positive: see ``chunked``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.ops.chunked import after
from flacompile.ops.prefix import FANOUT, segment_sums

CHUNK = 32
DOUBLINGS = 8  # over the folds of ``folds``
LONGEST = CHUNK * FANOUT << DOUBLINGS  # tokens that they hold

Across = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunked_sweep(
    a: Tensor, b: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor | None, c: Tensor | None,
    g: Tensor | None, state: Tensor, *, across: Across, num_chunks: int, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """One sweep over time in the dtype of the state, linear in T.

    Args:
        a, b: [B, T, H, K].
        q: [B, T, H, K], or None: no o.
        k, v: [B, T, H, K] and [B, T, H, V], or None: b u^T is the only write.
        c: [B, T, H, V] or None, which is zero.
        g: log decay, [B, T, H], [B, T, H, K] or None.
        state: [B, H, K, V].
        across: states before each chunk, and after the last one, from M, N and the first state.
        num_chunks: enough for T; what they hold beyond it is inert.
        chunk: tokens a chunk, a power of two.

    Returns:
        u and o [B, T, H, V], and the final state.
    """
    time = a.shape[1]

    def split(x: Tensor) -> Tensor:
        """[B, T, H, X] -> [B, H, n, C, X], in the dtype of the state."""
        return split_chunks(x.to(state.dtype), num_chunks, chunk)

    a, b = split(a), split(b)
    q, k, v, c = (x if x is None else split(x) for x in (q, k, v, c))
    g = split_decay(g, a)
    rows, columns = [x for x in (a, q) if x is not None], [x for x in (b, k) if x is not None]
    weights = between(torch.stack(rows, -2), torch.stack(columns, -2), g)  # [.., C, R, C, W]
    from_start, to_end = before(g).exp(), after(g).exp()

    U = a.new_zeros(())
    U = U if c is None else U + c
    U = U if v is None else U + weights[..., 0, :, 1] @ v
    one = torch.eye(chunk, dtype=a.dtype, device=a.device)
    A = weights[..., 0, :, 0]
    inverse = torch.linalg.solve_triangular(
        one - A, one.expand_as(A), upper=False, unitriangular=True
    )
    W, U = inverse @ (a * from_start), inverse @ U
    M = (b * to_end).mT @ W + torch.diag_embed(g.sum(-2).exp().expand(*a.shape[:-2], a.shape[-1]))
    N = (b * to_end).mT @ U
    N = N if k is None or v is None else N + (k * to_end).mT @ v
    starts, final = across(M, N, state)
    U = U + W @ starts
    if q is None:
        return join_chunks(U, time), None, final
    o = (q * from_start) @ starts + weights[..., 1, :, 0] @ U
    o = o if v is None else o + weights[..., 1, :, 1] @ v
    return join_chunks(U, time), join_chunks(o, time), final


def split_chunks(x: Tensor, num_chunks: int, chunk: int) -> Tensor:
    """[B, T, H, *] -> [B, H, n, C, *], with zeros after the last token."""
    x = F.pad(x, (*[0] * (2 * x.ndim - 3), num_chunks * chunk - x.shape[1]))
    return x.unflatten(1, (num_chunks, chunk)).movedim(3, 1)


def join_chunks(x: Tensor, time: int) -> Tensor:
    """[B, H, n, C, *] -> [B, T, H, *]."""
    x = x.movedim(1, 3)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :time]


def split_decay(g: Tensor | None, like: Tensor) -> Tensor:
    """g [B, T, H, *] in chunks, with one channel where it has none, as ``like`` [B, H, n, C, X]."""
    if g is None:
        return like.new_zeros(*like.shape[:-1], 1)
    return split_chunks(g if g.ndim == 4 else g[..., None], *like.shape[2:4])


def before(g: Tensor) -> Tensor:
    """What decays the state at the start of a span to before each entry (dim -2)."""
    return F.pad(g[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def between(rows: Tensor, columns: Tensor, g: Tensor) -> Tensor:
    """sum_k r_ik c_jk e^(g_{j+1} + .. + g_{i-1})_k for j < i, and 0 for the other pairs.

    Args:
        rows: R vectors a token, [..., C, R, K].
        columns: W vectors a token, [..., C, W, K].
        g: [..., C, 1 or K].

    Returns:
        [..., C, R, C, W].
    """
    chunk, R, W = g.shape[-2], rows.shape[-2], columns.shape[-2]
    if g.shape[-1] == 1:
        decay = F.pad(segment_sums(g[..., 0]).exp()[..., :-1, :], (0, 0, 1, 0))
        weights = rows.flatten(-3, -2) @ columns.flatten(-3, -2).mT
        weights = weights.unflatten(-2, (chunk, R)).unflatten(-1, (chunk, W))
        return weights * decay[..., :, None, :, None]
    blocks = g.new_zeros(*g.shape[:-1], R, W)  # on the diagonal: [..., C / span, R span, W span]
    span, dim = 2, g.ndim - 2
    while span <= chunk:

        def halves(x: Tensor, half: int) -> Tensor:
            """[..., C, *] -> [..., C / span, span / 2, *]"""
            x = x.unflatten(dim, (chunk // span, 2, span // 2))  # noqa: B023
            return x.select(dim + 1, half)

        right = halves(rows, 1) * before(halves(g, 1)).exp()[..., None, :]
        left = halves(columns, 0) * after(halves(g, 0)).exp()[..., None, :]
        corner = right.flatten(-3, -2) @ left.flatten(-3, -2).mT
        top = F.pad(blocks[..., 0::2, :, :], (0, corner.shape[-1]))
        blocks = torch.cat([top, torch.cat([corner, blocks[..., 1::2, :, :]], -1)], -2)
        span *= 2
    return blocks[..., 0, :, :].unflatten(-2, (chunk, R)).unflatten(-1, (chunk, W))


def loop(M: Tensor, N: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S -> M S + N, chunk by chunk.

    Args:
        M: [B, H, n, K, K].
        N: [B, H, n, K, V].
        state: [B, H, K, V].

    Returns:
        the states before each chunk [B, H, n, K, V] and the last one.
    """
    states = [state]
    for m, n in zip(M.unbind(2), N.unbind(2), strict=True):
        states.append(m @ states[-1] + n)
    stacked = torch.stack(states, 2)
    return stacked[:, :, :-1], stacked[:, :, -1]


def folds(M: Tensor, N: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As ``loop`` in a fixed number of operations, for up to FANOUT 2^DOUBLINGS chunks.

    FANOUT chunks become one transition; the prefixes of those, and then the ones inside each, come
    by doubling.
    """
    n, key_dim = M.shape[2:4]
    count = n // FANOUT + 3  # with or without the last never one: a compiler would count on it
    short = count * FANOUT - n
    one = torch.eye(key_dim, dtype=M.dtype, device=M.device)
    is_padding = torch.arange(count * FANOUT, device=M.device) >= n
    M = F.pad(M, (0, 0, 0, 0, 0, short)) + one * is_padding[:, None, None]
    N = F.pad(N, (0, 0, 0, 0, 0, short))
    M, N = (x.unflatten(2, (count, FANOUT)) for x in (M, N))
    M, N = _compose(M, N, FANOUT.bit_length() - 1)
    to_end, added = _compose(M[:, :, :, -1], N[:, :, :, -1], DOUBLINGS)
    ends = to_end @ state[:, :, None] + added  # [B, H, count, K, V]
    starts = torch.cat([state[:, :, None], ends[:, :, :-1]], 2)[:, :, :, None]
    states = torch.cat([starts, (M @ starts + N)[:, :, :, :-1]], 3)
    return states.flatten(2, 3)[:, :, :n], ends[:, :, -1]


def _compose(M: Tensor, N: Tensor, doublings: int) -> tuple[Tensor, Tensor]:
    """The transition from the first entry's start to each entry's end: prefixes along dim -3."""
    index = torch.arange(M.shape[-3], device=M.device)
    for span in (1 << i for i in range(doublings)):
        before = (index - span).clamp(min=0)
        has_before = (index >= span)[:, None, None]
        N = torch.where(has_before, M @ N.index_select(-3, before) + N, N)
        M = torch.where(has_before, M @ M.index_select(-3, before), M)
    return M, N
