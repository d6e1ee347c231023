"""Multi-query associative recall: the rows, the score, and a model that learns and is converted."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from bench.mqar import softmax_teacher, train
from torch import nn

import flacompile
from flacompile.evaluate.mqar import BLANK, accuracy, mqar


@pytest.mark.parametrize(
    ("pairs", "length", "vocab"), [(1, 4, 3), (3, 16, 21), (4, 16, 64), (5, 41, 12)]
)
@pytest.mark.parametrize("dense", [False, True])
def test_every_key_is_asked_for_and_answered(pairs, length, vocab, dense):
    ids, answers = mqar(20, pairs, length, vocab, dense=dense, seed=3)
    keys, half = (vocab - 1) // 2, length // 2 - pairs
    for row, asked in zip(ids.tolist(), answers.tolist(), strict=True):
        value = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(value) == pairs and set(value) <= set(range(1, 1 + keys))
        assert set(value.values()) <= set(range(1 + keys, 1 + 2 * keys))
        places = [i for i, flag in enumerate(asked) if flag]
        assert len(places) == (half if dense else pairs) and min(places) > 2 * pairs
        assert {row[i - 1] for i in places} == set(value)
        assert all(row[i] == value[row[i - 1]] for i in places)
        rest = [t for i, t in enumerate(row) if i >= 2 * pairs and not {i, i + 1} & set(places)]
        assert set(rest) <= {BLANK}
    assert ids.equal(mqar(20, pairs, length, vocab, dense=dense, seed=3)[0])
    assert pairs == 1 or not ids.equal(mqar(20, pairs, length, vocab, dense=dense, seed=4)[0])


class Lookup(nn.Module):
    """Predicts what followed the token the first time; of ``forgets`` pairs it knows nothing."""

    def __init__(self, forgets: int = 0) -> None:
        super().__init__()
        self.forgets = forgets

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*ids.shape, 21)
        for row, tokens in enumerate(ids.tolist()):
            for i, token in enumerate(tokens):
                first = tokens.index(token)
                if first >= 2 * self.forgets:
                    logits[row, i, tokens[first + 1]] = 1.0
        return SimpleNamespace(logits=logits)


def test_accuracy_counts_answers_alone():
    ids, answers = mqar(12, 4, 30, 21)
    assert accuracy(Lookup(), ids, answers, batch=5) == 1
    assert accuracy(Lookup(forgets=1), ids, answers, batch=5) == 0.75
    assert accuracy(Lookup(forgets=4), ids, answers) == 0


WRONG = {
    "pairs": ((2, 11, 64, 21), "pairs: expected 1 to 10 for 21 tokens, got 11"),
    "no pair": ((2, 0, 64, 21), "pairs: expected 1 to 10"),
    "length": ((2, 4, 15, 21), "length: expected at least 16 for 4 pairs, got 15"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        mqar(*arguments)


def test_a_teacher_learns_and_its_conversion_answers():
    """One pair, a minute's task in seconds; the bench takes more."""
    teacher = softmax_teacher(width=32)
    before = accuracy(teacher, *mqar(64, 1, 32, 32))
    train(teacher, 200, pairs=(1,), enough=0.95)
    after = accuracy(teacher, *mqar(64, 1, 32, 32))
    assert before < 0.2 and after > 0.9
    exact = flacompile.convert(copy.deepcopy(teacher), "attn")
    assert accuracy(exact, *mqar(64, 1, 32, 32)) == after
