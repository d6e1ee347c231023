"""A package of a tiny hybrid, for the tests of export and of the runners."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from models import llama
from torch import nn

import flacompile
from flacompile import hf
from flacompile.convert import build
from flacompile.layers import MIXERS
from flacompile.passes.find_attention import find_attention
from flacompile.passes.swap_attention import swap_attention


class Exported(NamedTuple):
    """A model, its package, what export returned and the stages it told of."""

    model: nn.Module
    path: Path
    facts: dict[str, Any]
    stages: list[str]


def converted(mixer: str = "simple_gla", **options: Any) -> nn.Module:
    """A two-layer Llama with grouped keys: a mixer, and softmax over keys kept in room for 1200."""
    case = llama(max_position_embeddings=8192)()
    return flacompile.convert(case.model, mixer=mixer, **({"keep": [1]} | options))


def mixed(model: nn.Module, mixers: Iterable[str]) -> nn.Module:
    """The model with another mixer in each of its first layers, ready to evaluate."""
    for site, name in zip(find_attention(model).sites, mixers, strict=False):
        mixer = build(MIXERS[name], MIXERS[name].config_for(site), model, site)
        swap_attention(model, site, mixer, hf.convention_of(model, site))
    return flacompile.finalize(model).eval()


def exported(folder: Path) -> Exported:
    """Three mixers, and softmax over keys kept in room for 1200. Takes minutes."""
    case = llama(max_position_embeddings=8192, num_hidden_layers=4)()
    model = mixed(case.model, ("simple_gla", "gated_deltanet", "mamba2"))
    path, stages = folder / "model.pt2", []
    facts = flacompile.export(model, path, max_length=1200, progress=stages.append)
    return Exported(model, path, facts, stages)
