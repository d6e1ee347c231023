"""What is exported: one step of a language model over explicit states, for any number of tokens.

Every attention is a mixer while it is traced. One that a conversion kept, or of a model that was
not converted at all, is replaced for that time by ``attn``, which is the same attention over a
state that has room for a given number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from flacompile import hf
from flacompile.convert import build
from flacompile.layers import Attention, Mixer
from flacompile.layers.cache import CachedMixer
from flacompile.ops.chunked import CHUNK
from flacompile.ops.prefix import FANOUT
from flacompile.ops.validate import expect
from flacompile.passes.decompose import decompose
from flacompile.passes.find_attention import find_attention
from flacompile.passes.swap_attention import restore_attention, routed, swap_attention, swapped

NAMES = ("prefill", "decode")
SPAN = CHUNK * FANOUT  # tokens that one fold of the CPU form covers


class Step(nn.Module):
    """(ids [B, T], every tensor of the states) -> (logits of the last token, the next ones)."""

    def __init__(self, model: nn.Module, max_length: int | None) -> None:
        super().__init__()
        self.model, self.max_length = model, max_length
        named, self.layout = pytree.tree_flatten_with_path(self._states())
        self.names = [_name(path) for path, _ in named]
        self.empty = [x for _, x in named]

    def forward(self, ids: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """ids [B, T], the leaves of the states -> logits [B, vocabulary], the next leaves."""
        states = pytree.tree_unflatten(list(leaves), self.layout)
        time = torch.arange(ids.shape[1], device=ids.device)
        position = states[0].position[:, None] + time
        logits, states = hf.run_with_states(self.model, ids, position, states)
        return logits, *pytree.tree_leaves(states)

    def begin(self, batch_size: int) -> tuple[Tensor, ...]:
        """Every tensor of the states before the first token: zeros."""
        return tuple(x.new_zeros(batch_size, *x.shape[1:]) for x in self.empty)

    def _states(self) -> list[Any]:
        if is_own(self.model):
            blocks: Any = self.model.base_model.layers  # type: ignore[union-attr]
            return [block.init_state(1, self._begin) for block in blocks]
        layers: list[Any] = list(swapped(self.model).values())
        layers.sort(key=lambda layer: layer.convention.layer)
        return [self._begin(layer.mixer, 1) for layer in layers]

    def _begin(self, mixer: Mixer, batch_size: int) -> Any:
        if not isinstance(mixer, CachedMixer) or mixer.keeps_size:
            return mixer.init_state(batch_size)
        name = type(mixer).__name__
        expect(
            self.max_length is not None, "max_length",
            f"a number of tokens, as {name} keeps every token", None,
        )  # fmt: skip
        assert self.max_length is not None
        return mixer.init_room(batch_size, self.max_length)


@contextmanager
def all_mixers(model: nn.Module) -> Iterator[None]:
    """Inside the block every attention of a transformers model is a mixer, and takes no padding.

    Raises:
        ValueError: an attention that cannot be proved.
    """
    kept = []
    try:
        if not is_own(model):
            kept = _replace_kept(model)
        with routed(model, "mixer"), hf.unpadded(model):
            yield
    finally:
        for path in kept:
            restore_attention(model, path)


def is_own(model: nn.Module) -> bool:
    """Whether it is one of ``flacompile.lm``, which is made of mixers."""
    return hasattr(getattr(model, "config", None), "kind")


def trace(
    model: nn.Module, max_length: int | None = None, names: Sequence[str] = NAMES
) -> dict[str, ExportedProgram]:
    """``prefill`` for any B and T and ``decode`` for T = 1, with our ops opened.

    Args:
        model: in evaluation mode, inside ``all_mixers``.
        max_length: tokens that a state has room for where it keeps every token.
        names: the programs wanted.
    """
    step = Step(model, max_length)
    return {name: decompose(capture(step, name)) for name in names}


def capture(step: Step, name: str) -> ExportedProgram:
    """The program of that name, in which each of our ops is one node.

    A number of chunks that is one in the example would be specialised inside an op's body, where
    export does not look. So the example has more than two of the largest spans that the CPU form
    folds. On a GPU kernels are tried out on the example, which then has to fit into the states.
    Every example is contiguous.
    """
    device, states = step.empty[0].device, step.begin(2)
    time = SPAN * 3 - 70 if name == "prefill" else 1
    if device.type == "cuda" and step.max_length is not None:
        time = min(time, step.max_length)
    ids = torch.ones(2, time, dtype=torch.long, device=device)
    sizes = {0: Dim.DYNAMIC} | ({1: Dim.DYNAMIC} if name == "prefill" else {})
    shapes = (sizes, tuple({0: Dim.DYNAMIC} for _ in states))
    return torch.export.export(step, (ids, states), dynamic_shapes=shapes)


def _replace_kept(model: nn.Module) -> list[str]:
    """Puts ``attn`` where an attention stands; their paths."""
    config: Any = model.config
    missing = config.num_hidden_layers - len(swapped(model))
    if not missing:
        return []
    with routed(model, "zero"):  # of the mixers none is looked into
        findings = find_attention(model)
    sites = [site for site in findings.sites if site.inline is None]
    if len(sites) != missing:
        reasons = "".join(f"\n  {x.path}: {x.reason}" for x in findings.rejected)
        raise ValueError(
            f"model: expected a mixer or a causal attention that can be proved in each of "
            f"{config.num_hidden_layers} layers, got neither in {missing - len(sites)}{reasons}"
        )
    for site in sites:
        mixer = build(Attention, Attention.config_for(site), model, site)
        swap_attention(model, site, mixer.eval(), hf.convention_of(model, site))
    return [site.path for site in sites]


def _name(path: tuple[Any, ...]) -> str:
    """ "3.recurrent.0", of layer 3."""
    return ".".join(str(getattr(key, "idx", getattr(key, "name", key))) for key in path)
