"""The shipped teacher is the one that its README describes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

TEACHER = Path(__file__).parent / "teacher"


@pytest.fixture(scope="module")
def teacher():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True).eval()


def test_size(teacher):
    assert 700_000 <= teacher.num_parameters() <= 1_500_000
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in TEACHER.glob("*.*")) < 4 * 2**20


def test_heldout_nll_is_the_reported_one(teacher):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)
    text = (TEACHER / "heldout.txt").read_text("utf-8")
    rows = tokenizer(text, return_tensors="pt").input_ids[0, :8192].view(-1, 256)
    with torch.no_grad():
        nll = teacher(input_ids=rows, labels=rows).loss.item()

    reported = re.search(r"first 8,192 tokens.*?\| ([\d.]+) ", (TEACHER / "README.md").read_text())
    assert nll == pytest.approx(float(reported[1]), rel=0.02)
