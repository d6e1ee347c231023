"""The README's plot: what a sequence keeps, and how fast it goes on, against its length.

    python docs/context.py

Bytes follow from shapes: a model of one layer of SmolLM2-135M's shape runs some tokens, as it is
and converted, and its cache is weighed. Tokens/s are those of the table in export.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flacompile
from flacompile.evaluate.cost import cache_bytes

DOCS = Path(__file__).parent
PLOT = DOCS / "context.svg"
LAYERS = 30
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 128,  # no part of a cache
}
LENGTHS = [2**i for i in range(10, 21)]
SPEEDS = re.compile(r"^\| ([\d,]+)" + r" \| [\d,]+ MiB \| ([\d,.]+)/s" * 2 + r" \|$", re.M)


class Kept(NamedTuple):
    """Bytes of a sequence, all layers: of each token of a Transformer, or of a whole state."""

    per_token: int
    state: int


def kept(mixer: str = "gla", tokens: int = 64) -> Kept:
    """Weighs the caches of both models in bf16 after so many tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1)).bfloat16().eval()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        keys_and_values = cache_bytes(model(ids, use_cache=True).past_key_values)
        flacompile.convert(model, mixer, init="neutral")
        state = cache_bytes(model(ids, use_cache=True).past_key_values)
    return Kept(LAYERS * keys_and_values // tokens, LAYERS * state)


def speeds() -> list[tuple[int, float, float]]:
    """Context, and tokens/s after it of the package and of the Transformer it was made from."""
    rows = SPEEDS.findall((DOCS / "export.md").read_text())
    number = [[float(cell.replace(",", "")) for cell in row] for row in rows]
    return [(int(context), package, softmax) for context, package, softmax in number]


def caption(sizes: Kept) -> str:
    """The sentence under the plot."""
    million = 2**20
    return (
        f"a token costs the Transformer {sizes.per_token:,} bytes, "
        f"{sizes.per_token * million / 2**30:.1f} GiB after {million:,} tokens; "
        f"the converted model keeps {sizes.state / 2**20:.1f} MiB at any length"
    )


def description(sizes: Kept) -> str:
    """Everything that is drawn, which the file holds too."""
    return f"{caption(sizes)}; tokens/s {speeds()}"


def draw(sizes: Kept, path: Path) -> None:
    """Two panels, memory and speed, both axes logarithmic."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "context", "font.size": 10}
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    softmax = {"color": "#b3462f", "label": "Transformer"}
    ours = {"color": "#2f6db3", "label": "gla"}
    mebi = 2**20
    memory.plot(LENGTHS, [sizes.per_token * t / mebi for t in LENGTHS], **softmax)
    memory.plot(LENGTHS, [sizes.state / mebi for _ in LENGTHS], **ours)
    memory.set_title("kept for a sequence, MiB (SmolLM2-135M)")
    contexts, package, before = zip(*speeds(), strict=True)
    speed.plot(contexts, before, marker="o", **softmax)
    speed.plot(contexts, package, marker="o", **(ours | {"label": "simple_gla, package"}))
    speed.set_title("decoding, tokens/s (two narrow layers, CPU)")
    for axes in (memory, speed):
        axes.loglog()
        axes.set_xlabel("tokens of context")
        axes.set_xticks([2**10, 2**15, 2**20], ["1 Ki", "32 Ki", "1 Mi"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None, "Description": description(sizes)})


if __name__ == "__main__":
    sizes = kept()
    draw(sizes, PLOT)
    print(caption(sizes))
