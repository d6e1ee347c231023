"""One student of a real teacher in so many minutes, with every figure, and a page of all of them.

    python tests/bench/students.py TEACHER TEXT... --out OUT [--mixer gla] [--keep auto:0.25]
        [--minutes 6] [--batch-size 32] [--length 512] [--heldout FILE]

TEACHER is a folder or a .gguf file, such as SmolLM2-135M-Instruct's. A third of the minutes aligns,
the others match the logits: on a GPU compiled, in bf16. Then the student is evaluated on text that
it was not trained on, the last share of TEXT or FILE. OUT/<mixer>, or OUT/<mixer>-<keep>, receives
the pages distill.md and eval.md and student.json; OUT/students.md has a row of every one there, and
OUT/students.svg their losses and recall.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import flacompile
from flacompile.cli import read_keep, read_model
from flacompile.data import read
from flacompile.distill import Metrics, Recipe, Stage
from flacompile.distill.choose import align_and_keep
from flacompile.distill.log import read_json_lines
from flacompile.distill.metrics import share_closed
from flacompile.distill.prepare import autocast
from flacompile.evaluate import Evaluation, Suite
from flacompile.keep import BATCHES
from flacompile.layers import MIXERS

FAR = 512  # tokens between a needle and its return, in the table


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Time decides, and rates are those of a model of this size."""
    return Recipe(
        align=Stage(
            steps=options.steps, minutes=options.minutes / 3, mixer_lr=options.align_lr, final=0.01
        ),
        logits=Stage(
            steps=options.steps,
            minutes=options.minutes * 2 / 3,
            mixer_lr=options.mixer_lr,
            rest_lr=options.rest_lr,
        ),
        sequence_length=options.length,
        batch_size=options.batch_size,
        eval_tokens=options.eval_tokens,
        checkpoint_every=1000,
        precision=options.precision,
    )


