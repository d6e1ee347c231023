"""What a distillation leaves to look at: curves as PNG, figures as Markdown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flacompile.distill.log import read_json_lines
from flacompile.distill.metrics import Metrics
from flacompile.distill.recipe import Recipe
from flacompile.evaluate import Evaluation, Suite, page
from flacompile.files import write_atomically

NAMES = {
    "teacher": "teacher (softmax)",
    "zero": "mixers output zero (floor)",
    "fresh": "converted, not trained",
    "student": "distilled student",
}


def check_drawing() -> None:
    """Says before a run what its report, at the end, needs.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "distill: expected the package matplotlib, which draws its report, got an environment "
            "without it; install flacompile[distill]"
        ) from error


def plot_losses(log: Path, picture: Path) -> None:
    """Draws the loss of each stage against its steps."""
    from matplotlib.figure import Figure

    records = {(r["stage"], r["step"]): r["loss"] for r in read_json_lines(log)}
    stages = list(dict.fromkeys(stage for stage, _ in records))
    figure = Figure(figsize=(4.5 * max(1, len(stages)), 3.2), layout="constrained")
    labels = {"align": "relative squared error", "logits": "nats", "long": "nats"}
    columns = figure.subplots(1, max(1, len(stages)), squeeze=False)[0][: len(stages)]
    for axes, stage in zip(columns, stages, strict=True):
        points = sorted((step, loss) for (s, step), loss in records.items() if s == stage)
        axes.plot([p[0] for p in points], [p[1] for p in points], linewidth=1.2)
        axes.set(title=stage, xlabel="step", ylabel=labels[stage], yscale="log")
        axes.grid(alpha=0.3)
    write_atomically(picture, lambda path: figure.savefig(path, dpi=120, format="png"))


def table(metrics: Metrics) -> str:
    """The four scores and the share closed, as Markdown."""
    scores = {name: getattr(metrics, key) for key, name in NAMES.items()}
    return page.score_table(scores, metrics.share_closed)


def suite(recipe: Recipe) -> Suite:
    """What the report shows besides the scores: seconds, as no speed is taken."""
    return Suite(
        length=recipe.sequence_length,
        tokens=recipe.eval_tokens,
        trials=16,
        contexts=(),
        samples=2,
        new_tokens=32,
    )


def write(
    out: Path, metrics: Metrics, evaluation: Evaluation, recipe: Recipe, notes: dict[str, Any]
) -> Path:
    """Writes distill.md and what it shows, losses.png and eval.png; and eval.json."""
    plot_losses(out / "log.jsonl", out / "losses.png")
    page.plot(evaluation, suite(recipe), out / "eval.png")
    page.write_json(out / "eval.json", evaluation, suite(recipe))
    parts = ["# Distillation", table(metrics), "![losses](losses.png)", page.PICTURE]
    parts += page.sections(evaluation)
    notes = notes | {"recipe": asdict(recipe)}
    parts += ["## Run", "\n".join(f"- {name}: {value}" for name, value in notes.items())]
    text = "\n\n".join(parts) + "\n"
    write_atomically(out / "distill.md", lambda path: path.write_text(text, encoding="utf-8"))
    return out / "distill.md"
