"""The command line: ``flacompile convert | distill | eval | export | generate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import flacompile
from flacompile.distill import PRESETS, Recipe, read_recipe
from flacompile.evaluate import Suite
from flacompile.evaluate.page import markdown
from flacompile.export import STAGES
from flacompile.keep import Keep
from flacompile.layers import MIXERS


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="flacompile",
        description="Turn a pretrained Transformer into a linear-attention model, train it to be "
        "its teacher, and ship it.",
        epilog="MODEL is a folder that transformers reads, or a .gguf file. A typical run: "
        "flacompile distill MODEL text.txt out; flacompile export out out/model.pt2; "
        "flacompile generate out/model.pt2 --tokenizer out --prompt 'Once upon a time'",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    convert = add("convert", "Replace softmax attention by a linear mixer; report; no training.")
    distill = add("distill", "Convert, then train the mixers and the model to match the teacher.")
    for command in (convert, distill):
        command.add_argument("model", help="the teacher: a model folder or a .gguf file")
    distill.add_argument(
        "data", help="UTF-8 text, paragraphs apart by blank lines; .jsonl or .parquet; tokens in "
        ".npy or .bin; a pattern of such files; or self: what the teacher writes",
    )  # fmt: skip
    for command in (convert, distill):
        command.add_argument("out", type=Path, help="folder for the converted model and reports")
        command.add_argument(
            "--mixer", default="gla", help=f"one of {', '.join(sorted(MIXERS))} (default: gla)"
        )
        command.add_argument(
            "--keep", default="", help="attentions that stay softmax: a share (0.25), indices "
            "(0,5,-1), or auto, auto:0.5, auto:3 for those worth most; default none",
        )  # fmt: skip
        command.add_argument(
            "--window", type=int, help="tokens of a softmax beside every linear mixer; default none"
        )
        command.add_argument(
            "--init", default="calibrated", choices=["neutral", "calibrated"],
            help="neutral copies weights; calibrated also fits decay and scale of every head",
        )  # fmt: skip
    distill.add_argument(
        "--recipe", default="small", help=f"a YAML file, or one of {', '.join(PRESETS)}; the "
        "options below change it; default: %(default)s",
    )  # fmt: skip
    distill.add_argument("--minutes", type=float, help="wall time of align and logits together")
    distill.add_argument("--align-steps", type=int, help="steps of align")
    distill.add_argument("--logits-steps", type=int, help="steps of logits")
    distill.add_argument("--batch-size", type=int, help="rows of a step")
    distill.add_argument("--length", type=int, help="tokens of a row")
    distill.add_argument("--tensorboard", action="store_true", help="events in OUT/tensorboard too")

    evaluate = add("eval", "Measure a model on text, its teacher beside it: loss, recall, speed.")
    evaluate.add_argument("model", help="a folder written by convert or distill, or any other")
    evaluate.add_argument("data", help="UTF-8 text that it was not trained on")
    evaluate.add_argument("--teacher", help="what it was converted from: a folder or a .gguf file")
    evaluate.add_argument("--out", type=Path, help="folder for eval.json, eval.md and eval.png")
    evaluate.add_argument("--length", type=int, default=512, help="tokens a row; %(default)s")
    evaluate.add_argument(
        "--tokens", type=int, default=16_384, help="of the text that are scored; %(default)s"
    )
    evaluate.add_argument("--tasks", default="", help="of lm-eval, such as lambada_openai,arc_easy")
    evaluate.add_argument("--task-limit", type=int, help="examples of a task; default all")
    evaluate.add_argument("--device", default="cpu", help="default: %(default)s")

    export = add("export", "Write a model as one .pt2 package that needs no Python.")
    export.add_argument("model", type=Path, help="a folder written by convert or distill")
    export.add_argument("package", type=Path, help="the .pt2 file to write")
    export.add_argument(
        "--max-length", type=int, metavar="TOKENS",
        help="most tokens of a sequence; needed where softmax layers are left",
    )  # fmt: skip

    generate = add("generate", "Continue a prompt, greedily, by a converted model or a package.")
    generate.add_argument("model", type=Path, help="a converted model's folder, or a .pt2 package")
    generate.add_argument("--tokenizer", type=Path, help="its folder; default: that of the model")
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--tokens", type=int, default=64, help="new tokens; %(default)s")
    return top


def read_model(path: str) -> tuple[Any, Any]:
    """Model (fp32, sdpa) and tokenizer from a folder or a .gguf file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(path)
    if not file.exists():
        raise ValueError(
            f"model: expected a folder or a .gguf file, got {path}, which is not there"
        )
    where, options = (file, {}) if file.is_dir() else (file.parent, {"gguf_file": file.name})
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    if options:  # a GGUF file is read into plain fp32 weights, and may be saved as such
        vars(model).pop("hf_quantizer", None)
        for name in ("quantization_config", "_pre_quantization_dtype"):
            vars(model.config).pop(name, None)
    return model.eval(), AutoTokenizer.from_pretrained(where, **options)


