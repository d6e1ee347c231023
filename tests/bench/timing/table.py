"""Rows of figures as lines of a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = (
    "op", "B x T", "error", "fwd", "kernels", "/ floor", "fwd+bwd", "kernels", "/ floor",
    "of copy", "of matmul", "MiB", "peer / ours",
)  # fmt: skip
COLD = ("op", "first call s", "other shapes s")
DECODE = ("op", "error", "ms", "floor", "/ floor")
CPU = ("op", "B x T", "error", "first call s", "ms", "token loop ms", "times as fast")


def head(cells: Sequence[str] = HEAD) -> str:
    return f"| {' | '.join(cells)} |\n{'|---' * len(cells)}|"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(x: Any, form: str) -> str:
    """A figure; a text, such as an error's name, as it is; nothing for None."""
    return "" if x is None else x if isinstance(x, str) else format(x, form)


def over(time: Any, floor: float) -> float | None:
    """How many times the floor; None where the time is no number."""
    return None if isinstance(time, str) or time is None else time / floor


def shares(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Of the copy's and of the matmul's speed, the kernels of forward and backward.

    A backward counts as two forwards' operations; matmul is in TFLOP/s.
    """
    time = row["both kernels"]
    if isinstance(time, str):
        return None, None
    share = 3 * row["flops"] / time / 1e9 / row["matmul"] if row["flops"] else None
    return row["floor both"] / time, share


def label(row: dict[str, Any]) -> str:
    """The op, and whose or how it is made where that is not ours called plainly."""
    return row["op"] if row["kind"] == "ours" else f"{row['op']}, {row['kind']}"


def factors(row: dict[str, Any], peer: dict[str, Any]) -> list[float]:
    """The peer's forward, forward and backward and memory over ours, called plainly."""
    return [peer[way] / row[way] for way in ("forward", "both", "MiB")]


def ratios(row: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """``factors`` in a cell, or the row's own remark."""
    if peer is None or row["kind"] == "peer":
        return row.get("note", "")
    return ", ".join(f"{factor:.1f}" for factor in factors(row, peer))


def speed(row: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """A line under HEAD, or what is wrong with the row."""
    start = [label(row), f"{row['B']} x {row['T']}"]
    if "wrong" in row:
        return line([*start, row["wrong"]])
    cells = [number(row["error"], ".1e")]
    for way, floor in (("forward", row["floor"]), ("both", row["floor both"])):
        kernels = row[f"{way} kernels"]
        cells += [number(row[way], ".3f"), number(kernels, ".3f")]
        cells += [number(over(kernels, floor), ".1f")]
    copy, matmul_share = shares(row)
    cells += [number(copy, ".0%"), number(matmul_share, ".1%"), number(row["MiB"], ".0f")]
    return line([*start, *cells, ratios(row, peer)])


def cold(label: str, row: dict[str, Any]) -> str:
    """A line under COLD."""
    if "error" in row:
        return line([label, row["error"]])
    return line([label, *(number(row.get(name), ".1f") for name in ("first", "others"))])


def decode(row: dict[str, Any]) -> str:
    """A line under DECODE."""
    if "wrong" in row:
        return line([row["op"], row["wrong"]])
    cells = [number(row["error"], ".1e"), *(number(row[x], ".4f") for x in ("ms", "floor"))]
    return line([row["op"], *cells, number(row["ms"] / row["floor"], ".2f")])


def cpu(row: dict[str, Any]) -> str:
    """A line under CPU."""
    start = [row["op"], f"{row['B']} x {row['T']}"]
    if "wrong" in row:
        return line([*start, row["wrong"]])
    times = (number(row[name], ".1f") for name in ("first", "ms", "loop ms"))
    cells = [number(row["error"], ".1e"), *times, number(row["loop ms"] / row["ms"], ".1f")]
    return line([*start, *cells])
