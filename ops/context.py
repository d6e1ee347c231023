"""A sequence of which every rank holds a run of tokens: what comes before those of this rank.

Every op is linear in its state: after the tokens of rank r, S_r = D_r S_{r-1} + N_r, with N_r the
state that its tokens leave by themselves, and D_r a decay or, for the delta rule and its kind, a
matrix. All ranks work out N and D at once, exchange them, and start from the state that follows:

    S_before = D_{r-1} (... D_1 N_0 + ...) + N_{r-1}

So an op runs twice, in parallel, rather than once and one rank after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.ops.validate import expect

if TYPE_CHECKING:  # half a second of imports, for what runs over several devices
    from torch.distributed.tensor import DeviceMesh

_mesh: DeviceMesh | None = None

Apply = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def context_parallel(mesh: DeviceMesh) -> Iterator[None]:
    """Inside the block every op takes its tokens for those that follow the rank before.

    Values, states and gradients are those of one process with the whole sequence: rank r of n
    passes the r-th of n runs of tokens, of any lengths, and gets outputs and the state at their
    end. A state that is given counts from the first token of the rank that gives it, most often
    the first. Every rank must make the same calls, forward and backward.

    An exchange is one all-gather of a state and of its decay a call (a scatter of sums in the
    backward), so a rank receives n states of [B, H, K, V], and for ``delta_rule`` and ``dplr`` n
    matrices of [B, H, K, K]; nothing grows with the number of tokens.

    Args:
        mesh: of one dimension, the ranks in the order of their tokens.

    Raises:
        ValueError: a mesh of more dimensions, a block inside such a block, and inside it what needs
            more than a state: softmax attention, masks, packed sequences.
    """
    global _mesh
    expect(mesh.ndim == 1, "mesh", "one dimension, such as mesh['context']", mesh.ndim)
    expect(_mesh is None, "mesh", "one context at a time", f"{mesh} inside {_mesh}")
    _mesh = mesh
    try:
        with patch.object(F, "scaled_dot_product_attention", _no_softmax):
            yield
    finally:
        _mesh = None


def _no_softmax(*args: Any, **kwargs: Any) -> Tensor:
    """Refuses what would be attention over the tokens of one rank, without an error."""
    raise ValueError("context_parallel: expected linear mixers alone, got softmax attention")


def active() -> bool:
    """Whether sequences are spread over ranks."""
    return _mesh is not None


def incoming(state: Tensor, left: Tensor, decay: Tensor | None, apply: Apply = torch.mul) -> Tensor:
    """The state before the first token of this rank.

    Args:
        state: the one given on this rank.
        left: N, what the tokens of this rank leave of ``state``, in its shape.
        decay: D of this rank; None is zero.
        apply: D and S to the decayed S.
    """
    if decay is None:
        return state + fold(torch.zeros_like(left), lambda before, n: n, left)
    return state + fold(
        torch.zeros_like(left), lambda before, n, d: apply(d, before) + n, left, decay
    )


def with_identity(k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """v and the state with K more columns, without values, that start as the identity.

    What an op makes of those columns is what it makes of any state before its tokens, D.
    """
    size = k.shape[3]
    unit = torch.eye(size, dtype=state.dtype, device=state.device).expand(*state.shape[:3], size)
    return torch.cat((v, torch.zeros_like(k)), -1), torch.cat((state, unit), -1)


def fold(first: Tensor, step: Callable[..., Tensor], *summary: Tensor) -> Tensor:
    """``first``, then step(it, *summary) with the summary of one rank before this after another."""
    assert _mesh is not None
    summaries, rank = [gathered(x) for x in summary], _mesh.get_local_rank()
    for r in range(_mesh.size()):  # on every rank all of it: a backward is a collective too
        here = torch.tensor(r < rank, device=first.device)
        first = torch.where(here, step(first, *(x[r] for x in summaries)), first)
    return first


def tokens_before(count: int, device: torch.device) -> Tensor:
    """Number of tokens on the ranks before this one, which itself has ``count``."""
    assert _mesh is not None
    return gathered(torch.tensor(count, device=device))[: _mesh.get_local_rank()].sum()


def gathered(x: Tensor) -> Tensor:
    """x of every rank, [ranks, ...], differentiable."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    assert _mesh is not None
    expect(not isinstance(x, DTensor), "context_parallel", "tensors of one rank", "a DTensor")
    shards = DTensor.from_local(x[None].contiguous(), _mesh, [Shard(0)], run_check=False)
    return shards.full_tensor(grad_placements=[Partial()])


def whole_sequences(cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for a pack inside ``context_parallel``."""
    expect(_mesh is None or cu_seqlens is None, "cu_seqlens", "None in context_parallel", "a pack")
