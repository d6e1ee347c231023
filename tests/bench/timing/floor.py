"""What no kernel can go below: bytes that must move, and the recurrence's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

SOFTMAX = {  # torch counts its softmax attention on a GPU alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)
    )
}


def least_bytes(tensors: list[Tensor], o: Tensor) -> tuple[int, int]:
    """Of a forward, and of a forward and backward.

    Each input is read once and o written once; a backward reads inputs and do, and writes the
    gradients of all inputs.
    """
    inputs = sum(x.nbytes for x in tensors)
    return inputs + o.nbytes, 3 * inputs + 2 * o.nbytes


def milliseconds_of(count: int, terabytes: float) -> float:
    """Of so many bytes at so many TB/s."""
    return count / terabytes / 1e9


def work(f: Callable[..., Any], tensors: list[Tensor]) -> dict[str, int]:
    """Bytes and operations of a forward, by shapes alone.

    Operations are those of the recurrence, token by token: no chunk's. Softmax counts all pairs.
    """
    counter = FlopCounterMode(display=False, custom_mapping=SOFTMAX)
    with FakeTensorMode(), torch.no_grad(), counter:
        o = f(*(torch.empty(x.shape, dtype=x.dtype) for x in tensors))[0]
    forward, both = least_bytes(tensors, o)
    return {"bytes": forward, "bytes both": both, "flops": counter.get_total_flops()}
