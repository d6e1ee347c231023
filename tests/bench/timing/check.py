"""Whether an op's values are right, and the same twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .draw import Size, leaves

BOUND = 2e-2  # relative norm of an error, in bf16, of o and of each gradient
TOKENS, HEADS = 2048, 2  # the part that is compared, of the first row


def part(x: Tensor, size: Size) -> Tensor:
    """The first tokens and heads of a tensor [B, T, H or channels, *] or of a weight."""
    at_tokens = x.shape[:2] == (size.batch, size.time) and x.ndim > 2
    if at_tokens:
        x = x[:1, :TOKENS]
    axis = 2 if at_tokens else 0
    heads = min(HEADS, size.heads)
    kept = {size.heads: heads, size.heads * size.dim: heads * size.dim}
    return x.narrow(axis, 0, kept.get(x.shape[axis], x.shape[axis]))


def values(f: Callable[..., Any], tensors: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """o and the gradient of every tensor."""
    o = f(*tensors)[0]
    return o, *torch.autograd.grad(o, tensors, do)


def worst(
    f: Callable[..., Any], loop: Callable[..., Any], tensors: list[Tensor], size: Size
) -> tuple[float, bool]:
    """The largest relative error at the timed size, and whether two runs agree in every bit.

    Only the first tokens, heads and row have a gradient of o, so that those of the tensors are the
    gradients of that part alone, which the definition takes in float64.
    """
    o = f(*tensors)[0]
    do = torch.zeros_like(o.detach())
    inside = part(do, size)
    generator = torch.Generator(o.device).manual_seed(1)
    inside.copy_(torch.randn(inside.shape, generator=generator, device=o.device))
    first, second = values(f, tensors, do), values(f, tensors, do)
    equal = all(a.equal(b) for a, b in zip(first, second, strict=True))
    exact = values(loop, leaves([part(x, size).double() for x in tensors]), inside.double())
    pairs = [(part(a, size), b) for a, b in zip(first, exact, strict=True)]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs), equal
