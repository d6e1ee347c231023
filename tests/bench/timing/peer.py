"""The same ops of flash-linear-attention and mamba_ssm, on the same tensors.

On Hopper, flash-linear-attention refuses a gated backward under Triton 3.4 to 3.7.0, whose code
for it gives wrong gradients (its issue 640). ``timing_only`` takes that refusal away: the time is
that of the kernel, the gradients are as wrong as it says, and the row carries a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

NOTE = "refusal of a wrong gated backward bypassed: for the time alone"


def fla(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"fla.ops.{module}"), name)


def linear_attn(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return fla("linear_attn", "chunk_linear_attn")(q, k, v, normalize=False)


def mamba2(C: Tensor, B: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor]:
    """Its x is multiplied by dt inside: dt = -g, A = -1."""
    chunked = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    A = -torch.ones(x.shape[2], device=x.device)
    return (chunked((x / -g[..., None]).to(x.dtype), -g, A, B, C, chunk_size=256),)


def rwkv7(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Any:
    return fla("rwkv7", "chunk_rwkv7")(q, g, k, v, a, b, scale=q.shape[-1] ** -0.5)


PEERS: dict[str, Callable[..., Any]] = {
    "linear_attn": linear_attn,
    "simple_gla": lambda *tensors: fla("simple_gla", "chunk_simple_gla")(*tensors),
    "mamba2": mamba2,
    "gla": lambda *tensors: fla("gla", "chunk_gla")(*tensors),
    "rwkv6": lambda *tensors: fla("rwkv6", "chunk_rwkv6")(*tensors, scale=1.0),
    "gated_delta_rule": lambda *tensors: fla("gated_delta_rule", "chunk_gated_delta_rule")(
        *tensors
    ),
    "kda": lambda *tensors: fla("kda", "chunk_kda")(*tensors),
    "rwkv7": rwkv7,
    "hgrn": lambda g, x: fla("hgrn", "fused_recurrent_hgrn")(x, g),
    "abc": lambda *tensors: fla("abc", "chunk_abc")(*tensors),
    "based": lambda *tensors: (fla("based", "parallel_based")(*tensors),),
}


@contextmanager
def timing_only(name: str) -> Iterator[str | None]:
    """Takes the refusal away where it would be raised; gives the row's note."""
    if name not in ("simple_gla", "gated_delta_rule"):
        yield None
        return
    module = import_module("fla.ops.common.chunk_o")
    refused = module.IS_NVIDIA_HOPPER and not module.TRITON_ABOVE_3_7_1
    with patch.object(module, "TRITON_ABOVE_3_7_1", True):
        yield NOTE if refused else None
