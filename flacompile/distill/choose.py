"""Layers kept by what their mixers cannot learn, not by what a conversion got wrong at first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flacompile.convert import keep_layers
from flacompile.data import Source
from flacompile.distill import distill
from flacompile.distill.recipe import Recipe, Stage
from flacompile.keep import Keep

OFF = Stage(steps=0)


def align_and_keep(
    model: nn.Module,
    data: Source,
    recipe: Recipe,
    keep: Keep,
    *,
    steps: int,
    calibration: Iterable[Tensor] | None,
    tokenizer: Any = None,
    out: str | Path = "out/aligned",
) -> nn.Module:
    """Aligns every mixer for some steps, then puts back the attentions that gain most, in place.

    The mixers that are left have learned what they have; ``distill`` goes on from there. A run that
    was stopped goes on when called again, and makes the same choice.

    Args:
        model: converted whole, the originals beside the mixers.
        data: as of ``distill``.
        recipe: whose align stage it is, but for its length.
        keep: as of ``flacompile.keep_layers``.
        steps: of aligning.
        calibration: batches of token ids [B, T] that gains are measured on; None: random ones.
        tokenizer: a transformers tokenizer, where the data is text.
        out: folder for the run and its checkpoint, not that of the distillation.

    Returns:
        The same model.
    """
    align = replace(recipe.align, steps=steps, minutes=None)
    first = replace(recipe, align=align, logits=OFF, long=OFF)
    distill(model, data, first, tokenizer=tokenizer, out=out)
    return keep_layers(model, keep, calibration=calibration)
