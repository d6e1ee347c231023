"""A backend of torch.compile that swaps attention inside the compiler.

    torch.compile(model, backend="flacompile", options={"mixer": "linear_attn"})

Every causal ``scaled_dot_product_attention`` that Dynamo captures becomes a linear mixing of its
own q, k and v; Inductor compiles the result. The model stays as it is and gets no parameters: here
are the mixers whose recurrence needs q, k and v alone. Calls that are bidirectional or masked
otherwise, have an active dropout, or more keys than queries (decoding from a cache) stay softmax,
and a warning counts them.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from flacompile import ops
from flacompile.blocks import feature_map as feature_map_of
from flacompile.layers.based import taylor_weights
from flacompile.layers.rebased import square_weights
from flacompile.ops.heads import repeat_heads
from flacompile.ops.validate import expect
from flacompile.passes.masks import allowed, window_of
from flacompile.passes.outline import behind
from flacompile.passes.structure import AttentionArgs
from flacompile.passes.walk import NotProvable

ATTENTION = torch.nn.functional.scaled_dot_product_attention  # as Dynamo calls it

EPS = 1e-10  # added to sums of weights

log = logging.getLogger(__name__)


def linear_attn(q: Tensor, k: Tensor, v: Tensor, scale: float, feature_map: str = "elu") -> Tensor:
    """o_t = Σ φ(q_t)·φ(k_s) v_s / Σ φ(q_t)·φ(k_s), s <= t; a factor on the products cancels.

    The sum of the weights belongs to a channel of ones in v.
    """
    phi, _ = feature_map_of(feature_map, q.shape[-1])
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    o, _ = ops.linear_attn(phi(q), phi(k), v, scale=1.0)
    return o[..., :-1] / (o[..., -1:] + EPS)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, scale: float, decay: str = "retention") -> Tensor:
    """o_t = scale Σ e^(g (t - s)) q_t·k_s v_s, s <= t, with a fixed g for each head."""
    heads = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    g = DECAYS[decay](heads, q.shape[2]).expand(q.shape[:3])
    return ops.linear_attn(scale * q, k, v, g, scale=1.0)[0]


def based(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """o_t = Σ (1 + a + a²/2) v_s / Σ (1 + a + a²/2), a = scale q_t·k_s, s <= t."""
    return ops.quadratic_attn(q, k, v, weights=taylor_weights(scale), eps=EPS)[0]


def rebased(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """o_t = Σ (2 + a)² v_s / Σ (2 + a)², a = scale q_t·k_s, s <= t."""
    return ops.quadratic_attn(q, k, v, weights=square_weights(scale, 2.0), eps=EPS)[0]


DECAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "retention": lambda h, count: torch.log1p(-(2.0 ** (-5 - h))),  # Sun et al. 2023
    "alibi": lambda h, count: -(2.0 ** (-8 * (h + 1) / count)),  # slopes of Press et al. 2022
}
MIXINGS: dict[str, Callable[..., Tensor]] = {
    "based": based,
    "linear_attn": linear_attn,
    "rebased": rebased,
    "simple_gla": simple_gla,
}
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_attn": {"feature_map": ("dpfp", "elu", "relu")},
    "simple_gla": {"decay": tuple(DECAYS)},
}


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    *,
    mixer: str,
    choices: dict[str, str],
) -> Tensor:
    """What stands in a graph where causal ``scaled_dot_product_attention`` stood.

    Args:
        query: [B, H, T, K].
        key: [B, H_kv, T, K]; H is a multiple of H_kv.
        value: [B, H_kv, T, V].
        scale: factor on q·k; None is K^-0.5.
        mixer: a name in MIXINGS.
        choices: its options, by name.

    Returns:
        o [B, H, T, V].
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return MIXINGS[mixer](q, k, v, scale, **choices).transpose(1, 2)


