"""How much of the teacher a student keeps, on held-out tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flacompile.distill.objectives import ROWS, Hidden, hidden
from flacompile.passes.capture import evaluating
from flacompile.passes.swap_attention import Route, routed


@dataclass(frozen=True)
class Score:
    """Means over positions: nll and KL(teacher || model) in nats, top-1 agreement as a share.

    The last two are None where no teacher was given.
    """

    nll: float
    kl: float | None = None
    top1: float | None = None


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
        return share_closed(self.zero, self.teacher, self.student)


def share_closed(zero: Score, teacher: Score, student: Score) -> float:
    """(nll_zero - nll_student) / (nll_zero - nll_teacher)."""
    return (zero.nll - student.nll) / (zero.nll - teacher.nll)


def score(
    model: nn.Module,
    teacher: nn.Module | None,
    rows: Tensor,
    *,
    route: Route | None = None,
    batch: int = 8,
) -> Score:
    """Scores a model, by one route of its swapped attentions, against a teacher.

    Args:
        model: a converted language model; also the teacher itself.
        teacher: the frozen original, or None where there is nothing to compare with.
        rows: held-out token ids, [n, T].
        route: "mixer", "original" or "zero"; None is as the model stands.
        batch: rows at once.
    """
    return Score(*by_position(model, teacher, rows, route=route, batch=batch).mean(1).tolist())


@torch.no_grad()
def by_position(
    model: nn.Module,
    teacher: nn.Module | None,
    rows: Tensor,
    *,
    route: Route | None = None,
    batch: int = 8,
) -> Tensor:
    """The same, as means over the rows at each position that has a next token.

    Returns:
        [3, T - 1]: nll, KL and agreement; without a teacher [1, T - 1]. On the CPU, fp64.
    """
    total = torch.zeros((), dtype=torch.float64)
    with evaluating(model):
        for ids in rows.split(batch):
            with routed(model, route) if route else nullcontext():
                h = hidden(model, ids)
            total = total + _sums(h, None if teacher is None else hidden(teacher, ids), ids)
    return total / len(rows)


def _sums(h: Hidden, t: Hidden | None, ids: Tensor) -> Tensor:
    """Sums over the rows of nll, KL and agreement, [3 or 1, T - 1]."""
    count, time = ids[:, 1:].shape
    found = []
    for rows in torch.arange(count * time, device=ids.device).split(ROWS):
        log_q = _log_softmax(h, rows)
        nll = -log_q.gather(-1, ids[:, 1:].flatten()[rows, None])[:, 0]
        if t is None:
            found.append(nll[None])
            continue
        log_p = _log_softmax(t, rows)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        found.append(torch.stack((nll, kl, log_p.argmax(-1) == log_q.argmax(-1))))
    return torch.cat(found, 1).double().view(-1, count, time).sum(1).cpu()


def _log_softmax(h: Hidden, rows: Tensor) -> Tensor:
    """Of these rows of all positions that have a next token, [rows, vocabulary], fp32."""
    states = h.states[:, :-1].flatten(0, 1)[rows]
    return F.log_softmax(F.linear(states, h.weight, h.bias).float(), -1)
