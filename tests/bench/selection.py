"""Which layers to keep: the methods of ``keep`` among all sets of as many layers.

    python tests/bench/selection.py [--mixer gla] [--number 2]
    python tests/bench/selection.py --steps 60 [--batch-size 4] [--seed N ...]

KL to the project's own teacher on held-out text: the mean of every set of ``--number`` attentions
kept, which is what a set drawn at random has on average, and of each method's set its own and its
place. Without ``--steps`` nothing is trained. With them every set is distilled, that of a method
that chooses after as many steps of aligning too: some ten minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch

import flacompile
from flacompile.cli import read_model
from flacompile.data import read
from flacompile.distill import Recipe, Stage, score
from flacompile.distill.choose import align_and_keep
from flacompile.keep import METHODS
from flacompile.layers import MIXERS

TEACHER = Path(__file__).resolve().parents[1] / "teacher"
Kept = tuple[int, ...]


def corpora() -> tuple[Any, Any]:
    """Text to train on and held-out rows."""
    _, tokenizer = read_model(str(TEACHER))
    heldout = read(TEACHER / "heldout.txt", tokenizer).rows(4096, 128)
    return read(TEACHER / "train.txt", tokenizer), heldout


def hybrid(mixer: str, keep: Any) -> Any:
    """The teacher converted but for what ``keep`` says."""
    model, _ = read_model(str(TEACHER))
    return flacompile.convert(model, mixer, keep=keep, calibration=[corpora()[0].rows(2048, 128)])


def kept(model: Any) -> Kept:
    """Indices of the attentions that a conversion left."""
    return tuple(sorted(int(path.split(".")[2]) for path in flacompile.report(model).kept))


def recipe_of(steps: int, batch_size: int, seed: int) -> Recipe:
    return Recipe(
        align=Stage(steps=steps),
        logits=Stage(steps=steps, mixer_lr=1e-3, rest_lr=3e-4),
        batch_size=batch_size,
        eval_tokens=4096,
        seed=seed,
    )


def aligned(mixer: str, number: int, recipe: Recipe) -> Kept:
    """What "auto" keeps of mixers that have been aligned."""
    text, steps = corpora()[0], recipe.align.steps
    with tempfile.TemporaryDirectory() as out:
        model = align_and_keep(
            hybrid(mixer, ()), text, recipe, f"auto:{number}", steps=steps, out=out,
            calibration=[text.rows(2048, 128)],
        )  # fmt: skip
    return kept(model)


def divergence(mixer: str, layers: Kept, recipe: Recipe | None) -> float:
    """To the teacher on held-out text, of the swap alone or after a distillation."""
    (text, rows), seed = corpora(), 0 if recipe is None else recipe.seed
    torch.manual_seed(seed)
    model = hybrid(mixer, layers)
    if recipe is None:
        return score(model, read_model(str(TEACHER))[0], rows).kl or 0.0
    with tempfile.TemporaryDirectory() as out:
        return flacompile.distill(model, text, recipe, out=out).student.kl or 0.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mixer", default="gla", choices=sorted(MIXERS))
    options.add_argument("--number", type=int, default=2, help="of attentions to keep")
    options.add_argument("--steps", type=int, default=0, help="of each stage; 0: no training")
    options.add_argument("--batch-size", type=int, default=4, help="rows of 128 tokens")
    options.add_argument("--seed", type=int, action="append", help="default 0, 1 and 2")
    options = options.parse_args()
    mixer, number = options.mixer, options.number
    count = read_model(str(TEACHER))[0].config.num_hidden_layers
    sets = list(itertools.combinations(range(count), number))
    chosen = {method: kept(hybrid(mixer, f"{method}:{number}")) for method in METHODS}
    recipes: list[Recipe | None] = [None]
    if options.steps:
        seeds = options.seed or range(3)
        recipes = [recipe_of(options.steps, options.batch_size, seed) for seed in seeds]
    print("| seed | mean of all | method | kept | KL | place |\n|---|---|---|---|---|---|")
    for recipe in recipes:
        kl = {layers: divergence(mixer, layers, recipe) for layers in sets}
        order, mean = sorted(kl, key=lambda layers: kl[layers]), sum(kl.values()) / len(kl)
        if recipe is not None:
            chosen["auto, aligned"] = aligned(mixer, number, recipe)
        label = "not trained" if recipe is None else recipe.seed
        for name, layers in chosen.items():
            place = f"{order.index(layers) + 1} of {len(sets)}"
            print(
                f"| {label} | {mean:.3f} | {name} | {layers} | {kl[layers]:.3f} | {place} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
