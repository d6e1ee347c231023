"""Which mixers run where: a Llama of one layer by every mixer, exported, run and compared.

    python tests/bench/runtimes.py onnx [MIXER ...]
    python tests/bench/runtimes.py executorch [MIXER ...]

Writes each result into the table of docs/runtimes.md: the largest relative error of the gate, at
batch 1 to 3 and lengths on both sides of every chunk boundary, or the reason why there is none.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import llama

import flacompile
from flacompile.layers import MIXERS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "runtimes.md"
COLUMNS = {"onnx": 1, "executorch": 3}  # of prefill; that of decode is the next
KEEP_TOKENS = ("attn", "bitattn", "mla")


def errors(runtime: str, mixer: str, folder: Path) -> dict[str, float]:
    """Of prefill and decode; raises what the export raises."""
    case = llama(max_position_embeddings=8192, num_hidden_layers=1)()
    model = flacompile.finalize(flacompile.convert(case.model, mixer=mixer)).eval()
    max_length = 2048 if mixer in KEEP_TOKENS else None
    if runtime == "onnx":
        return flacompile.export_onnx(model, folder, max_length=max_length)["errors"]
    sys.path.insert(0, str(DOCS / "examples"))
    from pte import export_pte

    return export_pte(model, folder, max_length)


def write_row(mixer: str, column: int, cells: list[str]) -> None:
    """Puts the cells into the mixer's row."""
    lines = PAGE.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| `{mixer}` |"))
    row = lines[at].strip().strip("|").split("|")
    row[column : column + 2] = [f" {cell} " for cell in cells]
    lines[at] = f"|{'|'.join(row)}|\n"
    PAGE.write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=COLUMNS)
    parser.add_argument("mixers", nargs="*", metavar="MIXER", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for mixer in options.mixers or MIXERS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = errors(options.runtime, mixer, Path(folder) / "out")
                cells = [f"{found[name]:.0e}" for name in ("prefill", "decode")]
            except Exception as error:  # whatever a runtime says is the result
                reason = re.sub(r"\s+", " ", str(error)).replace("|", "\\|")[:120]
                cells = [f"{type(error).__name__}: {reason}"] * 2
        print(mixer, *cells, flush=True)
        write_row(mixer, COLUMNS[options.runtime], cells)
