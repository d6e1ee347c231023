"""Which parts of a conversion matter: the same budget with one of them left out or done wrong.

    python tests/bench/controls.py [--mixer gla] [--steps 100] [--batch-size 16] [--seeds 1]
        [--control NAME ...]

The project's own teacher is converted and distilled by ``--steps`` of aligning and as many of
logits. One row a control: layer error and held-out nll before training, nll, KL and share closed
after it.

calibrated: as ``flacompile.convert`` and ``distill`` do it. neutral: gates and scales not fitted to
the teacher. fresh qkvo: q, k, v, o drawn anew instead of copied. cross-entropy: no teacher, all
steps learn the next token. no align: all steps learn the teacher's logits. row-repeated: the rows
of k and v repeated instead of their heads, as published conversions of grouped attention do.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flacompile
from flacompile.cli import read_model
from flacompile.data import read
from flacompile.distill import Recipe, Stage
from flacompile.distill.objectives import attention_io, relative_error
from flacompile.layers import MIXERS
from flacompile.passes.sites import AttentionWeights
from flacompile.passes.swap_attention import swapped

TEACHER = Path(__file__).resolve().parents[1] / "teacher"


@torch.no_grad()
def fresh_qkvo(model: nn.Module) -> None:
    """q, k, v, o as a new model has them: normal, of the teacher's ``initializer_range``."""
    for layer in swapped(model).values():
        for name in "qkvo":
            nn.init.normal_(layer.mixer.projection(name).weight, std=model.config.initializer_range)


@torch.no_grad()
def row_repeated(model: nn.Module) -> None:
    """A head of k and v for each of q, of the rows that repeating rows puts at its place."""
    for layer in swapped(model).values():
        config = replace(layer.mixer.config, num_kv_heads=None)
        group = config.num_heads // layer.mixer.kv_heads
        q, k, v, o = (layer.original.get_submodule(f"{name}_proj").weight for name in "qkvo")
        k, v = (weight.repeat_interleave(group, 0) for weight in (k, v))
        layer.mixer = type(layer.mixer)(config).eval()
        layer.mixer.load_attention(AttentionWeights(q, k, v, o, *[None] * 6))


def logits_only(recipe: Recipe) -> Recipe:
    """All steps in the second stage."""
    steps = recipe.align.steps + recipe.logits.steps
    return replace(
        recipe, align=replace(recipe.align, steps=0), logits=replace(recipe.logits, steps=steps)
    )


def cross_entropy(recipe: Recipe) -> Recipe:
    """All steps learn the data."""
    recipe = logits_only(recipe)
    return replace(recipe, logits=replace(recipe.logits, target="data"))


Change = Callable[[nn.Module], None]
CONTROLS: dict[str, tuple[str, Change | None, Callable[[Recipe], Recipe] | None]] = {
    "calibrated": ("calibrated", None, None),
    "neutral": ("neutral", None, None),
    "fresh qkvo": ("neutral", fresh_qkvo, None),
    "row-repeated": ("neutral", row_repeated, None),
    "no align": ("calibrated", None, logits_only),
    "cross-entropy": ("calibrated", None, cross_entropy),
}


def measure(control: str, mixer: str, steps: int, batch_size: int, seed: int) -> dict[str, float]:
    """One distillation; its figures."""
    init, change, recipe_of = CONTROLS[control]
    torch.manual_seed(seed)
    model, tokenizer = read_model(str(TEACHER))
    corpus = read(TEACHER / "train.txt", tokenizer)
    calibration: Any = [corpus.rows(2048, 128)]
    flacompile.convert(model, mixer, init=init, calibration=calibration)
    if change is not None:
        change(model)
    with torch.no_grad():
        io = attention_io(model.base_model, calibration[0])
        layers = swapped(model.base_model)
        errors = [relative_error(layers[p].mixer(x)[0], y).item() for p, (x, y) in io.items()]
    recipe = Recipe(
        align=Stage(steps=steps),
        logits=Stage(steps=steps, mixer_lr=1e-3, rest_lr=3e-4),
        batch_size=batch_size,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as out:
        found = flacompile.distill(
            model, corpus, recipe_of(recipe) if recipe_of else recipe, out=out
        )
    return {
        "error": sum(errors) / len(errors),
        "fresh": found.fresh.nll,
        "nll": found.student.nll,
        "kl": found.student.kl or 0.0,
        "share": found.share_closed,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mixer", default="gla", choices=sorted(MIXERS))
    options.add_argument("--steps", type=int, default=100, help="of each stage")
    options.add_argument("--batch-size", type=int, default=16, help="rows of 128 tokens")
    options.add_argument("--seeds", type=int, default=1, help="runs of each; the mean is shown")
    options.add_argument("--control", action="append", choices=CONTROLS, help="default all")
    options = options.parse_args()
    print("| control | layer error | swap nll | student nll | KL | share closed |")
    print("|---|---|---|---|---|---|", flush=True)
    for control in options.control or CONTROLS:
        runs = [
            measure(control, options.mixer, options.steps, options.batch_size, seed)
            for seed in range(options.seeds)
        ]
        mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        print(
            f"| {control} | {mean['error']:.2f} | {mean['fresh']:.2f} | {mean['nll']:.3f} "
            f"| {mean['kl']:.3f} | {mean['share']:.3f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
