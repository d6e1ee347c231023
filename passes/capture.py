"""Run a model once eagerly and once as a graph, and leave it as it was."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

Values = dict[Node, Any]


@dataclass(frozen=True)
class ModuleCall:
    """One eager call of a module: what went in and what came out, and which call it was."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    times: int = 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's own mode is put back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def switch_to_sdpa(model: nn.Module) -> str | None:
    """Makes a transformers model use scaled_dot_product_attention; says what it did, or None.

    Only that form shows as one node in a graph; eager attention shows as a softmax.
    """
    current = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if current in ("sdpa", None) or not getattr(model, "_supports_sdpa", False):
        return None
    model.set_attn_implementation("sdpa")
    return f"switched from {current} to sdpa"


@contextmanager
def with_sdpa(model: nn.Module) -> Iterator[str | None]:
    """switch_to_sdpa for the time of a capture.

    So are experts that are called one by one, as the router's numbers tell, which no graph can.
    """
    config = getattr(model, "config", None)
    current = getattr(config, "_attn_implementation", None)
    one_by_one = getattr(config, "_experts_implementation", None) == "eager"
    one_by_one = one_by_one and hasattr(model, "set_experts_implementation")
    note = switch_to_sdpa(model)
    if one_by_one:
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    try:
        yield note
    finally:
        if one_by_one:
            model.set_experts_implementation("eager")  # type: ignore[operator]
        if note:
            model.set_attn_implementation(current)


def text_config(model: nn.Module) -> Any:
    """The config of what reads tokens in a transformers model, which may read images too."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def default_ids(model: nn.Module, batch: int, time: int) -> Tensor:
    """Token ids [batch, time] for a model that has config.vocab_size; the same at every call."""
    vocab = getattr(text_config(model), "vocab_size", None)
    if vocab is None:
        raise ValueError(
            "example_inputs: expected the inputs of one forward call, as the model has no "
            "config.vocab_size, got none; give them as a tuple, or as a dict of keywords"
        )
    ids = torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """kwargs plus use_cache=False where the model's forward knows it, or passes it on."""
    parameters = inspect.signature(model.forward).parameters
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "use_cache" in parameters or (passes_on and hasattr(text_config(model), "use_cache")):
        return {"use_cache": False, **kwargs}
    return dict(kwargs)


def example_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """args and kwargs of one call of the model: ids [2, 16] if none are given, and no cache."""
    if not args and not kwargs:
        args = (default_ids(model, 2, 16),)
    return args, without_cache(model, kwargs)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """Non-strict torch.export of an evaluating model; parameters are get_attr nodes by name."""
    program = torch.export.export(model, args, kwargs, strict=False)
    return program.module(check_guards=False)


def record_calls(
    model: nn.Module, paths: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, ModuleCall]:
    """Runs the model once; the last call of each module in `paths`."""
    calls: dict[str, ModuleCall] = {}

    def hook_for(path: str) -> Any:
        """The hook on the module at this path."""

        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            """Keeps this call and counts it."""
            times = calls[path].times + 1 if path in calls else 1
            calls[path] = ModuleCall(args, dict(kwargs), result, times)

        return hook

    modules = dict(model.named_modules())
    handles = [
        modules[path].register_forward_hook(hook_for(path), with_kwargs=True)
        for path in paths
        if path in modules
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Recorder(Interpreter):
    """Keeps the values of the wanted nodes, drops the others as soon as they are used."""

    def __init__(self, gm: GraphModule, wanted: set[Node]):
        super().__init__(gm)
        self.wanted = wanted
        self.values: Values = {}

    def run_node(self, n: Node) -> Any:
        """The node's value, kept where it is wanted."""
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def record_values(
    gm: GraphModule, wanted: set[Node], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Values:
    """Runs the captured graph once and returns the values of the wanted nodes."""
    recorder = _Recorder(gm, wanted)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    recorder.run(*leaves, enable_io_processing=False)
    return recorder.values


def known_inputs(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
    """Values of all nodes that are not computed: inputs, parameters and buffers."""
    leaves = iter(torch.utils._pytree.tree_leaves((args, kwargs)))
    values: Values = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(leaves)
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(gm)
    return values


def evaluate(target: Node, values: Values, known: Values) -> Any:
    """The value of `target` as a function of `known`, all other inputs as recorded."""
    memo: Values = dict(known)

    def value_of(node: Node) -> Any:
        """Recorded, known, or computed from its inputs; each once."""
        if node not in memo:
            if node in values:
                memo[node] = values[node]
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
                memo[node] = node.target(*args, **kwargs)
        return memo[node]

    return value_of(target)
