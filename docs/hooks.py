"""The table of mixers, from the registry: replaces ``<!-- mixers -->`` in a page."""

from __future__ import annotations

import re
import sys

import torch
from torch.utils import _pytree as pytree

from flacompile.layers import MIXERS, Mixer

WIDTH, HEADS, LENGTH = 2048, 16, 32768
ARXIV = re.compile(r"\(([^()]*), arXiv (\d{4}\.\d{4,5})\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for every page."""
    return (
        markdown.replace("<!-- mixers -->", table()) if "<!-- mixers -->" in markdown else markdown
    )


def table() -> str:
    """One row a mixer: name, class, equation, paper, bytes of its state after LENGTH tokens."""
    rows = ["| name | class | equation | paper | state of a layer |", "|---|---|---|---|---|"]
    for name, cls in sorted(MIXERS.items()):
        doc = sys.modules[cls.__module__].__doc__ or ""
        rows.append(
            f"| `{name}` | `{cls.__name__}` | `{equation(doc)}` | {paper(doc)} "
            f"| {size(state_bytes(cls))} |"
        )
    return "\n".join(rows)


def equation(doc: str) -> str:
    """The first line of a module's docstring that states the recurrence."""
    line = next(line for line in doc.splitlines()[1:] if " = " in line)
    return re.split(r"\s{4,}", line.strip())[0].replace("|", "\\|")


def paper(doc: str) -> str:
    """Authors and year, linked; a dash where the docstring cites none."""
    found = ARXIV.search(doc)
    return f"[{found[1]}](https://arxiv.org/abs/{found[2]})" if found else "—"


def state_bytes(cls: type[Mixer]) -> int:
    """Bytes of the state of one sequence of LENGTH tokens, weights in bf16."""
    with torch.no_grad():
        mixer = cls(cls.Config(hidden_size=WIDTH, num_heads=HEADS)).bfloat16()
        one, two = (
            sum(x.nbytes for x in pytree.tree_leaves(mixer(x)[1]))
            for x in (torch.zeros(1, time, WIDTH, dtype=torch.bfloat16) for time in (1, 2))
        )
    return one + (two - one) * (LENGTH - 1)


def size(count: int) -> str:
    """Bytes, rounded to what a reader needs."""
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"
