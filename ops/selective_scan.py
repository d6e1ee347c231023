"""Temporary: the token loop behind the final interface."""

import torch
from torch import Tensor

from flacompile.ops import spec


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bounds = [0, u.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    out, last = [], []
    for i, (s, e) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        def cut(x): return None if x is None else x[:, s:e]
        S = state if state is None or cu_seqlens is None else state[i : i + 1]
        o, S = spec.selective_scan(cut(u), cut(dt), A, cut(B), cut(C), S)
        out.append(o.to(u.dtype)); last.append(S)
    return torch.cat(out, 1), torch.cat(last)


def selective_scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def one(x): return None if x is None else x[:, None]
    o, S = spec.selective_scan(one(u), one(dt), A, one(B), one(C), state)
    return o[:, 0].to(u.dtype), S
