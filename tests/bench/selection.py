"""Which layers to keep: the methods of ``keep`` against sets drawn at random.

    python tests/bench/selection.py [--mixer gla] [--number 2]
    python tests/bench/selection.py --steps 60 [--batch-size 16] [--seed N ...]

Without ``--steps``, the KL of every set of ``--number`` attentions of the project's own teacher
kept, and the place of each method among them; nothing is trained. With them every method, and a
random set for each seed, distilled: nll and KL on held-out text.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

import flacompile
from flacompile.cli import read_model
from flacompile.data import read
from flacompile.distill import Recipe, Stage, score
from flacompile.keep import METHODS
from flacompile.layers import MIXERS

TEACHER = Path(__file__).resolve().parents[1] / "teacher"


def hybrid(mixer: str, keep: Any) -> tuple[Any, tuple[int, ...]]:
    """The teacher converted but for what ``keep`` says, and the indices of what was kept."""
    model, tokenizer = read_model(str(TEACHER))
    calibration = [read(TEACHER / "train.txt", tokenizer).rows(2048, 128)]
    flacompile.convert(model, mixer, keep=keep, calibration=calibration)
    kept = flacompile.report(model).kept
    return model, tuple(int(path.split(".")[2]) for path in kept)


def fresh_kl(mixer: str, kept: tuple[int, ...]) -> float:
    """To the teacher, of the swap alone, on held-out text."""
    teacher, tokenizer = read_model(str(TEACHER))
    rows = read(TEACHER / "heldout.txt", tokenizer).rows(4096, 128)
    return score(hybrid(mixer, kept)[0], teacher, rows).kl or 0.0


@functools.cache
def distilled(
    mixer: str, kept: tuple[int, ...], steps: int, batch_size: int, seed: int
) -> tuple[float, float]:
    """nll and KL after ``steps`` of aligning and as many of logits."""
    torch.manual_seed(seed)
    model, _ = hybrid(mixer, kept)
    _, tokenizer = read_model(str(TEACHER))
    recipe = Recipe(
        align=Stage(steps=steps),
        logits=Stage(steps=steps, mixer_lr=1e-3, rest_lr=3e-4),
        batch_size=batch_size,
        eval_tokens=4096,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as out:
        corpus = read(TEACHER / "train.txt", tokenizer)
        found = flacompile.distill(model, corpus, recipe, out=out)
    return found.student.nll, found.student.kl or 0.0


def swaps(mixer: str, sets: list[tuple[int, ...]], methods: dict[str, tuple[int, ...]]) -> None:
    """Prints where the methods stand among all sets, untrained."""
    fresh = {kept: fresh_kl(mixer, kept) for kept in sets}
    order = sorted(fresh, key=lambda kept: fresh[kept])
    mean = sum(fresh.values()) / len(fresh)
    print(f"swap KL of all {len(sets)} sets: mean {mean:.3f}, best {fresh[order[0]]:.3f}")
    print("| method | kept | swap KL | place |\n|---|---|---|---|")
    for name, kept in methods.items():
        print(f"| {name} | {kept} | {fresh[kept]:.3f} | {order.index(kept) + 1} |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mixer", default="gla", choices=sorted(MIXERS))
    options.add_argument("--number", type=int, default=2, help="of attentions to keep")
    options.add_argument("--steps", type=int, default=0, help="of each stage; 0: no training")
    options.add_argument("--batch-size", type=int, default=16, help="rows of 128 tokens")
    options.add_argument("--seed", type=int, action="append", help="default 0, 1 and 2")
    options = options.parse_args()
    count, number = read_model(str(TEACHER))[0].config.num_hidden_layers, options.number
    methods = {m: hybrid(options.mixer, f"{m}:{number}")[1] for m in METHODS}
    sets = list(itertools.combinations(range(count), number))
    if not options.steps:
        swaps(options.mixer, sets, methods)
        return
    print("| seed | method | kept | nll | KL |\n|---|---|---|---|---|")
    for seed in options.seed or range(3):
        drawn = random.Random(seed).choice(sets)
        for name, kept in {"random": drawn, **methods}.items():
            nll, kl = distilled(options.mixer, kept, options.steps, options.batch_size, seed)
            print(f"| {seed} | {name} | {kept} | {nll:.3f} | {kl:.3f} |", flush=True)


if __name__ == "__main__":
    main()
