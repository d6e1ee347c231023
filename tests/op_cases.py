"""Every op with the inputs it is tested on: ``OPS[name]``, each a table of variants.

A variant draws the op's tensors for a batch and a length; the state comes after them. Adding an op
is adding its row: tests/test_ops.py and tests/bench/errors.py then hold it to the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flacompile import ops
from flacompile.ops import spec

Args = list[Tensor | None]


class Draw:
    """Random numbers of one case, in float64 whatever it is later rounded to.

    Args:
        batch, time: B and T.
        strength: size of the log decays of a token.
        key, value: sizes of K (or D, C) and V (or N, W) where the variant leaves them open.
    """

    def __init__(self, batch: int, time: int, strength: float, key: int = 6, value: int = 10):
        self.rows, self.strength, self.key, self.value = (batch, time), strength, key, value
        self.generator = torch.Generator().manual_seed(time)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def at_tokens(self, *shape: int) -> Tensor:
        return self.normal(*self.rows, *shape)

    def decay(self, *shape: int) -> Tensor:
        return -self.strength * (self.at_tokens(*shape).abs() + 1e-3)

    def of_kind(self, kind: str | None, dim: int, heads: int = 2) -> Tensor | None:
        shapes = {"head": (heads,), "channel": (heads, dim)}
        return None if kind is None else self.decay(*shapes[kind])


def linear_attn(draw: Draw, gk: str | None, gv: str | None, heads: int = 2) -> Args:
    q, k = draw.at_tokens(2, draw.key), draw.at_tokens(2, draw.key)
    v = draw.at_tokens(heads, draw.value)
    return [q, k, v, draw.of_kind(gk, draw.key, heads), draw.of_kind(gv, draw.value, heads)]


def quadratic_attn(draw: Draw, gk: str | None) -> Args:
    return linear_attn(draw, gk, None)[:4]


def delta_rule(draw: Draw, kind: str | None) -> Args:
    q, k = draw.at_tokens(2, draw.key), F.normalize(draw.at_tokens(2, draw.key), dim=-1)
    beta = 2 * draw.at_tokens(2).sigmoid()
    return [q, k, draw.at_tokens(2, draw.value), draw.of_kind(kind, draw.key), beta]


def dplr(draw: Draw, kind: str | None) -> Args:
    q, k = draw.at_tokens(2, draw.key), draw.at_tokens(2, draw.key)
    direction = F.normalize(draw.at_tokens(2, draw.key), dim=-1)
    b = direction * draw.at_tokens(2, draw.key).sigmoid()
    v, g = draw.at_tokens(2, draw.value), draw.of_kind(kind, draw.key)
    return [q, k, v, g, -direction if g is None else -direction * 0.9, b]


def scan(draw: Draw) -> Args:
    return [draw.decay(draw.key), draw.at_tokens(draw.key)]


def selective_scan(draw: Draw, groups: int) -> Args:
    u, dt = draw.at_tokens(draw.key), -draw.decay(draw.key)
    A = -draw.normal(draw.key, draw.value).exp()
    return [u, dt, A, *(draw.at_tokens(groups, draw.value) for _ in range(2))]


def conv(draw: Draw, taps: int, bias: bool) -> Args:
    weight = draw.normal(draw.key, taps)
    return [draw.at_tokens(draw.key), weight, draw.normal(draw.key) if bias else None]


class Op(NamedTuple):
    """An op, its one-token step and its loop, with what a test must know of it.

    names of its tensors; weights, those without a time axis; decays, those that stay fp32;
    variants, name -> what draws the tensors; sizes, the (key, value) of ``Draw`` on a GPU; on_cpu,
    whether its CPU form is an op of its own.
    """

    names: tuple[str, ...]
    variants: dict[str, Callable[[Draw], Args]]
    options: dict[str, Any]
    weights: tuple[str, ...] = ()
    decays: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (128, 128), (40, 96), (256, 64))
    on_cpu: bool = True

    def tensors(self, variant: str, draw: Draw) -> Args:
        """The op's tensors, then a state."""
        args = self.variants[variant](draw)
        return [*args, self.state(args, draw)]

    def state(self, args: Args, draw: Draw, batch: int | None = None) -> Tensor:
        batch = draw.rows[0] if batch is None else batch
        if "weights" in self.options:  # sums of weights, which are positive
            k, v = draw.normal(batch, 3, 2, draw.key), draw.normal(batch, 3, 2, draw.value)
            return spec.quadratic_attn(k, k, v, weights=self.options["weights"])[1]
        weight, v = args[1], args[2] if len(args) > 2 else None
        assert weight is not None
        if self.names[0] == "q":
            assert v is not None
            return draw.normal(batch, v.shape[2], draw.key, draw.value)
        shapes = {"g": (draw.key,), "u": (draw.key, draw.value)}
        return draw.normal(batch, *shapes.get(self.names[0], (weight.shape[1] - 1, draw.key)))


