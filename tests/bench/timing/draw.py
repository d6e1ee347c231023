"""Tensors to time an op on."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Size(NamedTuple):
    """B, T, H and K = V; ops of channels have H times K of them."""

    batch: int
    time: int
    heads: int
    dim: int


class Draw:
    """Random tensors of one size; decays in fp32.

    The generator is its own: a CUDA graph whose capture failed may leave the default one unusable.
    """

    def __init__(self, size: Size, device: str, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def plain(self, *shape: int) -> Tensor:
        """Standard normal in fp32, without a time axis."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def wide(self, *shape: int) -> Tensor:
        """[B, T, *shape] in fp32."""
        return self.plain(self.size.batch, self.size.time, *shape)

    def normal(self, *shape: int) -> Tensor:
        return self.wide(*shape).to(self.dtype)

    def head(self, dim: int | None = None) -> Tensor:
        return self.normal(self.size.heads, dim or self.size.dim)

    def unit(self) -> Tensor:
        """Directions in fp32, one a head."""
        return F.normalize(self.wide(self.size.heads, self.size.dim), dim=-1)

    def decay(self, *shape: int) -> Tensor:
        return F.logsigmoid(self.wide(*shape) + 2) / 4

    def decays(self) -> Tensor:
        """One a head."""
        return self.decay(self.size.heads)

    def decays_of_channels(self) -> Tensor:
        return self.decay(self.size.heads, self.size.dim)

    @property
    def width(self) -> int:
        return self.size.heads * self.size.dim


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Copies to differentiate by."""
    return [x.detach().clone().requires_grad_() for x in tensors]
