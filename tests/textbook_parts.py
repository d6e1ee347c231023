"""What the loops of the textbook share: norms, convolution, rotary embedding, projections.

No code of the mixers is used here either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

σ = torch.sigmoid
GATES = {"swish": F.silu, "sigmoid": σ}


def identity(x):
    return x


def rms(x, weight, eps=1e-5, offset=0.0):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight)


def conv(x, weight, bias, act=F.silu):
    """act(Σ_i w_i x_{t-i}): the last weight is that of the current token."""
    past, y = x.new_zeros(x.shape[0], weight.shape[-1] - 1, x.shape[2]), []
    for t in range(x.shape[1]):
        window = torch.cat((past, x), 1)[:, t : t + weight.shape[-1]]
        y.append((window * weight[:, 0].T).sum(1) + (0 if bias is None else bias))
    return act(torch.stack(y, 1))


def rotate(x, rotary):
    """(a + ib) e^{i t f} over pairs of channels, t from 0; x [B, T, H, K]."""
    n, config = len(rotary.inv_freq), rotary.config
    even, odd = (
        (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
        if config.interleaved
        else (slice(0, n), slice(n, 2 * n))
    )
    angle = torch.arange(x.shape[1])[:, None, None] * rotary.inv_freq.to(x.dtype)
    turned = torch.complex(x[..., even], x[..., odd]) * torch.polar(
        torch.full_like(angle, config.factor), angle
    )
    y = x.clone()
    y[..., even], y[..., odd] = turned.real, turned.imag
    return y


def linear(layer, x):
    """W x + b; a layer with a norm rounds x to 8 bits and W to -1, 0, 1, gradients passing by."""
    if not hasattr(layer, "norm"):
        return layer(x)
    x = x if layer.norm is None else rms(x, layer.norm.weight, layer.norm.eps)
    step, size = x.abs().amax(-1, keepdim=True) / 127, layer.weight.abs().mean()
    x = x + ((x / step).round() * step - x).detach()
    ternary = (layer.weight / size).round().clamp(-1, 1) * size
    return F.linear(x, layer.weight + (ternary - layer.weight).detach(), layer.bias)


def qkv(m, x, conv_act=F.silu, gate=identity):
    """q, k, v [B, T, H, *] of a mixer, heads repeated, those of several steps in a row."""
    c, streams = m.config, []
    kv_heads, v_heads = c.num_kv_heads or c.num_heads, getattr(c, "num_v_heads", None)
    heads = {"q": c.num_heads, "k": kv_heads, "v": v_heads or kv_heads}
    for name, count in heads.items():
        y = linear(getattr(m, f"{name}_proj"), x)
        if getattr(c, "use_short_conv", False):
            layer = getattr(m, f"{name}_conv1d")
            y = conv(y, layer.weight, layer.bias, conv_act)
        y = gate(y)
        count_of_all = count * (1 if name == "q" else getattr(c, "num_householder", 1))
        y = y.view(*x.shape[:2], count_of_all, -1)
        if c.qk_norm and name != "v":
            norm = getattr(m, f"{name}_norm")
            flat = y.flatten(2).unflatten(2, (-1, norm.weight.numel()))
            y = rms(flat, norm.weight, norm.eps, norm.offset).view_as(y)
        y = rotate(y, m.rotary) if m.rotary is not None and name != "v" else y
        streams.append(y.repeat_interleave((v_heads or c.num_heads) // count, 2))
    return streams


def gated_output(m, o, x):
    """W_o [RMSNorm(o) ⊙ gate(W_g x)], each part where it is on."""
    c = m.config
    if c.output_norm:
        fused = c.use_output_gate and c.gate_fn == "swish"
        o = rms(o, (m.g_norm_swish_gate if fused else m.g_norm).weight)
    gate = GATES[c.gate_fn]
    return m.o_proj(o.flatten(2) * gate(m.g_proj(x)) if c.use_output_gate else o.flatten(2))
