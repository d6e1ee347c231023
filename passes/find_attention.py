"""Find softmax attention in a model that somebody else wrote, and prove what it computes.

The model is captured by non-strict torch.export. Every scaled_dot_product_attention node is walked
back to its projections; what stands between is linear, so rotary embedding, head order and groups
are read off by probing. An attention is a site only if, rebuilt from the weights that were found,
it gives the model's queries, keys, values and output; anything else is rejected with a reason.

Attention written out as products and a softmax is first folded into such a node. In a graph, or
where a module does other things too, a site is inline: see ``outline``.

Left out: ALiBi, norms other than RMSNorm, low-rank projections.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from .capture import (
    ModuleCall,
    Values,
    capture,
    default_ids,
    evaluate,
    evaluating,
    example_call,
    known_inputs,
    record_calls,
    record_values,
    switch_to_sdpa,
    with_sdpa,
    without_cache,
)
from .check_model import check_model
from .heads import projection_of, read_heads
from .masks import allowed, window_of
from .sites import (
    AttentionSite,
    AttentionWeights,
    Findings,
    NormSite,
    Projection,
    Rejected,
    RotarySite,
    describe,
)
from .structure import (
    AttentionArgs,
    Draft,
    check_parameters,
    draft_of,
    find_hidden_states,
    find_result,
    is_owner,
    parameters_beside,
)
from .torch_modules import as_one_node
from .verify import prove, rebuild
from .walk import NotProvable, attention_nodes, module_stack, upwards
from .written_out import fold_attention

__all__ = [
    "AttentionSite", "AttentionWeights", "Findings", "NormSite", "Projection", "Rejected",
    "RotarySite", "describe", "find_attention", "switch_to_sdpa",
]  # fmt: skip

_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")  # in a config
_LONGEST_WINDOW = 4096  # a mask of that size squared is evaluated


def find_attention(
    model: nn.Module,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
) -> Findings:
    """All attentions of a model: the proved ones as sites, the others with a reason.

    The model is run in evaluation mode and left as it was. Masks are judged by value, so an
    example shows a sliding window only if it is longer than the window. For a model whose
    config names a window, the masks alone are computed again on longer token ids
    (window + 2, for windows up to 4096); in any other model give an example that is long enough.

    Args:
        example_inputs: positional inputs of one forward call; none: ids [2, 16] for a model
            that has config.vocab_size. Sequences of full length, without padding.
        example_kwargs: keyword inputs of that call; use_cache=False is added where it is known.
    """
    check_model(model)
    example_inputs, kwargs = example_call(model, example_inputs, example_kwargs or {})
    with evaluating(model):
        with with_sdpa(model) as note, as_one_node(model):
            gm = _captured(model, example_inputs, kwargs)
            drafts, rejected = _drafts(gm)
            masks = _LongMasks(model, gm)
            paths = {path for draft in drafts.values() for path in upwards(draft.path)}
            calls = record_calls(model, paths, example_inputs, kwargs)
        # What the model computes as it came, should the switch to sdpa change it.
        own_calls = record_calls(model, paths, example_inputs, kwargs) if note else calls
        wanted = {node for draft in drafts.values() for node in draft.wanted()}
        values = record_values(gm, wanted, example_inputs, kwargs)
        counts = Counter(draft.path for draft in drafts.values())
        sites: list[AttentionSite] = []
        for index, draft in drafts.items():
            try:
                window = masks.window(index, draft, values)
                check_parameters(draft, model)
                if draft.path in calls and is_owner(draft, model):
                    if counts[draft.path] > 1:
                        raise NotProvable(_often(counts[draft.path]))
                    pair = (calls[draft.path], own_calls[draft.path])
                    sites.append(_site(draft, model, values, pair, window))
                else:
                    home = _home(draft, model, calls, bool(note))
                    ran_inside = [_ran_in(home, n) for n in attention_nodes(gm)[:index]]
                    seen = ModuleCall((values[draft.x],), {}, values[draft.y])
                    site = _site(replace(draft, path=home), model, values, (seen, seen), window)
                    sites.append(replace(site, inline=sum(ran_inside)))
            except NotProvable as reason:
                rejected.append(Rejected(draft.path, str(reason)))
    for site in [site for site in sites if _holds_another(site, sites)]:
        sites.remove(site)
        reason = "attention is inline in a module that also holds a module which attends"
        rejected.append(Rejected(site.path, reason))
    return Findings(tuple(sites), tuple(rejected), gm, (note,) if note else ())


def _drafts(gm: GraphModule) -> tuple[dict[int, Draft], list[Rejected]]:
    """Attentions that the graph's structure allows, by their number, and the other ones."""
    drafts: dict[int, Draft] = {}
    rejected = [
        Rejected((module_stack(node) or [""])[-1], reason) for node, reason in fold_attention(gm)
    ]
    for index, node in enumerate(attention_nodes(gm)):
        try:
            drafts[index] = draft_of(node)
        except NotProvable as reason:
            rejected.append(Rejected((module_stack(node) or [""])[-1], str(reason)))
    return drafts, rejected


