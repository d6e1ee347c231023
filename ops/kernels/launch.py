"""One way to start a Triton kernel: visible to Inductor on a GPU, plain under the interpreter."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction


def on_interpreter(kernel: Any) -> bool:
    """Whether the kernel was defined under TRITON_INTERPRET=1."""
    return isinstance(kernel, InterpretedFunction)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel[grid](*args, **meta)`.

    Inside a `torch.library.triton_op` the kernel is wrapped, so that a compiler sees it and can
    place it in its own graph. `torch.library.wrap_triton` refuses interpreted kernels on
    torch 2.11, so those are called directly.
    """
    if not on_interpreter(kernel):
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **meta)
