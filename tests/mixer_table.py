"""The README's table of what works: every mixer, and the tests and figures that say so.

A mark is no claim of its own. It stands where a test of the column runs for the mixer, or where a
page of the documentation has the figure; ``python tests/mixer_table.py`` writes the table again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import test_mixers
import test_quantize_models
import torch
from mixer_inputs import draw
from torch.utils._python_dispatch import TorchDispatchMode

from flacompile.layers import MIXERS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLE = re.compile(r"(?<=<!-- what works -->\n).*?(?=<!-- end -->)", re.DOTALL)
TESTED: dict[str, Callable[..., None]] = {
    "train": test_mixers.test_textbook,
    "compile": test_mixers.test_compiled_is_eager,
    "export": test_mixers.test_export_is_eager,
    "CPU": test_mixers.test_textbook_fp32,
    "packed": test_mixers.test_packed_is_separate,
    "low bit": test_quantize_models.test_every_mixer,
}
COLUMNS = ("train", "compile", "export", "CPU", "CUDA", "packed", "low bit", "convert")


def tested(test: Callable[..., None]) -> set[str]:
    """The mixers that a test is run for."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return {getattr(case, "values", (case,))[0] for case in mark.args[1]}


class Ops(TorchDispatchMode):
    """Notes which of our ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "flacompile":
            self.names.add(name.split(".")[0].removesuffix("_forward"))
        return func(*args, **(kwargs or {}))


def kernels(name: str) -> str:
    """The ops a mixer calls; on a GPU all of them are kernels of which docs/ops.md has errors."""
    with Ops() as ops, torch.no_grad():
        test_mixers.build(name, dtype=torch.float32)(draw(1, 9, torch.float32))
    page = (ROOT / "docs" / "ops.md").read_text()
    measured = set(re.findall(r"^\| `(\w+)` \| (?:bfloat16|float16|float32) \|", page, re.M))
    missing = ops.names - measured
    return "—" if missing else ", ".join(f"`{op}`" for op in sorted(ops.names)) or "PyTorch's"


def converted() -> dict[str, str]:
    """What docs/convert.md says of each mixer in a Llama."""
    lines = [line.split(" | ") for line in (ROOT / "docs" / "convert.md").read_text().splitlines()]
    names = next(cells for cells in lines if cells[0] == "| model" and "`gla`" in cells)
    marks = next(cells for cells in lines if cells[0] == "| `llama`" and len(cells) == len(names))
    return {name.strip("`| "): mark.strip("| ") for name, mark in zip(names, marks, strict=True)}


def shares() -> dict[str, str]:
    """What each mixer keeps of the teacher, by the table of docs/convert.md."""
    page = (ROOT / "docs" / "convert.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(?: [\d.]+ \|){4} ([\d.]+) \|$", page, re.M)
    return {name: f"{float(share):.2f}" for name, share in rows}


def table() -> str:
    """All rows, between the README's marks."""
    by_column = {column: tested(test) for column, test in TESTED.items()}
    marks, kept = converted(), shares()
    lines = ["| mixer | " + " | ".join(COLUMNS) + " | share closed |"]
    lines += ["|" + " --- |" * (len(COLUMNS) + 2)]
    for name in sorted(MIXERS):
        cells = {column: "✓" if name in names else "—" for column, names in by_column.items()}
        cells |= {"CUDA": kernels(name), "convert": marks[name]}
        row = [f"`{name}`", *(cells[column] for column in COLUMNS), kept.get(name, "")]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), README.read_text()))
