"""Time against T, and where one curve goes below another."""

from __future__ import annotations

import math
from typing import Any

Curve = dict[int, float]


def crossing(a: Curve, b: Curve) -> float | None:
    """The T from which a is below b, between two measured ones by lines in log T and log ms.

    The smallest T that both have, where a is below b from there on; None where it never is.
    """
    points = [(math.log(T), math.log(a[T] / b[T])) for T in sorted(a.keys() & b.keys())]
    if not points or points[-1][1] >= 0:
        return None
    above = [i for i, (_, gap) in enumerate(points) if gap >= 0]
    if not above:
        return math.exp(points[0][0])
    (x, gap), (after, next_gap) = points[above[-1]], points[above[-1] + 1]
    return math.exp(x + (after - x) * gap / (gap - next_gap))


def curves(rows: list[dict[str, Any]]) -> tuple[int, dict[str, Curve]]:
    """The number of tokens B T with the most lengths T, and ms of forward and backward by T."""
    timed = [r for r in rows if r["kind"] == "ours" and r["D"] == 128 and has_kernels(r)]
    lengths: dict[int, set[int]] = {}
    for row in timed:
        lengths.setdefault(row["B"] * row["T"], set()).add(row["T"])
    if not lengths:
        return 0, {}
    tokens = max(lengths, key=lambda n: (len(lengths[n]), n))
    found: dict[str, Curve] = {}
    for row in timed:
        if row["B"] * row["T"] == tokens:
            found.setdefault(row["op"], {})[row["T"]] = row["both kernels"]
    return tokens, {op: curve for op, curve in found.items() if len(curve) > 1}


def has_kernels(row: dict[str, Any]) -> bool:
    """Whether the row has the times of kernels."""
    return all(isinstance(row.get(f"{way} kernels"), float) for way in ("forward", "both"))
