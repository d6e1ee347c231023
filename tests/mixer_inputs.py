"""Inputs and comparison that the mixers' tests share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flacompile.blocks import Rotary

WIDTH = 48
HALVES = Rotary.Config.from_theta(100.0, 6)


def draw(batch: int, time: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(time)
    return torch.randn(batch, time, WIDTH, generator=generator, dtype=dtype)


def close(got, want) -> bool:
    """Trees of tensors alike to rounding: that of fp32 where any of the two has it."""
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    exact = not any(x.dtype == torch.float32 for pair in pairs for x in pair)
    pairs = [(a.double(), b.double()) for a, b in pairs]
    bound = 1e-10 if exact else 1e-5
    return all(a.shape == b.shape and (a - b).norm() <= bound * (1 + b.norm()) for a, b in pairs)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max(self.numel, *sizes) if sizes else self.numel
        return out
