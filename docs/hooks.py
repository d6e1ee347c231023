"""The table of mixers, from the registry: replaces ``<!-- mixers -->`` in a page."""

from __future__ import annotations

import inspect
import re
import sys

import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flacompile.layers import MIXERS, Mixer

WIDTH, LENGTH = 2048, 32768
SOFTMAX = {  # torch counts its softmax attention on a GPU alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)
    )
}
ARXIV = re.compile(r"\(([^()]*), arXiv (\d{4}\.\d{4,5})\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for every page."""
    return (
        markdown.replace("<!-- mixers -->", table()) if "<!-- mixers -->" in markdown else markdown
    )


def table() -> str:
    """One row a mixer: equation, paper, state after LENGTH tokens, what a token costs, lines."""
    rows = [
        "| name, class | equation | paper | state of a layer | of `attn`'s | training | decoding "
        "| lines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys_and_values = costs(MIXERS["attn"])[0]
    for name, cls in sorted(MIXERS.items()):
        module = sys.modules[cls.__module__]
        doc, lines = module.__doc__ or "", len(inspect.getsource(module).splitlines())
        state, flops, traffic = costs(cls)
        rows.append(
            f"| `{name}`<br>`{cls.__name__}` | `{equation(doc)}` | {paper(doc)} "
            f"| {size(state)} | {100 * state / keys_and_values:.3g} % "
            f"| {flops / 1e6:,.0f} MFLOP | {size(traffic)} | {lines} |"
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


def costs(cls: type[Mixer]) -> tuple[int, float, int]:
    """Of one layer at WIDTH and its other defaults, bf16 weights, after LENGTH tokens.

    Nothing is computed: shapes alone tell.

    Returns:
        Bytes of the state; floating-point operations a token of a forward and backward over
        LENGTH tokens; bytes that decoding one token reads and writes, weights included.
    """
    mixer = cls(cls.Config(hidden_size=WIDTH)).bfloat16()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False, custom_mapping=SOFTMAX)
    with torch.no_grad(), fake, counter:
        _, state = mixer(torch.zeros(1, LENGTH, WIDTH, dtype=torch.bfloat16))
        weights = sum(p.nbytes for p in mixer.parameters())
        held = sum(x.nbytes for x in pytree.tree_leaves(state))
    rewritten = sum(x.nbytes for x in pytree.tree_leaves(getattr(state, "recurrent", ())))
    flops = 3 * counter.get_total_flops() / LENGTH
    return held, flops, weights + held + rewritten


def size(count: int) -> str:
    """Bytes, rounded to what a reader needs."""
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"
