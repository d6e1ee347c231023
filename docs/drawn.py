"""Draws the graph of a block before and after its conversion: ``passes.svg``, for pass.md.

    python docs/drawn.py

Nodes are those of the two graphs, a row for each step from the input; what the pass takes out is
red, what it puts in is blue.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from torch.fx import Graph, Node

import flacompile

PLOT = Path(__file__).parent / "passes.svg"
WIDTH, ROW, APART, BOX = 460, 46, 130, (118, 28)
KEPT, OUT, IN = "#777777", "#b3462f", "#2f6db3"


class Block(nn.Module):
    """Attention of four heads inside a residual, behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (i.unflatten(-1, (4, 16)).transpose(1, 2) for i in qkv)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(o.transpose(1, 2).flatten(2))


def graphs(mixer: str = "gla") -> tuple[Graph, Graph]:
    """What torch.export sees of a block, and what ``convert`` makes of it."""
    torch.manual_seed(0)
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = export(Block(), (torch.randn(2, 32, 64),), dynamic_shapes=sizes)
    before = program.module().graph
    return before, flacompile.convert(program, mixer, init="neutral").graph


def label(node: Node) -> str:
    """The operator or the module, as a reader knows it."""
    if node.op in ("placeholder", "output"):
        return "x" if node.op == "placeholder" else "y"
    name = str(node.target) if node.op == "call_module" else getattr(node.target, "__name__", "")
    return name.split(".")[0].replace("scaled_dot_product_attention", "softmax attention")


def steps(graph: Graph) -> dict[Node, int]:
    """The row of each node that makes y of x: how many come before it."""
    found: dict[Node, int] = {}
    for node in graph.nodes:
        above = [found[n] for n in node.all_input_nodes if n in found]
        if (node.op == "placeholder" or above) and (node.users or node.op == "output"):
            found[node] = 1 + max(above, default=-1)
    return found


def column(graph: Graph, other: Graph, colour: str, left: int) -> list[str]:
    """The boxes and lines of a graph; what the other one lacks has the colour."""
    rows, shared = steps(graph), {label(n) for n in steps(other)}
    shared -= {"linear"}  # the projections are the attention's, in the mixer afterwards
    places: dict[Node, tuple[int, int]] = {}
    for row in set(rows.values()):
        beside = [n for n in rows if rows[n] == row]
        for i, node in enumerate(beside):
            offset = (2 * i + 1 - len(beside)) * APART // 2
            places[node] = (left + WIDTH // 2 + offset, 40 + row * ROW)
    lines, boxes = [], []
    for node, (x, y) in places.items():
        stroke = KEPT if label(node) in shared else colour
        boxes.append(
            f'<rect x="{x - BOX[0] // 2}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="5" '
            f'fill="white" stroke="{stroke}"/><text x="{x}" y="{y + 19}">{label(node)}</text>'
        )
        for above in (n for n in node.all_input_nodes if n in places):
            top, bottom = places[above], (x, y)
            bend = 280 if rows[node] - rows[above] > 1 else 0  # around what is between
            start, end = (top[0], top[1] + BOX[1]), bottom
            lines.append(
                f'<path d="M{start[0]} {start[1]} C{start[0] + bend} {start[1] + 16} '
                f'{end[0] + bend} {end[1] - 16} {end[0]} {end[1]}" fill="none" stroke="#aaaaaa"/>'
            )
    return lines + boxes


def draw(before: Graph, after: Graph) -> str:
    """Both, side by side, as an SVG image."""
    height = 40 + ROW * (1 + max(steps(before).values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {height}" '
        'font-family="sans-serif" font-size="13" text-anchor="middle">',
        f'<rect width="{2 * WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{WIDTH // 2}" y="22">as torch.export sees the block</text>',
        f'<text x="{WIDTH * 3 // 2}" y="22">after flacompile.convert(program, "gla")</text>',
        *column(before, after, OUT, 0),
        *column(after, before, IN, WIDTH),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PLOT.write_text(draw(*graphs()))
