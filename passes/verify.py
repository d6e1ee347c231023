"""The proof: an attention rebuilt from what was found must give what the model gave."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .sites import AttentionSite, NormSite, RotarySite
from .walk import NotProvable
from .written_out import softcapped_attention


def tolerance_of(dtype: torch.dtype) -> float:
    """Relative error that rounding alone may cause."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def agrees(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Largest difference within the tolerance of `dtype`, relative to the largest value."""
    if a.shape != b.shape:
        return False
    error = (a.float() - b.float()).abs().max()
    return bool(error <= tolerance_of(dtype) * b.float().abs().max())


def _normed(x: Tensor, norm: NormSite | None, weight: Tensor | None) -> Tensor:
    if norm is None:
        return x
    wide = x if norm.per_head else x.flatten(-2)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return (wide if weight is None else wide * (norm.offset + weight.float())).view_as(x)


def _rotated(x: Tensor, rotary: RotarySite | None) -> Tensor:
    """x [B, T, H, K] turned by its position."""
    if rotary is None:
        return x
    inv_freq = torch.tensor(rotary.inv_freq, dtype=torch.float32, device=x.device)
    angle = torch.arange(x.shape[1], device=x.device)[:, None, None] * inv_freq  # [T, 1, pairs]
    cos, sin = angle.cos() * rotary.factor, angle.sin() * rotary.factor
    pairs = len(rotary.inv_freq)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    split = (pairs, 2) if rotary.interleaved else (2, pairs)
    a, b = turned.unflatten(-1, split).unbind(-1 if rotary.interleaved else -2)
    both = (a * cos - b * sin, a * sin + b * cos)
    stacked = torch.stack(both, -1 if rotary.interleaved else -2)
    return torch.cat([stacked.flatten(-2), rest], -1)


def queries_and_keys(site: AttentionSite, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, T, K] and k [B, H_kv, T, K] of the site for x [B, T, D], in fp32."""
    w = site.weights(model)
    q, k = _heads(site, x, w.q_weight, w.q_bias), _heads(site, x, w.k_weight, w.k_bias)
    q = _rotated(_normed(q, site.q_norm, w.q_norm), site.rotary)
    k = _rotated(_normed(k, site.k_norm, w.k_norm), site.rotary)
    return q.transpose(1, 2), k.transpose(1, 2)


def _heads(site: AttentionSite, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b by heads, [B, T, H, K] in fp32."""
    y = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return y.unflatten(-1, (-1, site.head_dim))


def rebuild(site: AttentionSite, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """q, k, v [B, H, T, K] and y [B, T, D] of the site for x [B, T, D], in fp32."""
    w = site.weights(model)
    q, k = queries_and_keys(site, model, x)
    v = _heads(site, x, w.v_weight, w.v_bias).transpose(1, 2)
    time = x.shape[1]
    mask = torch.ones(time, time, dtype=torch.bool, device=x.device).tril()
    mask = mask.triu(1 - site.window) if site.window else mask
    if site.softcap is not None:
        y = softcapped_attention(q, k, v, mask, scale=site.scale, softcap=site.softcap)
    else:
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=site.scale, enable_gqa=site.num_kv_heads != site.num_heads
        )
    bias = None if w.o_bias is None else w.o_bias.float()
    y = nn.functional.linear(y.transpose(1, 2).flatten(-2), w.o_weight.float(), bias)
    return {"queries": q, "keys": k, "values": v, "output": y}


def prove(
    rebuilt: Mapping[str, Tensor], seen: Mapping[str, Tensor], gains: Mapping[str, float]
) -> None:
    """Rebuilt queries, keys and values against what the model computed from the same x.

    Args:
        gains: by how much the model's tensors differ from the site's, which keeps such factors
            in its `scale`.
    """
    for name, tensor in seen.items():
        ours = rebuilt[name] * gains.get(name, 1.0)
        if ours.shape[1] != tensor.shape[1]:
            ours = ours.repeat_interleave(tensor.shape[1] // ours.shape[1], 1)
        if not agrees(ours, tensor, tensor.dtype):
            raise NotProvable(f"{name} rebuilt from the weights found differ from the model's")