def read_keep(text: str) -> Keep:
    """ "0.25" is a share, "0,5,-1" are indices, "auto..." is for ``convert``, "" is nothing."""
    if text.startswith("auto"):
        return text
    try:
        if "." in text:
            return float(text)
        return [int(part) for part in text.split(",") if part]
    except ValueError as error:
        raise ValueError(f"keep: expected a share, indices or auto, got {text!r}") from error


@contextmanager
def export_progress() -> Iterator[Any]:
    """A callback for ``flacompile.export`` that moves a bar."""
    from tqdm.auto import tqdm

    with tqdm(total=len(STAGES), desc="export", unit="stage") as bar:

        def stage(name: str) -> None:
            bar.update(int(bar.postfix is not None))
            bar.set_postfix_str(name)

        yield stage
        bar.update()


def generate_from_package(package: Path, ids: list[int], tokens: int) -> list[int]:
    """Greedy continuation of ids by a package: prefill once, then decode a token at a time."""
    from torch._inductor.package import load_package

    prefill, decode = (load_package(str(package), model_name=n) for n in ("prefill", "decode"))
    shapes, dtypes = (
        json.loads(prefill.get_metadata()[f"state_{name}"]) for name in ("shapes", "dtypes")
    )
    pairs = zip(shapes, dtypes, strict=True)
    states = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in pairs]
    logits, *states = prefill(torch.tensor([ids]), tuple(states))
    for i in range(tokens):
        ids = [*ids, int(logits.argmax(-1))]
        if i + 1 < tokens:
            logits, *states = decode(torch.tensor([ids[-1:]]), tuple(states))
    return ids


def run(options: argparse.Namespace) -> None:
    """Carries out one parsed command."""
    if options.command in ("convert", "distill"):
        recipe = recipe_of(options) if options.command == "distill" else Recipe()
        model, tokenizer = read_model(options.model)
        flacompile.convert(
            model, options.mixer, keep=read_keep(options.keep), window=options.window,
            init=options.init,
        )  # fmt: skip
        print(flacompile.report(model))
        if options.command == "distill":
            print(_distill(model, tokenizer, recipe, options))
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        print(f"wrote {options.out}")
    elif options.command == "eval":
        print(_evaluate(options))
    elif options.command == "export":
        with export_progress() as progress:
            facts = flacompile.export(
                flacompile.load(options.model), options.package, max_length=options.max_length,
                tokenizer=str(options.model), progress=progress,
            )  # fmt: skip
        print(f"wrote {options.package}: largest relative errors {facts['errors']}")
    else:
        print(_generate(options))


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that was named, with what other options change of it."""
    recipe = read_recipe(options.recipe)
    half = options.minutes and options.minutes / 2
    stages = {
        name: replace(
            stage,
            steps=stage.steps if steps is None else steps,
            minutes=stage.minutes if half is None else half,
            batch_size=options.batch_size or stage.batch_size,
            sequence_length=options.length or stage.sequence_length,
        )
        for name, stage, steps in (
            ("align", recipe.align, options.align_steps),
            ("logits", recipe.logits, options.logits_steps),
        )
    }
    return replace(
        recipe,
        **stages,
        batch_size=options.batch_size or recipe.batch_size,
        sequence_length=options.length or recipe.sequence_length,
    )


def _distill(model: Any, tokenizer: Any, recipe: Recipe, options: argparse.Namespace) -> str:
    flacompile.distill(
        model,
        None if options.data == "self" else options.data,
        recipe,
        tokenizer=tokenizer,
        out=options.out,
        tensorboard=options.tensorboard,
    )
    return (options.out / "distill.md").read_text()


def _evaluate(options: argparse.Namespace) -> str:
    model, tokenizer = read_model(options.model)
    teacher = None if options.teacher is None else read_model(options.teacher)[0]
    suite = Suite(
        length=options.length,
        tokens=options.tokens,
        tasks=tuple(name for name in options.tasks.split(",") if name),
        task_limit=options.task_limit,
    )
    evaluation = flacompile.evaluate(
        model.to(options.device),
        options.data,
        suite,
        teacher=teacher and teacher.to(options.device),
        tokenizer=tokenizer,
        out=options.out,
    )
    return markdown(evaluation)


def _generate(options: argparse.Namespace) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.model)
    ids = tokenizer(options.prompt)["input_ids"]
    if options.model.suffix == ".pt2":
        return tokenizer.decode(generate_from_package(options.model, ids, options.tokens))
    model = flacompile.load(options.model)
    output = model.generate(  # type: ignore[operator]
        torch.tensor([ids]), max_new_tokens=options.tokens, do_sample=False
    )
    return tokenizer.decode(output[0])


def main(argv: list[str] | None = None) -> int:
    """Runs a command; a ValueError becomes one line and exit status 2."""
    options = parser().parse_args(argv)
    try:
        run(options)
    except ValueError as error:
        print(f"flacompile {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
