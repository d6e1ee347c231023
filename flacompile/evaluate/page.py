"""An evaluation to look at: tables as Markdown, curves as PNG."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flacompile.distill.metrics import Score
from flacompile.files import write_atomically

if TYPE_CHECKING:
    from flacompile.evaluate import Evaluation, Measures, Suite

PICTURE = "![nll by position, recall by distance, error by layer](eval.png)"
SCORES = [
    "| model | nll | perplexity | KL to teacher | top-1 agreement |",
    "|---|---|---|---|---|",
]


def write(out: Path, evaluation: Evaluation, suite: Suite) -> None:
    """Writes eval.json, and the page eval.md with its picture eval.png, into ``out``."""
    write_json(out / "eval.json", evaluation, suite)
    plot(evaluation, suite, out / "eval.png")
    text = markdown(evaluation).replace("\n\n", f"\n\n{PICTURE}\n\n", 1) + "\n"
    write_atomically(out / "eval.md", lambda path: path.write_text(text, encoding="utf-8"))


def markdown(evaluation: Evaluation) -> str:
    """All figures and samples, without the picture."""
    scores = {"teacher": evaluation.teacher.score} if evaluation.teacher else {}
    scores["model"] = evaluation.model.score
    if evaluation.zero is not None:
        scores["attention silenced (floor)"] = evaluation.zero
    head = ["# Evaluation", score_table(scores, evaluation.share_closed)]
    return "\n\n".join([*head, *sections(evaluation)])


def sections(evaluation: Evaluation) -> list[str]:
    """What there is beside the scores, a table or list each."""
    readings = {"teacher": evaluation.teacher} if evaluation.teacher else {}
    readings["model"] = evaluation.model
    parts = [_recall(readings), _speed(readings), _tasks(readings)]
    return [part for part in (*parts, _samples(evaluation.prompts, readings)) if part]


def write_json(file: Path, evaluation: Evaluation, suite: Suite) -> None:
    """All figures."""
    figures = {"share_closed": evaluation.share_closed, "suite": asdict(suite)} | asdict(evaluation)
    text = json.dumps(figures, indent=1)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def score_table(scores: dict[str, Score], share_closed: float | None) -> str:
    """One row a model, and the share closed under it."""
    rows = list(SCORES)
    for name, found in scores.items():
        cells = [f"{found.nll:.4f}", f"{math.exp(min(found.nll, 30)):,.2f}"]
        if found.kl is not None:
            cells += [f"{found.kl:.4f}", f"{found.top1:.1%}"]
        rows.append(_row(name, *cells, *[""] * (4 - len(cells))))
    closed = [] if share_closed is None else ["", f"Share closed: **{share_closed:.3f}**"]
    return "\n".join(rows + closed)


def plot(evaluation: Evaluation, suite: Suite, picture: Path) -> None:
    """Draws what there is of nll by position, recall by distance and error by layer."""
    from matplotlib.figure import Figure

    draw = {"position": _draw_positions}
    if evaluation.model.recall:
        draw["recall"] = _draw_recall
    if evaluation.layer_errors:
        draw["layers"] = _draw_layers
    figure = Figure(figsize=(4.5 * len(draw), 3.2), layout="constrained")
    columns = figure.subplots(1, len(draw), squeeze=False)[0]
    for axes, one in zip(columns, draw.values(), strict=True):
        one(axes, evaluation, suite)
        axes.grid(alpha=0.3)
    write_atomically(picture, lambda path: figure.savefig(path, dpi=120, format="png"))


def _draw_positions(axes: Any, evaluation: Evaluation, suite: Suite) -> None:
    for name, reading in (("model", evaluation.model), ("teacher", evaluation.teacher)):
        if reading is not None:
            curve = reading.by_position
            axes.plot(list(curve), list(curve.values()), label=name, linewidth=1.2)
    axes.axvline(suite.length, color="gray", linestyle=":", linewidth=1, label="length of a row")
    axes.set(title="nll by position", xlabel="position (tokens)", ylabel="nats")
    axes.legend(fontsize=8)


def _draw_recall(axes: Any, evaluation: Evaluation, suite: Suite) -> None:
    for name, reading in (("model", evaluation.model), ("teacher", evaluation.teacher)):
        if reading is not None:
            found = reading.recall
            axes.plot(list(found), [r.accuracy for r in found.values()], marker="o", label=name)
    unseen = [r.unseen_accuracy for r in evaluation.model.recall.values()]
    axes.plot(list(evaluation.model.recall), unseen, ":", color="gray", label="model, not seen")
    axes.set(title="recall of a needle", xlabel="distance (tokens)", ylabel="accuracy")
    axes.set(xscale="log", ylim=(-0.03, 1.03))
    axes.legend(fontsize=8)


def _draw_layers(axes: Any, evaluation: Evaluation, suite: Suite) -> None:
    errors = list(evaluation.layer_errors.values())
    axes.bar(range(len(errors)), errors)
    axes.set(title="error by converted layer", xlabel="layer", ylabel="relative squared error")


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _recall(readings: dict[str, Measures]) -> str:
    """Accuracy and nll by distance; in brackets where the needle was not seen."""
    distances = list(readings["model"].recall)
    if not distances:
        return ""
    rows = [_row("distance", *distances), _row(*["---"] * (len(distances) + 1))]
    for name, reading in readings.items():
        found = reading.recall.values()
        rows.append(
            _row(
                f"{name}: accuracy",
                *(f"{r.accuracy:.1%} ({r.unseen_accuracy:.1%})" for r in found),
            )
        )
        rows.append(_row(f"{name}: nll", *(f"{r.nll:.2f} ({r.unseen_nll:.2f})" for r in found)))
    return "\n".join(["## Recall of a needle, not seen in brackets", "", *rows])


def _speed(readings: dict[str, Measures]) -> str:
    lines = [
        _row(name, context, f"{s.prefill:,.0f}", f"{s.decode:,.1f}", f"{s.state_bytes:,}")
        for name, reading in readings.items()
        for context, s in reading.speed.items()
    ]
    if not lines:
        return ""
    head = ["## Speed and state, one row", ""]
    head.append(_row("model", "context", "prefill tokens/s", "decode tokens/s", "state bytes"))
    return "\n".join([*head, _row(*["---"] * 5), *lines])


def _tasks(readings: dict[str, Measures]) -> str:
    lines = [
        _row(name, task, metric.removesuffix(",none"), f"{value:.4f}")
        for name, reading in readings.items()
        for task, found in reading.tasks.items()
        for metric, value in found.items()
    ]
    if not lines:
        return ""
    head = ["## lm-eval", "", _row("model", "task", "metric", "value"), _row(*["---"] * 4)]
    return "\n".join([*head, *lines])


def _samples(prompts: list[str], readings: dict[str, Measures]) -> str:
    if not prompts:
        return ""
    parts = ["## Samples, greedy"]
    for i, prompt in enumerate(prompts):
        parts.append(_quoted("prompt", prompt))
        parts += [_quoted(name, reading.samples[i]) for name, reading in readings.items()]
    return "\n\n".join(parts)


def _quoted(name: str, text: str) -> str:
    """A block of code, fenced by more backticks than stand in it."""
    return f"{name}:\n\n````text\n{text.replace('````', '` ` ` `')}\n````"
