"""What the ops with a state [K, V] take where nothing is given."""

import torch
from torch import Tensor


def filled(
    q: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> tuple[Tensor | None, Tensor, float]:
    """g in the dtype of the state, the state, by default zero, and the scale, by default K^-0.5."""
    if state is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        accumulator = torch.promote_types(q.dtype, torch.float32)
        state = q.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3], dtype=accumulator)
    g = g if g is None else g.to(state.dtype)
    return g, state, q.shape[-1] ** -0.5 if scale is None else scale
