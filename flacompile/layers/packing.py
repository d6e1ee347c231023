"""Between padded batches [N, T, ...] and packed sequences [1, total, ...] with ``cu_seqlens``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile.ops.validate import check_shape, expect


def cu_seqlens_from_mask(mask: Tensor) -> Tensor:
    """Bounds of the rows of a mask [N, T] once packed: [N + 1] int64, first 0, last the total."""
    return F.pad(mask.sum(1, dtype=torch.int64).cumsum(0), (1, 0))


def unpad(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packs the real tokens of a padded batch; their number is read, which syncs a GPU.

    Args:
        x: [N, T, ...].
        mask: [N, T], True at real tokens, on either side.

    Returns:
        x_packed [1, total, ...], cu_seqlens [N + 1] and indices [total], the places of the tokens
        in x.flatten(0, 1): ``zeros.index_copy(0, indices, x_packed[0])`` puts them back.
    """
    check_shape("mask", mask, tuple(x.shape[:2]))
    indices = mask.flatten().nonzero().flatten()
    return x.flatten(0, 1)[indices][None], cu_seqlens_from_mask(mask), indices


def pad(x_packed: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """Right-padded batch [N, max_length, ...] of packed sequences [1, total, ...], zero at pads.

    Tokens past ``max_length`` of a sequence are dropped.
    """
    expect(x_packed.shape[0] == 1, "x_packed", "a batch of 1", x_packed.shape[0])
    index = cu_seqlens[:-1, None] + torch.arange(max_length, device=x_packed.device)
    real = index < cu_seqlens[1:, None]
    x = x_packed[0, index.clamp(max=x_packed.shape[1] - 1)]
    return torch.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0.0)
