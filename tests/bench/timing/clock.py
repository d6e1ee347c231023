"""Milliseconds and MiB of a call on a GPU, and the ceilings of the device.

A call is timed as it is made (``eager``), Python and launches included, and as a CUDA graph of the
same call (``kernels``), which leaves the kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .draw import leaves

Call = Callable[[], Any]


def milliseconds(call: Call) -> float:
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """The call as a graph, after three calls on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replayed(call: Call) -> float | str:
    """Milliseconds of the call's graph, or the name of what forbids one.

    A synchronisation is looked for before: inside a capture it would leave the allocator unusable.
    """
    stream = torch.cuda.current_stream()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode("default")
        return milliseconds(captured(call).replay)
    except Exception as reason:  # in a peer's code
        return type(reason).__name__
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_stream(stream)  # a failed capture stays on its own


def peak(call: Call) -> float:
    """MiB above what is held before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def both(f: Callable[..., Any], tensors: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    """Gradients of one forward and backward."""
    return torch.autograd.grad(f(*tensors)[0], tensors, do)


def measure(f: Callable[..., Any], tensors: list[Tensor]) -> dict[str, float | str]:
    """Times of forward and of forward and backward, both ways, and peak memory of the latter."""
    with torch.no_grad():
        do = torch.ones_like(f(*tensors)[0])
    fresh = leaves(tensors)  # of a graph: their gradients belong to no other stream

    def forward() -> Any:
        with torch.no_grad():
            return f(*tensors)

    found: dict[str, float | str] = {"MiB": peak(lambda: both(f, tensors, do))}
    found["forward"] = milliseconds(forward)
    found["both"] = milliseconds(lambda: both(f, tensors, do))
    found["forward kernels"] = replayed(forward)
    found["both kernels"] = replayed(lambda: both(f, fresh, do))
    return found


def ceilings() -> dict[str, float]:
    """Speed of a copy of 1 GiB, read and written, and of an 8192³ matmul in bf16."""
    x = torch.empty(2**30, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e9
    a, b = (torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {"copy TB/s": copy, "matmul TFLOP/s": 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9}
