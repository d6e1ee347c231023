"""Which attentions of a model stay softmax: those given, a share of all, or those worth most.

Worth is measured: with every attention converted, one at a time answers as the original again, and
what that brings the model nearer to the original is its gain (as KL-guided selection does after
training, Li et al. 2025, arXiv 2512.20569; here before it, in one pass an attention and batch).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flacompile.calibrate import CallArguments
from flacompile.ops.validate import expect
from flacompile.passes.capture import evaluating, without_cache
from flacompile.passes.sites import AttentionSite
from flacompile.passes.swap_attention import restore_attention, routed, swapped

Keep = float | Sequence[int] | str

SHARE = 0.25  # that "auto" keeps
BATCHES = 4  # of the calibration that gains are measured on, at most
ROWS = 1024  # positions whose distributions are held at once in fp32


def read_keep(keep: Keep, count: int) -> tuple[set[int], int]:
    """Indices of attentions to keep, of ``count``, and how many more to choose by their gain."""
    if isinstance(keep, str):
        return set(), _to_choose(keep, count)
    if isinstance(keep, (int, float)):
        share = "indices, 'auto' or a share in [0, 1)"
        expect(0 <= keep < 1, "keep", share, keep)
        number = round(keep * count)
        return {int((i + 0.5) * count / number) for i in range(number)}, 0
    wrong = [i for i in keep if not -count <= i < count]
    expect(not wrong, "keep", f"indices of {count} attentions", wrong)
    return {i % count for i in keep}, 0


def _to_choose(keep: str, count: int) -> int:
    """ "auto" is SHARE of all, "auto:0.5" a share and "auto:3" a number; at least one."""
    size = re.fullmatch(r"auto(?::(\d+|0?\.\d+))?", keep)
    number = 0.0 if size is None else float(size[1] or SHARE)
    expect(number > 0, "keep", "'auto', 'auto:<share below 1>' or 'auto:<number>'", repr(keep))
    number = max(1, round(number * count)) if number < 1 else int(number)
    expect(number < count or not count, "keep", f"fewer than all {count} attentions", repr(keep))
    return number


def keep_best(
    model: nn.Module, sites: Sequence[AttentionSite], calls: Sequence[CallArguments], number: int
) -> dict[str, float]:
    """Restores, in place, those attentions that gain most when they alone are softmax again.

    Args:
        model: every site swapped, the originals kept.
        sites: the attentions in question.
        calls: arguments of the model on which the gains are measured.
        number: of attentions to restore.

    Returns:
        The gain of every site, by path.
    """
    gains = _gains(model, calls)
    best = sorted(gains, key=lambda path: -gains[path])[:number]
    for site in sites:
        if site.path in best:
            restore_attention(model, site.path)
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
