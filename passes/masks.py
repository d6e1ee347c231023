"""What a mask lets a token see, decided by its value."""

from __future__ import annotations

import torch
from torch import Tensor

from .walk import NotProvable


def allowed(mask: Tensor | None, is_causal: bool, time: int, keys: int) -> Tensor:
    """Boolean [.., T, S]: True where the query may see the key."""
    if keys != time:
        raise NotProvable(f"{time} queries see {keys} keys; self-attention sees as many")
    causal = torch.ones(time, keys, dtype=torch.bool).tril()
    if mask is None:
        return causal if is_causal else torch.ones_like(causal)
    mask = mask.cpu()
    if mask.dtype != torch.bool:
        visible = mask > -1e4
        if bool((mask[visible] != 0).any()):
            raise NotProvable("the mask adds a bias to the scores (ALiBi or relative positions)")
        mask = visible
    mask = mask.expand(*mask.shape[:-2], time, keys)
    return mask & causal if is_causal else mask


def window_of(visible: Tensor) -> int | None:
    """None for a full causal mask, w where a token sees itself and the w - 1 before it.

    Args:
        visible: boolean [.., T, T]; the same for every batch and head, or not provable.
    """
    time = visible.shape[-1]
    rows = visible.reshape(-1, time, time)
    if not bool((rows == rows[0]).all()):
        raise NotProvable("other mask: it differs between heads or sequences of the example")
    mask, causal = rows[0], torch.ones(time, time, dtype=torch.bool).tril()
    if bool((mask & ~causal).any()):
        raise NotProvable("bidirectional: the mask lets a token see later ones")
    if bool((mask == causal).all()):
        return None
    window = int(mask[-1].sum())
    if window < 1 or not bool((mask == causal.triu(1 - window)).all()):
        raise NotProvable("other mask: neither causal nor a causal sliding window")
    return window