def flacompile(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend: swaps attention, and hands the graph to Inductor.

    Args:
        gm: what Dynamo captured.
        example_inputs: of the graph.
        options: "mixer", a name in MIXINGS, and its choices: "feature_map" ("elu", "relu",
            "dpfp") of linear_attn, "decay" ("retention", "alibi") of simple_gla. Others are
            Inductor's.

    Raises:
        ValueError: no mixer, an unknown one or an option that nobody knows.
    """
    from torch._inductor.compile_fx import compile_fx

    mixer, choices, inductor = read_options(options or {})
    swap_calls(gm, mixer, choices)
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=inductor)
    return compiled


def read_options(options: dict[str, Any]) -> tuple[str, dict[str, str], dict[str, Any]]:
    """(mixer, its choices, Inductor's options) of valid options."""
    from torch._inductor import list_options

    mixer = str(options.get("mixer"))
    wanted = f"one of {', '.join(MIXINGS)}, which have nothing to learn"
    expect(mixer in MIXINGS, "options['mixer']", wanted, mixer)
    known = CHOICES.get(mixer, {})
    choices = {name: value for name, value in options.items() if name in known}
    for name, value in choices.items():
        expect(value in known[name], f"options[{name!r}]", f"one of {known[name]}", value)
    rest = {n: v for n, v in options.items() if n != "mixer" and n not in known}
    for name in set(rest) - set(list_options()):
        wanted = f"'mixer', an option of {mixer} {tuple(known)} or one of Inductor's"
        expect(False, "options", wanted, name)
    return mixer, choices, rest


def swap_calls(gm: GraphModule, mixer: str, choices: dict[str, str]) -> tuple[int, Counter[str]]:
    """Swaps the causal attentions of a graph of torch functions, in place.

    Returns:
        how many were swapped, and the reasons of those that stay, counted; they are warned of.
    """
    count, reasons = 0, Counter[str]()
    for node in list(gm.graph.nodes):
        if node.target is not ATTENTION:
            continue
        args = AttentionArgs.of(node)
        try:
            _check_causal(gm, args)
        except NotProvable as reason:
            reasons[str(reason)] += 1
            continue
        count += 1
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function(
                linear_attention,
                (args.query, args.key, args.value, args.scale),
                {"mixer": mixer, "choices": choices},
            )
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    gm.recompile()
    log.info("%d attentions became %s", count, mixer)
    if reasons:
        text = "; ".join(f"{number} x {reason}" for reason, number in reasons.items())
        warnings.warn(f"attentions that stay softmax: {text}", stacklevel=2)
    return count, reasons


def _check_causal(gm: GraphModule, args: AttentionArgs) -> None:
    """Raises NotProvable, with the reason, unless these are as many queries as keys, causal."""
    query, key = (node.meta["example_value"] for node in (args.query, args.key))
    if query.ndim != 4:
        raise NotProvable(f"queries must be [B, H, T, K], got {query.ndim} dims")
    if _value(args.dropout_p) != 0:
        raise NotProvable("dropout is active")
    if query.shape[2] != key.shape[2]:
        raise NotProvable("queries and keys differ in number")
    if args.attn_mask is None:
        if not args.is_causal:
            raise NotProvable("bidirectional: every token sees all")
        return
    time = _hint(query.shape[2])
    mask = _mask(gm, args.attn_mask)
    if window_of(allowed(mask, args.is_causal, time, time)) is not None:
        raise NotProvable("the mask is a sliding window")


def _value(x: Any) -> Any:
    return x.meta["example_value"] if isinstance(x, Node) else x


def _hint(size: int | torch.SymInt) -> int:
    """A size as it is in this call, not fixed by asking."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _mask(gm: GraphModule, mask: Node) -> Tensor:
    """The mask's value in this call, where it is computed from sizes alone."""
    graph, copies, sizes = Graph(), {}, []
    for node in sorted(behind(mask, set())):
        size = _value(node)
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif isinstance(size, int | torch.SymInt):
            copies[node] = graph.placeholder(node.name)
            sizes.append(_hint(size))
        else:
            raise NotProvable("a mask that is an input, or computed from one")
    graph.output(copies[mask])
    return GraphModule(gm, graph)(*sizes)
