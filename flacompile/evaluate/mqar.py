"""Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927).

k_1 v_1 k_2 v_2 ... k_n v_n, then each key again, in any order and at any distance, each before its
value. A model that can look back answers every query; one with a state of fixed size as many as
the state holds. Keys are the first half of the vocabulary, values the second, BLANK is neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flacompile.ops.validate import expect
from flacompile.passes.capture import evaluating, without_cache

BLANK = 0


def mqar(
    rows: int, pairs: int, length: int, vocab: int, *, dense: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows of the task and which of their tokens are answers.

    Args:
        rows: number of examples, B.
        pairs: of key and value in each, all keys different.
        length: tokens, T, at least 4 ``pairs``; what no pair or query fills is BLANK.
        vocab: of token ids, BLANK among them.
        dense: ask again for keys drawn at random wherever there is room, for a quicker training.
        seed: of everything drawn.

    Returns:
        ids [B, T], and a mask [B, T], True where the token is the value asked for.
    """
    keys = (vocab - 1) // 2
    expect(1 <= pairs <= keys, "pairs", f"1 to {keys} for {vocab} tokens", pairs)
    expect(length >= 4 * pairs, "length", f"at least {4 * pairs} for {pairs} pairs", length)
    generator = torch.Generator().manual_seed(seed)

    def shuffled(count: int) -> Tensor:
        """[rows, count], an order of 0 to count - 1 in each row."""
        return torch.rand(rows, count, generator=generator).argsort(1)

    key = 1 + shuffled(keys)[:, :pairs]
    value = torch.randint(1 + keys, 1 + 2 * keys, (rows, pairs), generator=generator)
    pair = torch.stack((key, value), -1)
    slots = length // 2 - pairs  # pairs of places after the context
    slot = 2 * shuffled(slots)[:, : slots if dense else pairs]
    again = torch.randint(pairs, (rows, slot.shape[1] - pairs), generator=generator)
    asked = torch.cat((pair, pair.gather(1, again[..., None].expand(-1, -1, 2))), 1)
    ids = torch.full((rows, length), BLANK)
    ids[:, : 2 * pairs] = pair.flatten(1)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for i in range(2):
        ids.scatter_(1, 2 * pairs + slot + i, asked[..., i])
    return ids, mask.scatter_(1, 2 * pairs + slot + 1, True)


def accuracy(model: nn.Module, ids: Tensor, answers: Tensor, batch: int = 64) -> float:
    """Share of the answers that a language model gives when it has read the key.

    Args:
        model: returns ``logits`` [B, T, vocabulary].
        ids: [B, T].
        answers: [B, T], as ``mqar`` returns them.
        batch: rows at once.
    """
    right = 0
    with evaluating(model):
        for rows, mask in zip(ids.split(batch), answers.split(batch), strict=True):
            output: Any = model(rows, **without_cache(model, {}))
            found = output.logits[:, :-1].argmax(-1) == rows[:, 1:]
            right += int((found & mask[:, 1:]).sum())
    return right / int(answers.sum())
