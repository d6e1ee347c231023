"""A converted model for ExecuTorch: ``prefill.pte`` and ``decode.pte``, run and compared.

    python docs/examples/pte.py out out/pte

In an environment of its own, with flacompile[hf] and ``executorch``. The programs are those of a
``.pt2`` package (see the page on export), but memory is planned ahead, so B and T have bounds. The
portable kernels are exact and slow; a partitioner given to ``lower`` delegates to others.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

import flacompile
from flacompile.export.gate import LENGTHS, compare, references
from flacompile.export.programs import NAMES, SPAN, Step, all_mixers
from flacompile.passes.decompose import decompose
from flacompile.passes.portable import portable

BATCH, LONGEST = 4, 4 * SPAN  # bounds of B and T


def trace(step: Step) -> dict[str, ExportedProgram]:
    """As ``flacompile.export`` does, within bounds."""
    batch, length = Dim("batch", min=1, max=BATCH), Dim("time", min=1, max=LONGEST)
    states, programs = step.begin(2), {}
    rows = tuple({0: batch} for _ in states)
    cases = {"prefill": (SPAN * 3 - 70, {0: batch, 1: length}), "decode": (1, {0: batch})}
    for name, (time, sizes) in cases.items():
        example = torch.ones(2, time, dtype=torch.long), states
        with sdpa_kernel(SDPBackend.MATH):  # lowering opens it, and its result has these strides
            program = torch.export.export(step, example, dynamic_shapes=(sizes, rows))
            programs[name] = portable(decompose(program))
    return programs


def lower(program: ExportedProgram, partitioner: Sequence[object] = ()) -> bytes:
    """The file."""
    checks = EdgeCompileConfig(_check_ir_validity=False)  # it allows fewer operations than kernels
    options = {"partitioner": list(partitioner), "compile_config": checks}
    return to_edge_transform_and_lower(program, **options).to_executorch().buffer


def load(path: Path) -> Callable[..., Sequence[Tensor]]:
    """A file as a function of ids and a tuple of states."""
    method = Runtime.get().load_program(path).load_method("forward")
    # States that are written in place come out a second time, before the logits.
    return lambda ids, states: method.execute([ids, *states])[-1 - len(states) :]


@torch.no_grad()
def export_pte(model: nn.Module, folder: Path, max_length: int | None = None) -> dict[str, float]:
    """Writes both files if their values are the model's; arguments as of ``flacompile.export``."""
    folder.mkdir(parents=True, exist_ok=True)
    unproved = {name: folder / f"{name}.unproved" for name in NAMES}
    cases = references(model.eval(), LENGTHS, max_length)
    with all_mixers(model):
        step = Step(model, max_length)
        for name, program in trace(step).items():
            unproved[name].write_bytes(lower(program))
    errors = compare({name: load(path) for name, path in unproved.items()}, step.begin, cases)
    for name, path in unproved.items():
        path.replace(folder / f"{name}.pte")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder written by convert or distill")
    parser.add_argument("out", type=Path, help="folder for both files")
    parser.add_argument("--max-length", type=int, help="tokens, where a softmax layer was kept")
    options = parser.parse_args()
    print(export_pte(flacompile.load(options.model), options.out, options.max_length))
