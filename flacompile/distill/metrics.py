"""How much of the teacher a student keeps, on held-out tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.distill.objectives import ROWS, Hidden, hidden
from flacompile.passes.swap_attention import Route, routed


@dataclass(frozen=True)
class Score:
    """Means over positions: nll and KL(teacher || student) in nats, top-1 agreement as a share."""

    nll: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Metrics:
    """A student between its two bounds.

    Attributes:
        teacher: the original model.
        zero: the same model with every swapped attention's output zero: the floor.
        fresh: right after convert, before any training.
        student: after training.
    """

    teacher: Score
    zero: Score
    fresh: Score
    student: Score

    @property
    def share_closed(self) -> float:
        """(nll_zero - nll_student) / (nll_zero - nll_teacher): 1 is the teacher, 0 is nothing.

        In nats and from the zero floor: the usual ratio of perplexities from the fresh swap is
        flattered by a swap that explodes.
        """
        return (self.zero.nll - self.student.nll) / (self.zero.nll - self.teacher.nll)


@torch.no_grad()
def score(
    model: nn.Module, teacher: nn.Module, rows: Tensor, *, route: Route = "mixer", batch: int = 8
) -> Score:
    """Scores a model, by one route of its swapped attentions, against a teacher.

    Args:
        model: a converted language model; also the teacher itself.
        teacher: the frozen original.
        rows: held-out token ids, [n, T].
        route: "mixer", "original" or "zero".
        batch: rows at once.
    """
    total = torch.zeros(3, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for ids in rows.split(batch):
        with routed(model, route):
            h = hidden(model, ids)
        total += _sums(h, hidden(teacher, ids), ids)
    model.train(was_training)
    nll, kl, top1 = (total / (rows.shape[0] * (rows.shape[1] - 1))).tolist()
    return Score(nll, kl, top1)


def _sums(h: Hidden, t: Hidden, ids: Tensor) -> Tensor:
    """Sums of nll, KL and agreement over the positions that have a next token."""
    total = torch.zeros(3, dtype=torch.float64)
    states, targets = h.states[:, :-1].flatten(0, 1), t.states[:, :-1].flatten(0, 1)
    for a, b, y in zip(
        states.split(ROWS), targets.split(ROWS), ids[:, 1:].flatten().split(ROWS), strict=True
    ):
        log_q = F.log_softmax(F.linear(a, h.weight, h.bias).float(), -1)
        log_p = F.log_softmax(F.linear(b, t.weight, t.bias).float(), -1)
        nll = -log_q.gather(-1, y[:, None]).sum()
        kl = (log_p.exp() * (log_p - log_q)).sum()
        total += torch.stack([nll, kl, (log_p.argmax(-1) == log_q.argmax(-1)).sum()]).double()
    return total
