"""A language model as two ONNX graphs that share their weights: ``flacompile.export_onnx``.

The graphs are the programs of a ``.pt2`` package, with its signature and its gate. What ONNX has no
operation for is opened further (see ``passes.portable``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from flacompile.export import prepare
from flacompile.export.gate import LENGTHS, compare
from flacompile.ops.chunked_dplr import LONGEST
from flacompile.ops.validate import expect
from flacompile.passes.portable import portable

OPSET = 20
WEIGHTS = "weights.bin"
SMALL = 1024  # bytes; constants of shapes, which stay in the graphs
NO_TOKEN = -(2**31)  # an index that every runtime refuses


def export_onnx(
    model: nn.Module,
    folder: str | Path,
    *,
    max_length: int | None = None,
    tokenizer: str | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, Any]:
    """Writes ``folder`` with ``prefill.onnx``, ``decode.onnx`` and the weights of both.

    Both graphs take ``ids`` [B, T] int64 and ``state_0``, ``state_1``, ..., and give ``logits`` of
    the last token [B, vocabulary] and ``next_state_0``, ...: any B, T from 1 to 131,072 for prefill
    and 1 for decode. Ids below zero, more of them, and states of another B are an error of the
    runtime's Gather. Before the folder gets its name, onnxruntime's values are compared with the
    model's, as those of a ``.pt2`` package are.

    Args:
        model: as ``flacompile.export``, on a CPU and in fp32.
        folder: new, or empty.
        max_length: as ``flacompile.export``.
        tokenizer: as ``flacompile.export``.
        lengths: as ``flacompile.export``.

    Returns:
        As ``flacompile.export``: the metadata, of both graphs, and the errors of the gate.

    Raises:
        ValueError: as ``flacompile.export``, another device or dtype, or the folder holds files.
    """
    folder = Path(folder)
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    expect(not taken, "folder", "a new or an empty folder", folder)
    parameter = next(model.parameters())
    fits = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    expect(fits, "model", "fp32 on a CPU", f"{parameter.dtype} on {parameter.device}")
    programs, step, facts, cases = prepare(model, max_length, tokenizer, lengths)
    facts["weights"] = WEIGHTS
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        graphs = {name: _convert(portable(program)) for name, program in programs.items()}
        _save(graphs, facts, partial)
        loaded = {name: load_graph(partial / f"{name}.onnx") for name in graphs}
        facts["errors"] = compare(loaded, step.begin, cases)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def load_graph(path: Path) -> Callable[..., list[Tensor]]:
    """A graph as a function of ids and a tuple of states, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(ids: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
        """Logits, then the next states."""
        inputs = dict(zip(names, (x.numpy() for x in (ids, *states)), strict=True))
        return [torch.from_numpy(x) for x in session.run(None, inputs)]

    return run


def _convert(program: ExportedProgram) -> Any:
    """The graph, an ``onnx_ir.Model``."""
    (ids, states), _ = program.example_inputs  # type: ignore[misc]
    time = {1: "time"} if ids.shape[1] > 1 else {}
    converted = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["ids", *(f"state_{i}" for i in range(len(states)))],
        output_names=["logits", *(f"next_state_{i}" for i in range(len(states)))],
        dynamic_shapes=({0: "batch"} | time, ({0: None},) * len(states)),
        verbose=False,
    )
    assert converted is not None
    model = converted.model
    model.metadata_props.clear()
    for node in model.graph.all_nodes():  # where the exporter found it: files of this machine
        node.metadata_props.clear()
    _refuse_wrong_calls(model)
    return model


def _refuse_wrong_calls(model: Any) -> None:
    """Turns ids into ``NO_TOKEN`` where they, or the shapes, are not what the graph is for."""
    import onnx_ir as ir

    ids, *states = model.graph.inputs
    readers = list(ids.uses())
    tape = ir.tape.Tape()

    def constant(value: int) -> Any:
        """A tensor [1] of int64."""
        return tape.op("Constant", [], {"value_ints": [value]})

    batch, time = (tape.op("Shape", [ids], {"start": i, "end": i + 1}) for i in (0, 1))
    fits = tape.op("LessOrEqual", [time, constant(LONGEST)])
    for state in states:
        rows = tape.op("Shape", [state], {"start": 0, "end": 1})
        fits = tape.op("And", [fits, tape.op("Equal", [rows, batch])])
    real = tape.op("And", [tape.op("GreaterOrEqual", [ids, constant(0)]), fits])
    checked = tape.op("Where", [real, ids, constant(NO_TOKEN)])
    model.graph.insert_before(model.graph[0], tape.nodes)
    for node, index in readers:
        node.replace_input_with(index, checked)


def _save(graphs: dict[str, Any], facts: dict[str, Any], folder: Path) -> None:
    """Writes the graphs; a weight that stands in several, or several times, is written once."""
    import onnx_ir as ir

    values: dict[tuple[Any, ...], list[Any]] = {}
    for model in graphs.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes >= SMALL:
                digest = hashlib.sha256(tensor.tobytes()).digest()
                values.setdefault((tensor.dtype, tuple(tensor.shape), digest), []).append(value)
    weights = ir.external_data.convert_tensors_to_external(
        [same[0].const_value for same in values.values()], folder, WEIGHTS
    )
    for same, weight in zip(values.values(), weights, strict=True):
        for value in same:
            value.const_value = weight
    for name, model in graphs.items():
        model.metadata_props.update({key: json.dumps(fact) for key, fact in facts.items()})
        ir.save(model, folder / f"{name}.onnx")
