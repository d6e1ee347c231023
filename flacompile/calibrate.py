"""Decay and scale of each head from the teacher's statistics, in closed form and in one pass.

With o_h(c) what head h adds to the output under the c-th setting of its gates, the error

    ||Σ_h s_h o_h(c_h) - y||² = ||y||² - 2 s·r + s·G s        r = <o_h(c_h), y>, G = <o_h, o_g>

is a quadratic form of sums over tokens: r for every (c, h), G for every two of them, and ||y||².
They are added up batch by batch; nothing else is kept of a batch. Candidates are the neutral
half-lives and multiples of how far the teacher's head looks back, each with every share of what a
key recalls that the mixer may replace, where it replaces any. From the sums each head takes the
candidate that lowers the error most, others as they are, until none does, where the scales s solve
G s = r. The search starts at the neutral mixer, so it never ends above its error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flacompile.layers import Mixer
from flacompile.passes.capture import evaluating, record_calls, without_cache
from flacompile.passes.sites import AttentionSite
from flacompile.passes.swap_attention import Convention
from flacompile.passes.verify import queries_and_keys

STRETCH = tuple(2.0**i for i in range(-3, 5))  # half-lives, in units of ln 2 times the look-back
ROWS = 128  # queries whose attention weights are held at once
ELEMENTS = 2**22  # of the heads' outputs that are held at once
RIDGE = 1e-6  # pulls scales to one, in units of the head's own power

CallArguments = tuple[tuple[Any, ...], dict[str, Any]]


class Errors(NamedTuple):
    """||mixer(x) - y||² / ||y||² on the calibration data, neutral and as the mixer is now."""

    before: float
    after: float


def calibrate(
    model: nn.Module,
    parts: Mapping[str, tuple[AttentionSite, Mixer, Convention]],
    calls: Iterable[CallArguments],
    *,
    adjust: bool = True,
) -> dict[str, Errors]:
    """Runs the model once on every call and sets the mixers that are to stand in it, in place.

    Args:
        model: with its own attention still in place.
        parts: by the path of an attention: where it is, the mixer that holds its weights, and how
            the model calls it.
        calls: arguments of the model, taken one at a time.
        adjust: False leaves the mixers neutral and only measures them.

    Raises:
        ValueError: there is no call.
    """
    fits: dict[str, HeadFit] = {}
    with evaluating(model):
        for args, kwargs in calls:
            seen = record_calls(model, set(parts), args, without_cache(model, kwargs))
            for path, (site, mixer, convention) in parts.items():
                call = seen.pop(path)
                x, _, mask, _ = convention.read(call.args, call.kwargs)
                if path not in fits:
                    distance = None
                    if adjust and hasattr(mixer, "set_half_life"):
                        q, k = queries_and_keys(site, model, x)
                        distance = look_back(q, k, site.scale, site.window, mask)
                    fits[path] = HeadFit(mixer, distance, adjust)
                fits[path].add(x, convention.output(call.result), mask)
        if not fits:
            raise ValueError("calibration: expected at least one batch, got none")
        return {path: fit.finish() for path, fit in fits.items()}


class HeadFit:
    """The sums of one attention and of the mixer that is to replace it.

    Args:
        mixer: holds the attention's weights; set in place by ``finish``.
        look_back: mean distance in tokens of each head, [H]; None where there is no decay to set.
        adjust: whether scales are solved for.
    """

    def __init__(self, mixer: Mixer, look_back: Tensor | None, adjust: bool) -> None:
        self.mixer, self.adjust = mixer, adjust
        self.gates = {} if look_back is None else candidates(mixer, look_back)
        self.candidates = max(map(len, self.gates.values()), default=1)
        size = self.candidates * mixer.output_heads
        layer = mixer.output_layer
        self.weight = layer.weight.double().unflatten(1, (mixer.output_heads, -1))  # [D, H, V]
        self.bias = 0.0 if layer.bias is None else layer.bias.double()
        self.gram = self.weight.new_zeros(size, size)
        self.right = self.weight.new_zeros(size)
        self.power = self.weight.new_zeros(2)  # of y without the bias, and of y

    def add(self, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Adds a batch: the attention's input and output [B, T, D], and its real tokens [B, T]."""
        heads = []
        for c in range(self.candidates):
            self._open([c] * len(self.mixer.decay_groups))
            heads.append(head_outputs(self.mixer, x, mask))
        outputs = torch.stack(heads, 1)  # [N, C, H, V]
        y = y.flatten(0, 1) if mask is None else y[mask.bool()]
        rows = max(1, ELEMENTS // (len(self.right) * y.shape[1]))
        for o, target in zip(outputs.split(rows), y.double().split(rows), strict=True):
            o = torch.einsum("nchv,dhv->chnd", o.double(), self.weight).flatten(2).flatten(0, 1)
            rest = (target - self.bias).flatten()
            self.gram += o @ o.mT
            self.right += o @ rest
            self.power += torch.stack((rest.square().sum(), target.square().sum()))

    def finish(self) -> Errors:
        """Sets the mixer to the best that the sums allow; they are small, and searched on a CPU."""
        self.gram, self.right, self.power = self.gram.cpu(), self.right.cpu(), self.power.cpu()
        groups = self.mixer.decay_groups
        choice = [0] * len(groups)
        scales = torch.ones_like(self.right[: self.mixer.output_heads])
        before = best = self._error(choice, scales)
        turns = [(g, c) for g in range(len(groups)) for c in range(self.candidates)]
        improved = self.adjust
        while improved:
            improved = False
            for group, candidate in turns:
                trial = [*choice[:group], candidate, *choice[group + 1 :]]
                solved = self._solve(trial)
                error = self._error(trial, solved)
                if error < best * (1 - RIDGE):
                    choice, scales, best, improved = trial, solved, error, True
        self._open(choice)
        if self.adjust:
            self.mixer.scale_heads(scales.to(self.weight.device))
        return Errors(before, best)

    def _open(self, choice: list[int]) -> None:
        """Sets the gates of every group of heads to its candidate."""
        for setter, table in self.gates.items():
            index = torch.tensor(choice, device=table.device)
            index = index.repeat_interleave(table.shape[1] // len(choice))
            getattr(self.mixer, setter)(table.gather(0, index[None])[0])

    def _index(self, choice: list[int]) -> Tensor:
        """Places in the sums of the heads under this choice."""
        heads = self.mixer.output_heads
        index = torch.arange(heads, device=self.right.device)
        for group, candidate in zip(self.mixer.decay_groups, choice, strict=True):
            index[list(group)] += candidate * heads
        return index

    def _solve(self, choice: list[int]) -> Tensor:
        """argmin over s [H] of the error, next to it where heads are alike."""
        i = self._index(choice)
        gram, right = self.gram[i][:, i], self.right[i]
        ridge = (RIDGE * gram.diagonal()).clamp_min(torch.finfo(gram.dtype).tiny)
        return torch.linalg.solve(gram + ridge.diag(), right + ridge)

    def _error(self, choice: list[int], scales: Tensor) -> float:
        """The relative error of the mixer under this choice with these scales."""
        i = self._index(choice)
        rest, power = self.power
        error = rest - 2 * scales @ self.right[i] + scales @ self.gram[i][:, i] @ scales
        return (error.clamp_min(0) / power.clamp_min(torch.finfo(power.dtype).tiny)).item()


def candidates(mixer: Mixer, look_back: Tensor) -> dict[str, Tensor]:
    """What the mixer's gates may be set to, [C, H] by the method that sets them, neutral first."""
    stretch = math.log(2) * torch.tensor(STRETCH).to(look_back)
    near = stretch[:, None] * look_back.clamp_min(1.0)
    half_lives = torch.cat((mixer.neutral_half_life.to(near)[None], near))
    if not mixer.replaced:
        return {"set_half_life": half_lives}
    shares = torch.tensor(mixer.replaced).to(near).repeat_interleave(len(half_lives))
    half_lives = half_lives.repeat(len(mixer.replaced), 1)
    return {"set_half_life": half_lives, "set_replaced": shares[:, None].expand_as(half_lives)}


def head_outputs(mixer: Mixer, x: Tensor, mask: Tensor | None) -> Tensor:
    """What the mixer's heads give to its output layer at real tokens, [N, H, V]."""
    seen: list[Tensor] = []
    hook = mixer.output_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        mixer(x, mask=mask)
    finally:
        hook.remove()
    o = seen[0].unflatten(-1, (mixer.output_heads, -1))
    if mask is None:
        return o.flatten(0, 1)
    time = torch.arange(x.shape[1], device=x.device)
    return o[time < mask.sum(1, keepdim=True)]  # a mixer moves the padding to the end


def look_back(
    q: Tensor, k: Tensor, scale: float, window: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean distance in tokens that each head looks back, [H]; no [T, T] map is held.

    Args:
        q: [B, H, T, K].
        k: [B, H_kv, T, K].
        scale: factor on q k.
        window: tokens that a query sees, itself among them; None is all before it.
        mask: real tokens, [B, T].
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    time = torch.arange(q.shape[2], device=q.device)
    real = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if mask is None else mask.bool()
    total = q.new_zeros(q.shape[1], dtype=torch.float32)
    for rows, queries in zip(time.split(ROWS), q.split(ROWS, 2), strict=True):
        age = rows[:, None] - time
        unseen = (age < 0) if window is None else (age < 0) | (age >= window)
        hidden = (unseen | ~real[:, None, :])[:, None]  # [B, 1, ROWS, T]
        scores = ((queries @ k.mT).float() * scale).masked_fill(hidden, -torch.inf)
        distance = (scores.softmax(-1) * age).sum(-1)  # [B, H, ROWS], NaN where nothing is seen
        total += torch.where(real[:, None, rows], distance, 0.0).sum((0, 2))
    return total / real.sum().clamp_min(1)
