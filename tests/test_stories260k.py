"""A published model of 260 thousand parameters keeps nine tenths of itself in minutes of a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flacompile
from flacompile.data import read
from flacompile.distill import Recipe, Stage

DATA = Path(__file__).parents[1].parent / "shared" / "data"
FILES = (
    "stories260K.bin",
    "tok512.bin",
    "tinystories_train_head_944k.txt",
    "tinystories_val_794k.txt",
)
MISSING = [name for name in FILES if not (DATA / name).is_file()]
ROWS, TIME = 96, 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"../shared/data lacks {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def tokenizer():
    from llama2c import Tokenizer

    return Tokenizer(DATA / "tok512.bin", 512)


@pytest.fixture
def teacher():
    from llama2c import load_model

    return load_model(DATA / "stories260K.bin")


def nll(model: torch.nn.Module, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return model(rows, labels=rows).loss.item()


@pytest.fixture(scope="module")
def validation(tokenizer):
    tokens = read(DATA / "tinystories_val_794k.txt", tokenizer).tokens.long()
    return tokens[: ROWS * TIME].view(ROWS, TIME)


def test_teacher_is_read_correctly(teacher, validation):
    assert nll(teacher, validation) == pytest.approx(1.468, abs=0.05)


@pytest.mark.parametrize("mixer", ["gla"])
def test_student_closes_nine_tenths_of_the_gap(teacher, tokenizer, validation, mixer, tmp_path):
    from flacompile.passes.swap_attention import routed

    tokens = read(DATA / "tinystories_train_head_944k.txt", tokenizer).tokens.long()
    upper = nll(teacher, validation)
    model = flacompile.convert(
        teacher, mixer, calibration=list(tokens[: 32 * TIME].view(4, 8, TIME))
    )
    with routed(model, "zero"):
        floor = nll(model, validation)
    recipe = Recipe(align=Stage(steps=100), logits=Stage(steps=120, mixer_lr=1e-3, rest_lr=3e-4))
    metrics = flacompile.distill(model, tokens, recipe, out=tmp_path)
    share = (floor - nll(model, validation)) / (floor - upper)
    print(f"\n{mixer}: share closed {share:.3f}; on held-out training text {metrics}")
    assert share >= 0.90
