"""Temporary: the token loop behind the final interface."""

import torch
from torch import Tensor

from flacompile.ops import spec


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    out, last = [], []
    for i, (s, e) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        def cut(x): return None if x is None else x[:, s:e]
        S = state if state is None or cu_seqlens is None else state[i : i + 1]
        o, S = spec.conv(cut(x), weight, bias, S)
        out.append(o.to(x.dtype)); last.append(S)
    return torch.cat(out, 1), torch.cat(last)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def one(x): return None if x is None else x[:, None]
    o, S = spec.conv(one(x), weight, bias, state)
    return o[:, 0].to(x.dtype), S
