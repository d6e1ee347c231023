"""What a distillation leaves to look at: curves as PNG, figures as Markdown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flacompile.distill.log import read_json_lines
from flacompile.distill.metrics import Metrics
from flacompile.files import write_atomically


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
    rows = [
        "| model | nll | perplexity | KL to teacher | top-1 agreement |",
        "|---|---|---|---|---|",
    ]
    names = {
        "teacher": "teacher (softmax)",
        "zero": "mixers output zero (floor)",
        "fresh": "converted, not trained",
        "student": "distilled student",
    }
    for key, values in asdict(metrics).items():
        ppl = 2.718281828459045 ** min(values["nll"], 30.0)
        rows.append(
            f"| {names[key]} | {values['nll']:.4f} | {ppl:,.2f} | {values['kl']:.4f} "
            f"| {values['top1']:.1%} |"
        )
    return "\n".join(rows) + f"\n\nShare closed: **{metrics.share_closed:.3f}**\n"


def write(out: Path, metrics: Metrics, notes: dict[str, Any]) -> Path:
    """Writes ``losses.png`` and ``distill.md`` into ``out``; returns the latter."""
    plot_losses(out / "log.jsonl", out / "losses.png")
    lines = [f"- {name}: {value}" for name, value in notes.items()]
    text = "# Distillation\n\n" + table(metrics) + "\n![losses](losses.png)\n\n" + "\n".join(lines)
    write_atomically(out / "distill.md", lambda path: path.write_text(text + "\n"))
    return out / "distill.md"
