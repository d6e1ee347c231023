"""What recall a conversion keeps: a two-layer softmax teacher of MQAR, converted and distilled.

    python tests/bench/mqar.py [--mixer NAME ...] [--keep 1] [--window 16] [--steps 200]
        [--teacher FILE]

The teacher is trained first, or read from ``--teacher``, until it answers nearly every query of up
to PAIRS[-1] pairs. Then one row a mixer: accuracy by number of pairs after the conversion alone,
and after ``--steps`` of aligning and as many of logits on rows that the teacher answers.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import flacompile
from flacompile.cli import read_keep
from flacompile.distill import Recipe, Stage
from flacompile.evaluate.mqar import accuracy, mqar
from flacompile.layers import MIXERS

VOCAB, LENGTH, PAIRS = 32, 32, (2, 4, 8)


def softmax_teacher(width: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """Two layers suffice for a softmax: one joins key and value, one looks the key up."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2 * LENGTH,
        initializer_range=width**-0.5,  # of 0.02 the attention stays uniform for long
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def train(
    model: nn.Module, steps: int, pairs: tuple[int, ...] = PAIRS, enough: float = 0.99
) -> int:
    """Cross-entropy on answers alone, on fresh rows; ends when ``enough`` of them are right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50)
        turn, which = divmod(step, len(pairs))  # answers close by teach what is then asked far off
        ids, mask = mqar(64, pairs[which], LENGTH, VOCAB, dense=turn % 2 == 0, seed=step + 1)
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 and min(by_pairs(model, 64, pairs)) >= enough:
            return step + 1
    return steps


def by_pairs(model: nn.Module, rows: int = 256, pairs: tuple[int, ...] = PAIRS) -> list[float]:
    """Accuracy on rows never trained on, for each number of pairs."""
    return [accuracy(model, *mqar(rows, n, LENGTH, VOCAB, seed=10**9 + n)) for n in pairs]


def stream(rows: int, seed: int = 10**6) -> torch.Tensor:
    """Rows of all numbers of pairs end to end, [rows T]."""
    parts = [mqar(rows // len(PAIRS), n, LENGTH, VOCAB, seed=seed + n)[0] for n in PAIRS]
    order = torch.randperm(
        rows // len(PAIRS) * len(PAIRS), generator=torch.Generator().manual_seed(0)
    )
    return torch.cat(parts)[order].flatten()


def distilled(
    teacher: nn.Module, mixer: str, keep: str, window: int | None, steps: int
) -> tuple[list[float], list[float]]:
    """Accuracy by pairs after the conversion, and after distilling."""
    calibration = [mqar(32, 8, LENGTH, VOCAB, seed=5)[0]]
    model = flacompile.convert(
        copy.deepcopy(teacher), mixer, keep=read_keep(keep), window=window, calibration=calibration
    )
    fresh = by_pairs(model)
    recipe = Recipe(
        align=Stage(steps=steps),
        logits=Stage(steps=steps, mixer_lr=3e-3, rest_lr=1e-3),
        sequence_length=2 * LENGTH,  # a whole row at least, wherever it is cut
        batch_size=32,
    )
    with tempfile.TemporaryDirectory() as out:
        flacompile.distill(model, stream(8000), recipe, out=out)
    return fresh, by_pairs(model)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mixer", action="append", choices=sorted(MIXERS), help="default all")
    options.add_argument("--keep", default="", help="as of flacompile convert")
    options.add_argument("--window", type=int, help="tokens of a softmax beside every mixer")
    options.add_argument("--steps", type=int, default=200, help="of each stage")
    options.add_argument("--teacher", type=Path, help="file to read the teacher from, or write to")
    options = options.parse_args()
    teacher = softmax_teacher()
    if options.teacher and options.teacher.exists():
        teacher.load_state_dict(torch.load(options.teacher, weights_only=True))
    else:
        print(f"teacher: {train(teacher, 4000)} steps", flush=True)
        if options.teacher:
            torch.save(teacher.state_dict(), options.teacher)
    print("| mixer | " + " | ".join(f"{n} pairs" for n in PAIRS) + " |")
    print("|---" * (len(PAIRS) + 1) + "|")
    print(row("softmax teacher", by_pairs(teacher)), flush=True)
    for mixer in options.mixer or sorted(MIXERS):
        fresh, after = distilled(teacher, mixer, options.keep, options.window, options.steps)
        print(row(f"`{mixer}`", after, fresh), flush=True)


def row(name: str, found: list[float], before: list[float] | None = None) -> str:
    """Accuracies; in brackets those before training."""
    cells = [f"{a:.2f}" for a in found]
    if before is not None:
        cells = [f"{a:.2f} ({b:.2f})" for a, b in zip(found, before, strict=True)]
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
