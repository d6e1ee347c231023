"""The command line: ``flacompile convert | distill | eval | export | generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import flacompile
from flacompile.data import Corpus, read
from flacompile.distill import PRESETS, Recipe, processes, read_recipe
from flacompile.distill.choose import align_and_keep
from flacompile.evaluate import Suite
from flacompile.evaluate.page import markdown
from flacompile.export import STAGES
from flacompile.keep import BATCHES, METHODS, Keep
from flacompile.layers import MIXERS
from flacompile.runner import Clock, Package, Sampling, generate, sampling_options
from flacompile.text import pieces

CALIBRATION = 4096  # tokens of the data that a conversion is fitted to before it is distilled


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="flacompile",
        description="Turn a pretrained Transformer into a linear-attention model, train it to be "
        "its teacher, and ship it.",
        epilog="MODEL is a folder that transformers reads, or a .gguf file. A typical run: "
        "flacompile distill MODEL text.txt out; flacompile export out out/model.pt2; "
        "flacompile generate --package out/model.pt2 --prompt 'Once upon a time'",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        """A command with its one line of help."""
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
            "(0,5,-1), or auto, auto:0.5, auto:3 for those worth most (recall: for recalling what "
            "was read; uniform: evenly spread); default none",
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
    distill.add_argument(
        "--keep-after", type=int, default=0, metavar="STEPS",
        help="of aligning all mixers before --keep chooses; default: it chooses at once",
    )  # fmt: skip
    distill.add_argument("--minutes", type=float, help="of align and logits, compiling aside")
    distill.add_argument("--align-steps", type=int, help="steps of align")
    distill.add_argument("--logits-steps", type=int, help="steps of logits")
    distill.add_argument("--batch-size", type=int, help="rows of a step")
    distill.add_argument("--length", type=int, help="tokens of a row")
    distill.add_argument(
        "--device", default=_device(), help="that one process trains on; under torchrun each has "
        "its own; here: %(default)s",
    )  # fmt: skip
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
    evaluate.add_argument("--device", default=_device(), help="here: %(default)s")

    export = add("export", "Write a model as one .pt2 package that needs no Python.")
    export.add_argument("model", type=Path, help="a folder written by convert or distill")
    export.add_argument("package", type=Path, help="the .pt2 file to write")
    export.add_argument(
        "--max-length", type=int, metavar="TOKENS",
        help="most tokens of a sequence; needed where softmax layers are left",
    )  # fmt: skip

    continues = add("generate", "Continue a prompt by a converted model, or by a package of it.")
    continues.add_argument("model", nargs="?", help="a folder with its tokenizer; or see --package")
    continues.add_argument(
        "--package", type=Path, help="a .pt2 file to run; the tokenizer is that of the model, or "
        "else where the package says",
    )  # fmt: skip
    continues.add_argument("--prompt", required=True, help="text to continue")
    sampling_options(continues)
    return top


def _device() -> str:
    """The accelerator's name where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


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
    if text.startswith(METHODS):
        return text
    try:
        if "." in text:
            return float(text)
        return [int(part) for part in text.split(",") if part]
    except ValueError as error:
        raise ValueError(
            f"keep: expected a share, indices or one of {', '.join(METHODS)}, got {text!r}"
        ) from error


@contextmanager
def export_progress() -> Iterator[Any]:
    """A callback for ``flacompile.export`` that moves a bar."""
    from tqdm.auto import tqdm

    with tqdm(total=len(STAGES), desc="export", unit="stage") as bar:

        def stage(name: str) -> None:
            """Ends the stage before, if there was one, and names this one."""
            bar.update(int(bar.postfix is not None))
            bar.set_postfix_str(name)

        yield stage
        bar.update()


def run(options: argparse.Namespace) -> None:
    """Carries out one parsed command."""
    if options.command in ("convert", "distill"):
        _convert(options)
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
        _generate(options)


def _convert(options: argparse.Namespace) -> None:
    """convert; distill goes on from there."""
    distills, keep = options.command == "distill", read_keep(options.keep)
    recipe = recipe_of(options) if distills else Recipe()
    model, tokenizer = read_model(options.model)
    data = calibration = None
    if distills and options.data != "self":
        data = read(options.data, tokenizer, recipe.data)
        length = recipe.sequence_length
        training, _ = data.split(recipe.heldout, length, length)
        calibration = training.rows(CALIBRATION, length).chunk(BATCHES)
    if distills and processes.size() == 1:
        model.to(options.device)
    aligns_first = distills and options.keep_after
    flacompile.convert(
        model, options.mixer, keep=() if aligns_first else keep, window=options.window,
        init=options.init, calibration=calibration,
    )  # fmt: skip
    if aligns_first:
        align_and_keep(
            model, data, recipe, keep, steps=options.keep_after, calibration=calibration,
            tokenizer=tokenizer, out=options.out / "aligned",
        )  # fmt: skip
    first = processes.rank() == 0
    if first:
        print(flacompile.report(model))
    if distills:
        text = _distill(model, data, tokenizer, recipe, options)
        if first:
            print(text)
    if first:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        print(f"wrote {options.out}")


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


def _distill(
    model: Any, data: Corpus | None, tokenizer: Any, recipe: Recipe, options: argparse.Namespace
) -> str:
    if processes.rank() == 0:
        print(
            f"checkpoints go to {options.out} every {recipe.checkpoint_every} steps; a run that is "
            "stopped goes on from the last one by the same command, with any number of processes",
            file=sys.stderr,
        )
    flacompile.distill(
        model,
        data,
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


def _generate(options: argparse.Namespace) -> None:
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    package = None if options.package is None else Package(options.package)
    tokenizer = _read_tokenizer(options.model or (package and package.facts["tokenizer"]))
    ids = tokenizer(options.prompt)["input_ids"]
    if package is None:
        return _generate_by_model(options, tokenizer, sampling)
    clock, stop = Clock(len(ids)), package.facts["end"]
    new = generate(package, ids, tokens=options.tokens, sampling=sampling, stop=stop)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    for piece in pieces(decode, chain(ids, clock.timed(new))):
        print(piece, end="", flush=True)
    print()
    print(clock, file=sys.stderr)


def _read_tokenizer(where: str | None) -> Any:
    from transformers import AutoTokenizer

    wanted = "a folder with a tokenizer"
    if where is None:
        raise ValueError(f"model: expected {wanted}, got none, and the package names none")
    try:
        return AutoTokenizer.from_pretrained(where)
    except OSError as error:
        raise ValueError(f"model: expected {wanted}, got {where}") from error


def _generate_by_model(options: argparse.Namespace, tokenizer: Any, sampling: Sampling) -> None:
    from transformers import TextStreamer

    warm = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    torch.manual_seed(sampling.seed)
    flacompile.load(options.model).generate(  # type: ignore[operator]
        **tokenizer(options.prompt, return_tensors="pt"), max_new_tokens=options.tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **({"do_sample": True, **warm} if sampling.temperature else {"do_sample": False}),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs a command; a ValueError becomes one line and exit status 2."""
    options = parser().parse_args(argv)
    try:
        with processes.joined():
            run(options)
    except ValueError as error:
        print(f"flacompile {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
