"""A language model as one package that runs without Python: ``flacompile.export``.

The package holds two AOTInductor programs of one signature: ids [B, T] and the states -> logits of
the last token [B, vocabulary] and the next states. ``prefill`` takes any B and T, ``decode`` any B
and T = 1. Both continue what the states hold, so that a long prompt goes in by pieces. The states
are plain tensors in a fixed order, zeros before the first token, and do not grow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from flacompile import __version__, hf
from flacompile.export.gate import LENGTHS, Reference, compare, load_programs, references
from flacompile.export.processor import compile_options, instructions
from flacompile.export.programs import Step, all_mixers, is_own, trace
from flacompile.export.strides import remembered_strides
from flacompile.files import write_atomically
from flacompile.ops.validate import expect
from flacompile.passes.stream_weights import stream_weights

STAGES = ("trace", "prefill", "decode", "gate")


def export(
    model: nn.Module,
    path: str | Path,
    *,
    max_length: int | None = None,
    weights: Literal["inside", "beside"] = "inside",
    tokenizer: str | None = None,
    decode_for: Literal["one", "many"] = "one",
    lengths: Sequence[int] = LENGTHS,
    progress: Callable[[str], object] = lambda stage: None,
) -> dict[str, Any]:
    """Writes ``path``, a ``.pt2`` package with ``prefill`` and ``decode``.

    Args:
        model: a causal language model of transformers, converted or not, or of ``flacompile.lm``.
        path: the package; an existing file is replaced only by a package that passed its gate.
        max_length: most tokens of a sequence, prompt included, where softmax layers keep them all:
            each then carries keys and values of that many tokens.
        weights: "inside" stores them in each of the two programs, and the package is all there is
            to load; "beside" once for both, in a safetensors file of the package's name, to be
            given to each program.
        tokenizer: where a runner finds it, a folder or a name; default the model's own name.
        decode_for: what ``decode``, which takes any number of sequences, is fast for on a CPU:
            "one" reads the weights at the speed of memory, again for each sequence; "many"
            multiplies matrices, and is the faster from about five sequences on.
        lengths: values of T at which the package is compared with the model; those beyond the
            room of a sequence are left out.
        progress: called with a word at the start of each of the STAGES.

    Returns:
        The metadata of the package (see the page on export), and under ``errors`` the largest
        relative errors of the gate.

    Raises:
        ValueError: an attention that cannot be proved, max_length missing, or the gate failed.
    """
    from safetensors.torch import save_file
    from torch._inductor.package import package_aoti

    path = Path(path)
    expect(path.suffix == ".pt2", "path", "a name that ends in .pt2", path.name)
    expect(weights in ("inside", "beside"), "weights", "'inside' or 'beside'", repr(weights))
    expect(decode_for in ("one", "many"), "decode_for", "'one' or 'many'", repr(decode_for))
    progress("trace")
    programs, step, facts, cases = prepare(model, max_length, tokenizer, lengths)
    beside = path.with_suffix(".safetensors") if weights == "beside" else None
    facts["weights"] = beside and beside.name
    facts["processor"] = instructions()
    if decode_for == "one" and facts["device"] == "cpu":
        programs["decode"] = stream_weights(programs["decode"])
    with torch.no_grad(), remembered_strides():
        options = {
            "aot_inductor.package": True,
            "aot_inductor.package_constants_in_so": beside is None,
            "aot_inductor.metadata": {name: json.dumps(value) for name, value in facts.items()},
            **compile_options(),
        }
        files: dict[str, Any] = {}
        tensors = None if beside is None else _tensors(programs.values())
        for name, program in programs.items():
            progress(name)
            args, kwargs = program.example_inputs  # type: ignore[misc]
            files[name] = torch._inductor.aot_compile(
                program.module(), args, kwargs, options=options
            )

        def write(temporary: Path) -> None:
            """The package, under a name of its own until it has passed its gate."""
            progress("gate")
            package = temporary.with_suffix(".pt2")  # the packager insists on the suffix
            try:
                package_aoti(str(package), files)
                loaded = load_programs(package, tensors)
                facts["errors"] = compare(loaded, step.begin, cases)
                if beside is not None:
                    used = _used(tensors or {}, loaded.values())
                    write_atomically(beside, lambda file: save_file(used, file))
                package.rename(temporary)
            finally:
                package.unlink(missing_ok=True)

        write_atomically(path, write)
    return facts


class Prepared(NamedTuple):
    """What every format is written from: programs, metadata, and what is compared."""

    programs: dict[str, ExportedProgram]
    step: Step
    facts: dict[str, Any]
    cases: list[Reference]


@torch.no_grad()
def prepare(
    model: nn.Module, max_length: int | None, tokenizer: str | None, lengths: Sequence[int]
) -> Prepared:
    """Checks and traces the model; arguments and errors are those of ``export``."""
    _check(model, max_length)
    model.eval()
    context = _context(model, max_length)
    cases = references(model, lengths, context)
    expect(bool(cases), "lengths", f"one below the {context} tokens of a sequence", lengths)
    with all_mixers(model):
        programs = trace(model, max_length)
        step = Step(model, max_length)
    return Prepared(programs, step, _facts(model, step, context, tokenizer), cases)


def _check(model: nn.Module, max_length: int | None) -> None:
    config: Any = getattr(model, "config", None)
    known = hf.is_transformers(model) and hasattr(config, "num_hidden_layers")
    expect(known, "model", "a causal language model of transformers", type(model).__name__)
    has_head = model.get_output_embeddings() is not None  # type: ignore[operator]
    expect(has_head, "model", "one with a language model's head", type(model).__name__)
    fits = max_length is None or max_length >= 2
    expect(fits, "max_length", "a number of tokens, at least 2", max_length)


def _tensors(programs: Iterable[ExportedProgram]) -> dict[str, Tensor]:
    """What the programs may read, by the names under which they ask for it."""
    found: dict[str, Tensor] = {}
    for program in programs:
        signature = program.graph_signature
        sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for name in sources.values():
            tensor = program.state_dict.get(name, program.constants.get(name))
            assert isinstance(tensor, Tensor)
            found[name] = tensor.detach().contiguous()
    return found


def _used(tensors: dict[str, Tensor], loaded: Iterable[Any]) -> dict[str, Tensor]:
    """Those of the tensors that compiled programs ask for, none over the memory of another."""
    names = {name for program in loaded for name in program.get_constant_fqns()}
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        shared = any(x.data_ptr() == tensors[name].data_ptr() for x in found.values())
        found[name] = tensors[name].clone() if shared else tensors[name]
    return found


def _context(model: nn.Module, max_length: int | None) -> int | None:
    """Most tokens of a sequence: the room of the states, or of a table of learned positions."""
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    learned = any(isinstance(m, nn.Embedding) and m is not tokens for m in model.modules())
    config: Any = model.config
    bounds = [max_length, config.max_position_embeddings if learned and not is_own(model) else None]
    return min((bound for bound in bounds if bound is not None), default=None)


def _facts(
    model: nn.Module, step: Step, context: int | None, tokenizer: str | None
) -> dict[str, Any]:
    """The metadata."""
    config: Any = model.config
    states = step.empty
    parameter = next(model.parameters())
    end = getattr(model, "generation_config", config).eos_token_id
    return {
        "state_names": step.names,
        "state_shapes": [list(x.shape) for x in states],
        "state_dtypes": [str(x.dtype).removeprefix("torch.") for x in states],
        "position": next(i for i, x in enumerate(states) if x.dtype == torch.int64 and x.ndim == 1),
        "context": context,
        "vocabulary": config.vocab_size,
        "end": [end] if isinstance(end, int) else end or [],
        "tokenizer": tokenizer or config._name_or_path or None,
        "config": config.to_dict(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "torch": torch.__version__,
        "flacompile": __version__,
    }