KINDS = (None, "head", "channel")
SCALE = {"scale": 0.3}
NARROW = ((64, 16), (128, 16), (100, 8))
OPS = {
    "linear_attn": Op(
        ("q", "k", "v", "gk", "gv"),
        {"2 groups": lambda d: linear_attn(d, "head", None, 6)}
        | {f"{i}-{j}": lambda d, i=i, j=j: linear_attn(d, i, j) for i, j in product(KINDS, KINDS)},
        SCALE,
        decays=("gk", "gv"),
    ),
    "quadratic_attn": Op(
        ("q", "k", "v", "gk"),
        {f"{kind}": lambda d, kind=kind: quadratic_attn(d, kind) for kind in ("head", None)},
        {"weights": (1.0, 0.5, 0.125), "eps": 1e-3},
        decays=("gk",),
        sizes=((16, 64), (16, 128), (13, 96)),
        on_cpu=False,
    ),
    "delta_rule": Op(
        ("q", "k", "v", "g", "beta"),
        {f"{kind}": lambda d, kind=kind: delta_rule(d, kind) for kind in KINDS},
        SCALE,
        decays=("g",),
    ),
    "dplr": Op(
        ("q", "k", "v", "g", "a", "b"),
        {f"{kind}": lambda d, kind=kind: dplr(d, kind) for kind in KINDS},
        SCALE,
        decays=("g",),
    ),
    "scan": Op(("g", "x"), {"plain": scan}, {}, decays=("g",), sizes=NARROW),
    "selective_scan": Op(
        ("u", "dt", "A", "B", "C"),
        {f"{n} groups": lambda d, n=n: selective_scan(d, n) for n in (1, 2)},
        {},
        weights=("A",),
        decays=("dt", "A"),
        sizes=NARROW,
    ),
    "conv": Op(
        ("x", "weight", "bias"),
        {
            "4 taps": lambda d: conv(d, 4, True),
            "3 taps, no bias": lambda d: conv(d, 3, False),
            "1 tap": lambda d: conv(d, 1, True),
        },
        {},
        weights=("weight", "bias"),
        sizes=NARROW,
    ),
}


def function(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(ops, name)


def step(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(ops, f"{name}_step")


def loop(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(spec, name)


def tokens(name: str, args: Args, index: Any) -> Args:
    """The op's tensors (no state) at some tokens: an index or a slice of the time axis."""
    op = OPS[name]
    return [
        x if x is None or key in op.weights else x[:, index]
        for key, x in zip(op.names, args, strict=True)
    ]


def rounded(name: str, args: Args, dtype: torch.dtype) -> Args:
    """Tensors and state in ``dtype``; decays and states, which stay fp32, in that at least."""
    op, wide = OPS[name], torch.promote_types(dtype, torch.float32)
    kept = {*op.decays, *(() if name == "conv" else ("state",))}
    return [
        x if x is None else x.to(wide if key in kept else dtype)
        for key, x in zip((*op.names, "state"), args, strict=True)
    ]


def leaves(args: Args) -> Args:
    return [x if x is None else x.detach().clone().requires_grad_() for x in args]


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in float64; shapes must agree."""
    assert got.shape == want.shape
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item() if want.numel() else 0.0


def weighting(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random numbers for each output, the same ones whatever the dtype and device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outputs]


def gradients(outputs: tuple[Tensor, ...], args: Args) -> Args:
    """Gradients of the ``weighting`` of the outputs for each of the args."""
    loss = sum((x * y).sum() for x, y in zip(outputs, weighting(outputs), strict=True))
    given = [x for x in args if x is not None]
    found = iter(torch.autograd.grad(loss, given, materialize_grads=True))
    return [None if x is None else next(found) for x in args]
