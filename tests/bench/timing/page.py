"""Text of the page of results, from the figures of one or more runs."""

from __future__ import annotations

import re
from itertools import product
from statistics import geometric_mean
from typing import Any

from . import table
from .curves import crossing, curves
from .results import PUBLISHED, Key, key, peers

SHAPES = ((8, 2048), (1, 32768), (1, 131072))  # of the tables; others are points of the curves
PICTURES = {
    "over_floor": "![time over floor of every op](img/over_floor.svg)",
    "against_time": "![time against T, beside softmax](img/against_time.svg)",
}
Parts = dict[str, list[dict[str, Any]]]


def merged(files: list[dict[str, Any]]) -> Parts:
    """Rows by part; those of later files replace the same ones, ``header`` lists every run."""
    found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for file in files:
        for part, rows in file.items():
            if part == "header":
                continue
            for row in rows:
                same = tuple(row.get(name) for name in ("op", "kind", "B", "T", "D"))
                found.setdefault(part, {})[same] = row
    parts = {part: list(rows.values()) for part, rows in found.items()}
    return parts | {"header": [file["header"] for file in files]}


def origin(headers: list[dict[str, Any]]) -> str:
    """Where the figures are from, a line a run."""
    lines = []
    for header in headers:
        packages = ", ".join(f"{name} {text}" for name, text in header["versions"].items())
        at = f"commit {header['commit'] or 'unknown'}, {header['date']}"
        ceilings = [f"{header[x]:.3g} {x.split()[1]} {x.split()[0]}"
                    for x in ("copy TB/s", "matmul TFLOP/s") if x in header]  # fmt: skip
        more = [f"{header['threads']} threads"] if "threads" in header else ceilings
        where = ", ".join((header["device"], at, packages, *more))
        lines.append(f"- {where}: `{header['command']}`")
    return "\n".join(lines)


def known_peers(rows: list[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    """The peer's rows of the same run, else the published ones."""
    timed = {key(row): row for row in rows if row["kind"] == "peer" and "wrong" not in row}
    return peers(PUBLISHED)[1] | timed


def speed_tables(parts: Parts) -> str:
    """A table for each head dimension and shape, with the means of what the peer takes."""
    published, tables = known_peers(parts["speed"]), []
    for dim, shape in product(sorted({row["D"] for row in parts["speed"]}, reverse=True), SHAPES):
        rows = [r for r in parts["speed"] if (r["D"], r["B"], r["T"]) == (dim, *shape)]
        if not rows:
            continue
        head = f"B = {shape[0]}, T = {shape[1]}, K = V = {dim}:\n\n{table.head()}"
        lines = [table.speed(row, published.get(key(row))) for row in rows]
        tables.append("\n".join([head, *lines, *means(rows, published)]))
    if not any(row["kind"] == "peer" for row in parts["speed"]):
        tables.append(f"The peer's figures are those of {peers(PUBLISHED)[0]}.")
    return "\n\n".join(tables)


def means(rows: list[dict[str, Any]], published: dict[Key, dict[str, Any]]) -> list[str]:
    """The geometric means of peer / ours, as a paragraph; none where no row has the peer's."""
    known = [table.factors(r, published[key(r)]) for r in rows
             if r["kind"] == "ours" and "wrong" not in r and key(r) in published]  # fmt: skip
    if not known:
        return []
    texts = ", ".join(f"{geometric_mean(x):.2f}" for x in zip(*known, strict=True))
    return ["", f"Geometric mean of peer / ours over {len(known)} ops: {texts}."]


def crossings(rows: list[dict[str, Any]]) -> str:
    """Milliseconds by T of every op, and from which T it is faster than softmax."""
    tokens, found = curves(rows)
    softmax, lengths = found["softmax"], sorted({T for curve in found.values() for T in curve})
    columns = ("op", *(f"T = {T}" for T in lengths), "faster than softmax from T")
    lines = [f"ms of forward and backward (kernels) at B T = {tokens}:\n", table.head(columns)]
    for op, curve in found.items():
        at, first = crossing(curve, softmax), min(curve.keys() & softmax.keys(), default=0)
        text = "none of these" if at is None else f"{at:.0f}" if at > first else f"{first} or less"
        times = (table.number(curve.get(T), ".3f") for T in lengths)
        lines.append(table.line([op, *times, "" if op == "softmax" else text]))
    return "\n".join(lines)


def sections(parts: Parts) -> dict[str, str]:
    """Text by the name of its place in the page."""
    found = {"origin": origin(parts["header"])}
    if "speed" in parts:
        found |= {"speed": speed_tables(parts), "plots": PICTURES["over_floor"]}
        if "softmax" in curves(parts["speed"])[1]:
            found["crossing"] = f"{PICTURES['against_time']}\n\n{crossings(parts['speed'])}"
    if "cold" in parts:
        rows = sorted(parts["cold"], key=lambda row: row["op"])
        found["cold"] = "\n".join([table.head(table.COLD), *(table.cold(r["op"], r) for r in rows)])
    for part, columns in (("decode", table.DECODE), ("cpu", table.CPU)):
        if part in parts:
            lines = [getattr(table, part)(row) for row in parts[part]]
            found[part] = "\n".join([table.head(columns), *lines])
    return found


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with each text between its markers."""
    for name, text in texts.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"page: expected <!-- {name} --> and <!-- end -->, got neither")
        page = place.sub(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page)
    return page
