"""A needle in the teacher's own text: a span put in early, and how well it is known later on.

Induction over a distance (Olsson et al. 2022, arXiv 2209.11895), on text that needs no template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.distill.objectives import hidden
from flacompile.passes.capture import evaluating

BEFORE = 4  # tokens of text before the needle
NEEDLE = 12  # tokens of the needle
CUE = 4  # of them are given again; the others are asked for


class Needles(NamedTuple):
    """Rows [n, T] that end in a needle: seen once before, and the same rows where it was not."""

    seen: Tensor
    unseen: Tensor


@dataclass(frozen=True)
class Recall:
    """How the tokens of a needle are predicted when it comes again.

    Attributes:
        accuracy: share of tokens that are the most probable one.
        nll: nats a token.
        unseen_accuracy: the same where the needle did not stand there before: what the language
            alone gives away.
        unseen_nll: likewise.
    """

    accuracy: float
    nll: float
    unseen_accuracy: float
    unseen_nll: float


def row_length(distance: int) -> int:
    """Tokens of a row whose needle comes again after so many."""
    return BEFORE + distance + NEEDLE


def needles(tokens: Tensor, distance: int, count: int, seed: int = 0) -> Needles:
    """Rows of text with a span from elsewhere in it, at BEFORE and again ``distance`` later.

    Args:
        tokens: text to take both from, [n].
        distance: from a needle's token to the same token again, at least NEEDLE.
        count: rows.
        seed: of the places.

    Raises:
        ValueError: the distance is shorter than a needle, or the text than a row.
    """
    length = row_length(distance)
    if not NEEDLE <= distance <= distance + len(tokens) - length:
        raise ValueError(
            f"distance: expected {NEEDLE} to {NEEDLE + len(tokens) - row_length(NEEDLE)} in a text "
            f"of {len(tokens)} tokens, got {distance}"
        )
    generator = torch.Generator().manual_seed(seed * 1_000_003 + distance)

    def spans(size: int) -> Tensor:
        """[count, size] tokens in a row of the text, from places drawn at random."""
        starts = torch.randint(len(tokens) - size + 1, (count, 1), generator=generator)
        return tokens[(starts + torch.arange(size)).to(tokens.device)]

    text, needle = spans(length), spans(NEEDLE)
    text[:, -NEEDLE:] = needle
    seen = text.clone()
    seen[:, BEFORE : BEFORE + NEEDLE] = needle
    return Needles(seen, text)


@torch.no_grad()
def recall(model: nn.Module, rows: Needles, *, batch: int = 8) -> Recall:
    """Asks a language model for the needles it has seen, and for those it has not."""
    found = []
    with evaluating(model):
        for ids in rows:
            parts = [answers(model, part) for part in ids.split(batch)]
            found += torch.cat(parts).double().mean((0, 1)).tolist()
    return Recall(*found)


def answers(model: nn.Module, ids: Tensor) -> Tensor:
    """Whether each token of the needle at the end is the likeliest, and its nll, [n, tokens, 2]."""
    h, asked = hidden(model, ids), NEEDLE - CUE
    logits = F.linear(h.states[:, -asked - 1 : -1], h.weight, h.bias).float()
    want = ids[:, -asked:]
    nll = F.cross_entropy(logits.transpose(1, 2), want, reduction="none")
    return torch.stack((logits.argmax(-1) == want, nll), -1)