def suite_of(options: argparse.Namespace) -> Suite:
    """Recall at FAR among others."""
    return Suite(
        length=options.length,
        tokens=options.eval_tokens,
        distances=(FAR // 32, FAR // 8, FAR // 2, FAR),
        trials=64,
        contexts=(options.length, 4 * options.length),
    )


def training(log: Path) -> dict[str, dict[str, float]]:
    """Steps, tokens a second and memory of each stage."""
    records = read_json_lines(log)
    return {
        stage: {
            "steps": len(part),
            "tokens/s": statistics.median(r["tokens_per_s"] for r in part),
            "GiB": part[-1]["memory_gib"],
        }
        for stage in ("align", "logits")
        if (part := [r for r in records if r["stage"] == stage])
    }


def figures(
    options: argparse.Namespace, kept: int, metrics: Metrics, found: Evaluation, log: Path
) -> dict[str, Any]:
    """What the table shows, and how it was made."""
    cuda = torch.device(options.device).type == "cuda"
    return {
        "mixer": options.mixer,
        "kept": kept,
        "command": shlex.join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "share closed": found.share_closed,
        "share closed by the swap alone": share_closed(
            metrics.zero, metrics.teacher, metrics.fresh
        ),
        "training": training(log),
        "model": asdict(found.model),
        "teacher": None if found.teacher is None else asdict(found.teacher),
        "floor": None if found.zero is None else asdict(found.zero),
    }


def students(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folder and the figures of every student there."""
    return [(f.parent, json.loads(f.read_text())) for f in sorted(out.glob("*/student.json"))]


def page(out: Path) -> str:
    """A row for every student in a folder."""
    found = [figures for _, figures in students(out)]
    head = ["mixer", "kept", "share closed", "nll", "KL", "top-1", f"recall at {FAR}"]
    head += ["teacher's", "steps", "thousand tokens/s", "GiB"]
    lines = [_row(head), _row(["---"] * len(head))]
    for one in found:
        score, stages = one["model"]["score"], one["training"].values()
        recall = [one[who]["recall"][str(FAR)]["accuracy"] for who in ("model", "teacher")]
        cells = [f"`{one['mixer']}`", one["kept"], f"{one['share closed']:.3f}"]
        cells += [f"{score['nll']:.3f}", f"{score['kl']:.3f}", f"{score['top1']:.1%}"]
        cells += [f"{x:.1%}" for x in recall]
        cells += [" + ".join(str(s["steps"]) for s in stages)]
        cells += [", ".join(f"{s['tokens/s'] / 1e3:.1f}" for s in stages)]
        cells += [f"{max(s['GiB'] for s in stages):.1f}"]
        lines.append(_row(cells))
    commands = [f"    {one['command']}" for one in found]
    where = f"{found[0]['machine']}, torch {found[0]['torch']}."
    return "\n".join(["# Students", "", where, "", *commands, "", *lines, ""])


def plot(out: Path, picture: Path) -> None:
    """Losses of the logits over their steps, and recall over the distance; dashed: none kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, recall = figure.subplots(1, 2)
    found = students(out)
    colours = {name: f"C{i}" for i, name in enumerate(sorted({s["mixer"] for _, s in found}))}
    for folder, one in found:
        records = [r for r in read_json_lines(folder / "log.jsonl") if r["stage"] == "logits"]
        style = {"color": colours[one["mixer"]], "ls": "-" if one["kept"] else "--"}
        losses.plot([r["step"] for r in records], [r["loss"] for r in records], lw=1, **style)
        recall.plot(*_recall(one["model"]), marker=".", **style)
    distances, accuracies = _recall(found[0][1]["teacher"])
    recall.plot(distances, accuracies, "k:", label="teacher")
    for name, colour in colours.items():
        recall.plot([], [], color=colour, label=name)
    losses.set(xlabel="step of logits", ylabel="KL to the teacher", yscale="log")
    losses.set_yticks([0.1, 0.2, 0.4], ["0.1", "0.2", "0.4"])
    recall.set(xlabel="tokens between a needle and its return", ylabel="recalled", xscale="log")
    recall.set_xticks(distances, list(map(str, distances)))
    recall.set_ylim(0, 1)
    for axes in (losses, recall):
        axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def _recall(who: dict[str, Any]) -> tuple[list[int], list[float]]:
    points = {int(distance): found["accuracy"] for distance, found in who["recall"].items()}
    return list(points), list(points.values())


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("teacher")
    options.add_argument("text", nargs="+")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--heldout", help="text to evaluate on; default the last share of TEXT")
    options.add_argument("--mixer", default="gla", choices=sorted(MIXERS))
    options.add_argument("--keep", default="", help="as of flacompile distill")
    options.add_argument(
        "--keep-after", type=int, default=100, help="steps of aligning before --keep chooses"
    )
    options.add_argument("--minutes", type=float, default=6.0, help="of both stages together")
    options.add_argument("--steps", type=int, default=20_000, help="of a stage, at most")
    options.add_argument("--batch-size", type=int, default=32, help="rows of a step")
    options.add_argument("--length", type=int, default=512, help="tokens of a row")
    options.add_argument("--align-lr", type=float, default=1e-3)
    options.add_argument("--mixer-lr", type=float, default=3e-4, help="in logits")
    options.add_argument("--rest-lr", type=float, default=1e-4, help="in logits")
    options.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    options.add_argument("--eval-tokens", type=int, default=65_536)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


def main() -> None:
    options = parser().parse_args()
    began, recipe = time.perf_counter(), recipe_of(options)

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:.0f} s: {what}", flush=True)

    model, tokenizer = read_model(options.teacher)
    corpus = read(options.text, tokenizer)
    say(f"{len(corpus):,} tokens")
    seen, heldout = corpus.split(recipe.heldout, options.length, options.length)
    if options.heldout:
        heldout = read(options.heldout, tokenizer)
    if min(len(heldout), options.eval_tokens) < 2 * FAR:  # said before the training, not after
        raise SystemExit(f"expected {2 * FAR} held-out tokens to look back {FAR}; give --heldout")
    teacher = copy.deepcopy(model).to(options.device)
    calibration = seen.rows(8 * options.length, options.length).chunk(BATCHES)
    later, keep = options.keep and options.keep_after, read_keep(options.keep)
    model.to(options.device)
    flacompile.convert(model, options.mixer, keep=() if later else keep, calibration=calibration)
    name = "-".join(filter(None, (options.mixer, options.keep.replace(":", "-"))))
    out: Path = options.out / name
    if later:
        align_and_keep(
            model, corpus, recipe, keep, steps=options.keep_after, calibration=calibration,
            tokenizer=tokenizer, out=out / "aligned",
        )  # fmt: skip
    report = flacompile.report(model)
    say(f"converted, {len(report.kept)} attentions kept\n{report}")
    metrics = flacompile.distill(model, corpus, recipe, tokenizer=tokenizer, out=out)
    say(f"distilled, share closed {metrics.share_closed:.3f}")
    with autocast(recipe, torch.device(options.device)):
        found = flacompile.evaluate(
            model, heldout, suite_of(options), teacher=teacher, tokenizer=tokenizer, out=out
        )
    facts = figures(options, len(report.kept), metrics, found, out / "log.jsonl")
    (out / "student.json").write_text(json.dumps(facts, indent=1))
    (options.out / "students.md").write_text(page(options.out))
    plot(options.out, options.out / "students.svg")
    say("evaluated")
    print(page(options.out))


if __name__ == "__main__":
    main()
