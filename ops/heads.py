"""Heads that share a tensor: head h of H reads group h // (H / G) of G."""

from torch import Tensor


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, G, ...] -> [B, T, H, ...], each group H / G times in a row."""
    if x.shape[2] == num_heads:
        return x
    share = num_heads // x.shape[2]
    return x.unsqueeze(3).expand(*x.shape[:3], share, *x.shape[3:]).flatten(2, 3)


def sum_heads(x: Tensor, groups: int) -> Tensor:
    """[B, T, H, ...] -> [B, T, G, ...], the gradient of ``repeat_heads``."""
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)
