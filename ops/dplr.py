"""Temporary: the token loop behind the final interface."""

import torch
from torch import Tensor

from flacompile.ops import spec


def dplr(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, *,
    scale: float | None = None, state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    out, last = [], []
    for i, (s, e) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        def cut(x): return None if x is None else x[:, s:e]
        S = state if state is None or cu_seqlens is None else state[i : i + 1]
        o, S = spec.dplr(cut(q), cut(k), cut(v), cut(g), cut(a), cut(b), scale, S)
        out.append(o.to(v.dtype)); last.append(S)
    return torch.cat(out, 1), torch.cat(last)


def dplr_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor, *, scale: float | None = None, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def one(x): return None if x is None else x[:, None]
    o, S = spec.dplr(one(q), one(k), one(v), one(g), one(a), one(b), scale, state)
    return o[:, 0].to(v.dtype), S
