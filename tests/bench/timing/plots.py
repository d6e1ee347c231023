"""Two pictures of the table: time over floor by op, and time against T beside softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .curves import crossing, curves, has_kernels
from .page import known_peers
from .results import key

STYLE = {"svg.hashsalt": "flacompile", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
SMALL = (8, 2048, 128)


def save(figure: Any, path: Path) -> None:
    """The same figures make the same file."""
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def over_floor(rows: list[dict[str, Any]], path: Path) -> None:
    """Over the memory floor at the small shape, the peer's calls as marks."""
    import matplotlib.pyplot as plt

    published = known_peers(rows)
    rows = [r for r in rows if r["kind"] == "ours" and (r["B"], r["T"], r["D"]) == SMALL]
    rows = [r for r in rows if has_kernels(r)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 3.5))
        ways = (("forward", "floor", -0.2), ("both", "floor both", 0.2))
        for color, (way, floor, shift) in enumerate(ways):
            label = "forward" if way == "forward" else "forward + backward"
            places = [i + shift for i in range(len(rows))]
            heights = [r[f"{way} kernels"] / r[floor] for r in rows]
            eager = [r[way] / r[floor] for r in rows]
            axes.bar(places, eager, 0.38, color=f"C{color}", alpha=0.3)
            axes.bar(places, heights, 0.38, color=f"C{color}", label=label)
            known = [(x, published[key(r)][way] / r[floor])
                     for x, r in zip(places, rows, strict=True) if key(r) in published]  # fmt: skip
            label = "flash-linear-attention, called from Python" if color == 0 else None
            axes.plot(*zip(*known, strict=True), "k_", markersize=11, label=label) if known else ()
        axes.set_xticks(range(len(rows)), [r["op"] for r in rows], rotation=35, ha="right")
        axes.set(yscale="log", ylabel="time / floor", ylim=1)
        axes.set_title("B 8, T 2048, H 16, K = V = 128; full: kernels, pale: called from Python")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
        save(figure, path)
        plt.close(figure)


def against_time(rows: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward at a constant number of tokens, and where each crosses softmax."""
    import matplotlib.pyplot as plt

    tokens, found = curves(rows)
    softmax = found.get("softmax", {})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4))
        for op, curve in found.items():
            line = {"color": "black", "linewidth": 2.5} if op == "softmax" else {"linewidth": 1.3}
            times = sorted(curve)
            (drawn,) = axes.plot(times, [curve[T] for T in times], "o-", ms=3, label=op, **line)
            at = None if op == "softmax" else crossing(curve, softmax)
            if at is not None:
                axes.axvline(at, color=drawn.get_color(), linestyle=":", linewidth=1)
        lengths = sorted({T for curve in found.values() for T in curve})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, lengths)
        axes.set(yscale="log", xlabel="T", ylabel="ms, forward + backward, kernels")
        axes.set_title(f"B T = {tokens}, H 16, K = V = 128; dotted: faster than softmax from here")
        if found:
            axes.legend(fontsize=8, ncols=2)
        save(figure, path)
        plt.close(figure)
