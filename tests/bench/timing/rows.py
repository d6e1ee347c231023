"""Every op that is timed: its tensors, ours, and the definition that its values are held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile import ops
from flacompile.layers import MIXERS
from flacompile.layers.rwkv6 import bonus
from flacompile.ops import spec

from .draw import Draw

SLOTS, FEATURES, STATES, TAPS = 64, 16, 16, 4


class Row(NamedTuple):
    """What draws the tensors, ours and the definition; both give o first.

    around: whether PyTorch stands around the op, which ``torch.compile`` fuses.
    """

    draw: Callable[[Draw], list[Tensor]]
    ours: Callable[..., Any]
    loop: Callable[..., Any]
    around: bool = False


def qkv(d: Draw, *more: Tensor) -> list[Tensor]:
    return [d.head(), d.unit().to(d.dtype), d.head(), *more]


def delta(d: Draw, g: Tensor) -> list[Tensor]:
    return qkv(d, g, d.wide(d.size.heads).sigmoid().to(d.dtype))


def dplr(d: Draw) -> list[Tensor]:
    kappa = d.unit()
    g = -0.6 * torch.sigmoid(d.wide(d.size.heads, d.size.dim) - 2)
    a, b = -kappa.to(d.dtype), (kappa * d.head().float().sigmoid()).to(d.dtype)
    return [d.head(), d.head() * 0.1, d.head(), g, a, b]


def mamba2(f: Callable[..., Any]) -> Callable[..., Any]:
    """One group of B and C for all heads, [B, T, 1, N]; x is dt x and g is dt A."""
    return partial(f, scale=1.0)


def selective(d: Draw) -> list[Tensor]:
    A = -d.plain(d.width, STATES).abs() * 4 - 1
    dt = F.softplus(d.wide(d.width) - 4)
    return [d.normal(d.width), dt, A, d.normal(1, STATES), d.normal(1, STATES)]


def rwkv6(heads: int, dim: int) -> Callable[..., Any]:
    """The mixer's own mix, and what the current token counts."""
    fields = {"hidden_size": heads * dim, "num_heads": heads, "expand_k": 1.0}
    with torch.device("meta"):
        mixer = MIXERS["rwkv6"](MIXERS["rwkv6"].Config(**fields))

    def run(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor]:
        return (mixer.mix((r, k, v, w), None, None)[0] + mixer.scale * bonus(r, k, u, v),)

    return run


def rwkv6_loop(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor]:
    """o_t = r_t (S_{t-1} + u k_t v_t^T): a read of the state by the next token's r."""
    early = F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1))
    o = spec.linear_attn(early, k, v, w, scale=1.0)[0]
    return (F.pad(o[:, :-1], (0, 0, 0, 0, 1, 0)) + (r * u * k).sum(-1, True) * v,)


def abc(heads: int, dim: int) -> Callable[..., Any]:
    """The mixer's own mix: two passes and a softmax between them."""
    plain = {"use_rope": False, "use_output_gate": False, "use_norm": False}
    fields = {"hidden_size": heads * dim, "num_heads": heads, "expand_k": 1.0, "num_slots": SLOTS}
    with torch.device("meta"):
        mixer = MIXERS["abc"](MIXERS["abc"].Config(**fields, **plain))
    return lambda *tensors: mixer.mix(tensors, None, None)


def abc_loop(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor]:
    """Each slot holds means of k and v under softmax over the tokens so far."""
    weight = (s - s.amax(1, keepdim=True).detach()).exp()
    total = weight.cumsum(1)
    p = (spec.linear_attn(q, k, weight)[0] / total).softmax(-1) / total
    return (spec.linear_attn(p, weight, v, scale=1.0)[0],)


def based(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    r = q.shape[-1] ** -0.5
    return (ops.quadratic_attn(q, k, v, weights=(1.0, r, r * r / 2))[0],)


def based_loop(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """o_t is the mean of v_s under 1 + a + a²/2, a = q_t·k_s / √K, s <= t."""
    a = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    weight = (1 + a + a * a / 2).tril()
    return (torch.einsum("bhts,bshv->bthv", weight / weight.sum(-1, True), v),)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),)


def rows(heads: int, dim: int) -> dict[str, Row]:
    """All of them by name, in the order of the table."""
    linear, linear_loop = ops.linear_attn, spec.linear_attn
    return {
        "linear_attn": Row(qkv, linear, linear_loop),
        "simple_gla": Row(lambda d: qkv(d, d.decays()), linear, linear_loop),
        "mamba2": Row(
            lambda d: [d.normal(1, dim), d.normal(1, dim), d.head(), d.decays()],
            mamba2(linear), mamba2(linear_loop),
        ),
        "gla": Row(lambda d: qkv(d, d.decays_of_channels()), linear, linear_loop),
        "rwkv6": Row(
            lambda d: qkv(d, d.decays_of_channels(), d.plain(d.size.heads, dim).to(d.dtype)),
            rwkv6(heads, dim), rwkv6_loop, around=True,
        ),
        "gated_delta_rule": Row(lambda d: delta(d, d.decays()), ops.delta_rule, spec.delta_rule),
        "kda": Row(lambda d: delta(d, d.decays_of_channels()), ops.delta_rule, spec.delta_rule),
        "rwkv7": Row(dplr, ops.dplr, spec.dplr),
        "hgrn": Row(lambda d: [d.decay(d.width), d.normal(d.width)], ops.scan, spec.scan),
        "mamba": Row(selective, ops.selective_scan, spec.selective_scan),
        "conv": Row(
            lambda d: [d.normal(d.width), d.plain(d.width, TAPS).to(d.dtype)], ops.conv, spec.conv
        ),
        "abc": Row(lambda d: qkv(d, d.head(SLOTS)), abc(heads, dim), abc_loop, around=True),
        "based": Row(
            lambda d: [d.head(FEATURES), d.head(FEATURES), d.head()], based, based_loop
        ),
        "softmax": Row(qkv, softmax, softmax),
    }  # fmt: skip
