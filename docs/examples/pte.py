"""A converted model for ExecuTorch: ``prefill.pte`` and ``decode.pte``, run and compared.

    python docs/examples/pte.py out out/pte

In an environment of its own, as ExecuTorch brings much: flacompile[hf] and ``executorch``. Both
programs have the signature of a ``.pt2`` package (see the page on export), with two differences.
ExecuTorch plans its memory ahead, so B and T have bounds; and its portable kernels are exact and
slow: one who delegates to XNNPACK passes its partitioner to ``lower``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

import flacompile
from flacompile.export.gate import LENGTHS, compare, references
from flacompile.export.programs import SPAN, Step, all_mixers
from flacompile.files import write_atomically
from flacompile.passes.decompose import decompose
from flacompile.passes.portable import portable

BATCH, LONGEST = 4, 4 * SPAN  # bounds of B and T


def trace(step: Step) -> dict[str, ExportedProgram]:
    """As ``flacompile.export`` does, within bounds."""
    ids = torch.ones(2, SPAN * 3 - 70, dtype=torch.long)
    batch, time = Dim("batch", min=1, max=BATCH), Dim("time", min=1, max=LONGEST)
    states = step.begin(2)
    shapes = tuple({0: batch} for _ in states)
    examples = {
        "prefill": (ids, {0: batch, 1: time}),
        "decode": (ids[:, :1].contiguous(), {0: batch}),
    }
    with sdpa_kernel(SDPBackend.MATH):  # the lowering opens it, and its result has these strides
        return {
            name: portable(
                decompose(torch.export.export(step, (ids, states), dynamic_shapes=(dims, shapes)))
            )
            for name, (ids, dims) in examples.items()
        }


def lower(program: ExportedProgram, partitioner: Sequence[Any] = ()) -> bytes:
    """The file."""
    config = EdgeCompileConfig(_check_ir_validity=False)  # it allows fewer operations than kernels
    edge = to_edge_transform_and_lower(
        program, partitioner=list(partitioner), compile_config=config
    )
    return edge.to_executorch().buffer


def load(path: Path) -> Callable[..., Sequence[Tensor]]:
    """A file as a function of ids and a tuple of states."""
    method = Runtime.get().load_program(path).load_method("forward")
    # States that are written in place come out a second time, before the logits.
    return lambda ids, states: method.execute([ids, *states])[-1 - len(states) :]


def export_pte(model: nn.Module, folder: Path, max_length: int | None = None) -> dict[str, float]:
    """Writes both files, once their values are those of the model; the largest relative errors.

    Args:
        model: an fp32 model on a CPU, as for ``flacompile.export``.
        folder: where the files go.
        max_length: most tokens of a sequence, where a softmax layer keeps them all.
    """
    with torch.no_grad():
        cases = references(model.eval(), LENGTHS, max_length)
        with all_mixers(model):
            step = Step(model, max_length)
            files = {name: lower(program) for name, program in trace(step).items()}
        for name, data in files.items():
            write_atomically(folder / f"{name}.unproved", lambda path: path.write_bytes(data))  # noqa: B023
        loaded = {name: load(folder / f"{name}.unproved") for name in files}
        errors = compare(loaded, step.begin, cases)
    for name in files:
        (folder / f"{name}.unproved").replace(folder / f"{name}.pte")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder written by convert or distill")
    parser.add_argument("out", type=Path, help="folder for both files")
    parser.add_argument("--max-length", type=int, help="tokens, where a softmax layer was kept")
    options = parser.parse_args()
    print(export_pte(flacompile.load(options.model), options.out, options.max_length))
