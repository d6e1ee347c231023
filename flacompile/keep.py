"""Which attentions of a model stay softmax: those given, a share of all, or those worth most.

Worth is measured in one of two ways, right after the conversion or when the mixers have been
aligned. "auto": with every attention converted, one at a time answers as the original again, and
what that brings the model nearer to the original is its gain (as KL-guided selection does after
training, Li et al. 2025, arXiv 2512.20569; here in one pass an attention and batch). "recall": one
attention at a time is converted alone, and what the model then loses of a needle's recall is its
gain (HALO, Chen et al. 2026, arXiv 2601.22156).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flacompile.calibrate import CallArguments
from flacompile.ops.validate import expect
from flacompile.passes.capture import evaluating, without_cache
from flacompile.passes.swap_attention import restore_attention, routed, swapped

Keep = float | Sequence[int] | str

SHARE = 0.25  # that a method keeps where it is told no size
BATCHES = 4  # of the calibration that gains are measured on, at most
ROWS = 1024  # positions whose distributions are held at once in fp32
METHODS = ("auto", "recall", "uniform")


class Choice(NamedTuple):
    """How many attentions to keep, by the gain that this method measures."""

    method: str
    number: int


def read_keep(keep: Keep, count: int) -> tuple[set[int], Choice | None]:
    """Indices of attentions to keep, of ``count``, or how to choose them by their gain."""
    if isinstance(keep, str):
        choice = _read_choice(keep, count)
        return (
            (_spread(choice.number, count), None) if choice.method == "uniform" else (set(), choice)
        )
    if isinstance(keep, (int, float)):
        share = "indices, 'auto' or a share in [0, 1)"
        expect(0 <= keep < 1, "keep", share, keep)
        return _spread(round(keep * count), count), None
    wrong = [i for i in keep if not -count <= i < count]
    expect(not wrong, "keep", f"indices of {count} attentions", wrong)
    return {i % count for i in keep}, None


def _spread(number: int, count: int) -> set[int]:
    """So many of ``count`` indices, evenly apart."""
    return {int((i + 0.5) * count / number) for i in range(number)}


def _read_choice(keep: str, count: int) -> Choice:
    """ "auto" is SHARE of all, "auto:0.5" a share and "auto:3" a number; at least one."""
    found = re.fullmatch(rf"({'|'.join(METHODS)})(?::(\d+|0?\.\d+))?", keep)
    number = 0.0 if found is None else float(found[2] or SHARE)
    want = f"{', '.join(METHODS)}, each alone or with ':<share below 1>' or ':<number>'"
    if found is None or not number:
        raise ValueError(f"keep: expected {want}, got {keep!r}")
    number = max(1, round(number * count)) if number < 1 else int(number)
    expect(number < count or not count, "keep", f"fewer than all {count} attentions", repr(keep))
    return Choice(found[1], number)


def keep_best(model: nn.Module, calls: Sequence[CallArguments], choice: Choice) -> dict[str, float]:
    """Restores, in place, those attentions that gain most.

    Args:
        model: every attention in question swapped, the originals kept.
        calls: arguments of the model on which the gains are measured.
        choice: how, and how many.

    Returns:
        The gain of every one, by path.
    """
    gains = (_gains if choice.method == "auto" else _recall_drops)(model, calls)
    for path in sorted(gains, key=lambda path: -gains[path])[: choice.number]:
        restore_attention(model, path)
    return gains


@torch.no_grad()
def _gains(model: nn.Module, calls: Sequence[CallArguments]) -> dict[str, float]:
    """What the original in each swapped attention alone gains over the mixer.

    Distance to the original model is KL(original || model), nats a position, for a model that
    returns ``logits``, else ||y - y_original||² / ||y_original||².
    """
    layers = swapped(model)
    gains = dict.fromkeys(layers, 0.0)
    with evaluating(model):
        for args, kwargs in calls:
            kwargs = without_cache(model, kwargs)
            with routed(model, "original"):
                want = model(*args, **kwargs)
            converted = _distance(model(*args, **kwargs), want)
            for path, layer in layers.items():
                layer.route = "original"
                restored = _distance(model(*args, **kwargs), want)
                layer.route = "mixer"
                gains[path] += (converted - restored) / len(calls)
    return gains


@torch.no_grad()
def _recall_drops(model: nn.Module, calls: Sequence[CallArguments]) -> dict[str, float]:
    """What each mixer alone, in the original model, loses in nats a token of a needle seen before.

    Needles are spans of a batch's own tokens, as far apart as its rows allow.
    """
    from flacompile.evaluate.needle import BEFORE, NEEDLE, answers, needles

    layers = swapped(model)
    drops = dict.fromkeys(layers, 0.0)
    with evaluating(model), routed(model, "original"):
        for i, (args, kwargs) in enumerate(calls):
            ids = _token_ids(args, kwargs, BEFORE + 2 * NEEDLE)
            rows = needles(ids.flatten(), ids.shape[1] - BEFORE - NEEDLE, len(ids), seed=i).seen
            before = answers(model, rows)[..., 1].mean().item()
            for path, layer in layers.items():
                layer.route = "mixer"
                after = answers(model, rows)[..., 1].mean().item()
                layer.route = "original"
                drops[path] += (after - before) / len(calls)
    return drops


def _token_ids(args: tuple[Any, ...], kwargs: dict[str, Any], least: int) -> Tensor:
    """Of a call of a language model, [B, T]."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    good = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    want = f"token ids [B, T] of at least {least} tokens a row for keep='recall'"
    got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
    expect(good and ids.shape[1] >= least, "calibration", want, got)  # type: ignore[union-attr]
    return ids  # type: ignore[return-value]


def _distance(got: Any, want: Any) -> float:
    if hasattr(want, "logits"):
        return _divergence(got.logits, want.logits)
    a, b = (tree_leaves(result)[0].float() for result in (got, want))
    return ((a - b).square().sum() / b.square().sum()).item()


def _divergence(got: Tensor, want: Tensor) -> float:
    """Mean over positions of KL(want || got), logits [B, T, vocabulary]."""
    total, rows = 0.0, want.flatten(0, -2)
    for q, p in zip(got.flatten(0, -2).split(ROWS), rows.split(ROWS), strict=True):
        log_q, log_p = (F.log_softmax(x.float(), -1) for x in (q, p))
        total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return total / len(rows)