def _ran_in(path: str, node: Node) -> bool:
    return not path or path in module_stack(node)


def _often(times: int) -> str:
    return f"the module attends {times} times in one forward"


def _home(draft: Draft, model: nn.Module, calls: dict[str, ModuleCall], switched: bool) -> str:
    """The module whose forward holds an inline attention; it must be one that can be captured."""
    path = next(path for path in upwards(draft.path) if path in calls)
    owner, call = model.get_submodule(path), calls[path]
    if call.times > 1:
        raise NotProvable(_often(call.times))
    if isinstance(owner, GraphModule):
        return path
    leaves = tree_leaves((call.args, call.kwargs))
    odd = [type(x).__name__ for x in leaves if not isinstance(x, Tensor | None)]
    if path and not odd and not switched:
        return path
    where = f"{type(owner).__name__} ({path or 'the model itself'})"
    others = parameters_beside(draft, path, model)
    held = ", ".join(dict.fromkeys(n.rsplit(".", 1)[0] for n in others)) or "the rest"
    called = f" and is called with {odd[0]}" if odd else ""
    raise NotProvable(
        f"attention is inline in {where}, which also holds {held}{called}; "
        "move it into a module of its own"
    )


def _holds_another(site: AttentionSite, sites: list[AttentionSite]) -> bool:
    """Whether the capture of an inline site's module would take the module of another along."""
    inside = f"{site.path}."
    return site.inline is not None and any(other.path.startswith(inside) for other in sites)


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    try:
        return capture(model, args, kwargs)
    except Exception as error:
        raise ValueError(
            "model: expected one that torch.export captures on the example, got "
            f"{type(error).__name__}: {error}"
        ) from error


class _LongMasks:
    """Masks on token ids longer than the window in the config, where that can be checked."""

    def __init__(self, model: nn.Module, gm: GraphModule):
        config = getattr(model, "config", None)
        windows = [getattr(config, name, None) for name in _WINDOWS]
        self.declared = max((w for w in windows if isinstance(w, int)), default=0)
        times = [AttentionArgs.of(n).query.meta["val"].shape[-2] for n in attention_nodes(gm)]
        self.needed = bool(self.declared and times and max(times) <= self.declared)
        self.values: Values = {}
        self.nodes: list[Node] = []
        if self.needed and self.declared <= _LONGEST_WINDOW:
            inputs = (default_ids(model, 1, self.declared + 2),)
            kwargs = without_cache(model, {})
            long = capture(model, inputs, kwargs)
            fold_attention(long)
            self.values, self.nodes = known_inputs(long, inputs, kwargs), attention_nodes(long)

    def window(self, index: int, draft: Draft, values: Values) -> int | None:
        """Window of attention number `index`, from the longest mask there is."""
        if not self.needed:
            return _window(draft.args, values)
        if self.declared > _LONGEST_WINDOW:
            raise NotProvable(
                f"a window of {self.declared} is in the config, too long to be checked"
            )
        _window(draft.args, values)
        return _window(AttentionArgs.of(self.nodes[index]), self.values)


def _window(args: AttentionArgs, values: Values) -> int | None:
    mask = None if args.attn_mask is None else evaluate(args.attn_mask, values, {})
    time, keys = (node.meta["val"].shape[-2] for node in (args.query, args.key))
    return window_of(allowed(mask, args.is_causal, time, keys))


def _site(
    draft: Draft,
    model: nn.Module,
    values: Values,
    calls: tuple[ModuleCall, ModuleCall],
    window: int | None,
) -> AttentionSite:
    """The site of a draft; raises NotProvable where a value contradicts it."""
    call, own_call = calls
    x, time = values[draft.x], draft.args.query.meta["val"].shape[-2]
    x = x.transpose(0, 1) if x.dim() == 3 and x.shape[1] != time else x
    x_arg, time_first = find_hidden_states(call.args, call.kwargs, x)
    heads = read_heads(draft, model, values)
    site = AttentionSite(
        path=draft.path,
        owner=type(model.get_submodule(draft.path)).__name__,
        q=heads.q,
        k=heads.k,
        v=heads.v,
        o=projection_of(draft.o, None),
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        hidden_size=x.shape[-1],
        scale=heads.scale,
        rotary=heads.rotary,
        q_norm=heads.q_norm,
        k_norm=heads.k_norm,
        window=window,
        softcap=draft.args.softcap,
        x_arg=x_arg,
        time_first=time_first,
    )
    rebuilt = rebuild(site, model, x)
    seen = {branch.name: values[branch.end] for branch in (draft.q, draft.k, draft.v)}
    prove(rebuilt, seen, {"queries": heads.q_gain, "keys": heads.k_gain})
    y = rebuilt["output"].transpose(0, 1) if time_first else rebuilt["output"]
    find_result(own_call.result, y, alone=False)
    num_results, index = find_result(call.result, y, unused=draft.unused)
    return replace(site, num_results=num_results, result_index=index)
