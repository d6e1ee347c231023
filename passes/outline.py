"""Give an attention that stands inline a module of its own, so that it can be swapped.

In a graph, the nodes from the projections' input x to the output projection move into a
GraphModule, and one call_module stands in their place. A module of the tree that attends among
other things is first captured as such a graph, for any batch and length, and replaced by it.

The new module stands where the weights' names tell (blocks.0.attention, if nothing else lives
there), or beside them under the name `attention`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from .capture import ModuleCall, evaluating, example_call, record_calls
from .sites import AttentionSite, NormSite, Projection
from .structure import Draft, draft_of
from .walk import attention_nodes, op_name, upwards
from .written_out import fold_attention

_OWNER = "flacompile.owner"  # in a captured block's meta: the module that it replaced


def graph_of(
    program: GraphModule | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> GraphModule:
    """A new graph module over the same parameters, of aten operators; the other stays as it is.

    Args:
        program: a graph of another level is exported.
        args: of one call of it, as are kwargs.
    """
    gm = program.module() if isinstance(program, ExportedProgram) else program
    if not attention_nodes(gm):
        if not args and not kwargs:
            raise ValueError("example_inputs: expected those of one call of the graph, got none")
        gm = _export(gm, args, kwargs)
    copied = _graph_module(gm, copy.deepcopy(gm.graph))
    fold_attention(copied)
    return copied


def outline_sites(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[AttentionSite]:
    """The same sites, after each that is inline was given a module of its own, in place.

    Args:
        model: the one they were found in; what stands in it afterwards computes the same.
        args: of one call of the model, as are kwargs; the ones for ``find_attention``.

    Raises:
        ValueError: a block cannot be captured for any batch and length.
    """
    groups: dict[str, list[AttentionSite]] = {}
    for site in sites:
        if site.inline is not None:
            groups.setdefault(site.path, []).append(site)
    if not groups:
        return list(sites)
    args, kwargs = example_call(model, args, kwargs)
    done: dict[tuple[str, int | None], AttentionSite] = {}
    with evaluating(model):
        calls = record_calls(model, set(groups), args, kwargs)
    for path, group in groups.items():
        parameters = {name: model.get_parameter(name) for s in group for name in _names(s)}
        owner = model.get_submodule(path)
        block = _block(owner, path, calls[path])
        places = outline(block, [site.inline or 0 for site in group])
        if path:
            block.meta[_OWNER] = owner
            model.set_submodule(path, block, strict=True)
        for site, place in zip(group, places, strict=True):
            done[path, site.inline] = _moved(site, model, f"{path}.{place}".strip("."), parameters)
    return [done.get((site.path, site.inline), site) for site in sites]


def outline(gm: GraphModule, attentions: Sequence[int]) -> list[str]:
    """Moves attentions, told by their number in the graph, into modules of their own, in place.

    Returns:
        the path of each new module; its first argument is x [B, T, D].
    """
    nodes = attention_nodes(gm)
    drafts = [draft_of(nodes[i]) for i in attentions]
    places = [_outline(gm, draft) for draft in drafts]
    _forget_unused(gm)
    gm.graph.lint()
    gm.recompile()
    return places


def restore_blocks(model: nn.Module) -> None:
    """Puts back the modules that ``outline_sites`` replaced by their graphs."""
    for path, module in list(model.named_modules()):
        if _OWNER in getattr(module, "meta", {}):
            model.set_submodule(path, module.meta[_OWNER], strict=True)


def forget_blocks(model: nn.Module) -> None:
    """Lets go of the modules that ``restore_blocks`` would put back."""
    for module in model.modules():
        getattr(module, "meta", {}).pop(_OWNER, None)


def _block(owner: nn.Module, path: str, call: ModuleCall) -> GraphModule:
    """The graph of a module of the tree; a model that is a graph is already one to write in."""
    if isinstance(owner, GraphModule):
        return graph_of(owner, call.args, call.kwargs) if path else owner
    with evaluating(owner):
        exported = _export(owner, call.args, call.kwargs)
        fold_attention(exported)
    for node in attention_nodes(exported):
        batch, _, time, _ = shape = node.meta["val"].shape
        if isinstance(batch, int) or isinstance(time, int):
            raise ValueError(
                f"example_inputs: expected a call whose batch and length may change in {path}, "
                f"where attention is inline, got a graph for queries {tuple(shape)} only; "
                "give at least 2 rows and 2 tokens"
            )
    block = _graph_module(exported, copy.deepcopy(exported.graph)).train(owner.training)
    _revive_dropout(block)
    return block


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    """The graph of a module, for all sizes that the module allows."""
    shapes = ShapesCollection()
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            shapes[tensor] = dict.fromkeys(range(tensor.ndim), Dim.AUTO)
    program = export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    return program.module(check_guards=False)


def _revive_dropout(gm: GraphModule) -> None:
    """Dropout that evaluation mode froze follows the mode of the graph module again."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and op_name(node) == "dropout":
            name = _free_name(gm, "dropout")
            gm.add_submodule(name, nn.Dropout(node.args[1]).train(gm.training))
            with gm.graph.inserting_before(node):
                call = gm.graph.call_module(name, node.args[:1])
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            gm.graph.erase_node(node)
    gm.recompile()


def _outline(gm: GraphModule, draft: Draft) -> str:
    """One attention's nodes into a module; those that nothing else uses leave the graph."""
    end, (inputs, region) = draft.y, _region(draft)
    inside, copies = Graph(), {}
    for node in inputs:
        copies[node] = inside.placeholder(node.name)
    for node in region:
        copies[node] = inside.node_copy(node, copies.__getitem__)
    inside.output(copies[end])

    projections = (draft.q.projection, draft.k.projection, draft.v.projection, draft.o)
    steps = zip(*(p.weight.split(".")[:-1] for p in projections), strict=False)
    base = ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))
    with gm.graph.inserting_before(end):
        call = gm.graph.create_node("call_module", "", tuple(inputs), name="attention")
    call.meta = dict(end.meta)
    end.replace_all_uses_with(call)
    for node in reversed(region):
        _erase_unused(node)
    call.target = place = _place(gm, base)
    gm.add_submodule(place, _graph_module(gm, inside, base))
    return place


def _region(draft: Draft) -> tuple[list[Node], list[Node]]:
    """(inputs, nodes) of what computes the output projection from x, reading parameters included.

    So are constants that x does not need (positions, masks), which can then go with it.
    """
    before = behind(draft.x, set())
    region = behind(draft.y, {n for n in before if n.op != "get_attr"})
    nodes = sorted(n for n in region if n.op != "placeholder")
    outside = {i for n in nodes for i in n.all_input_nodes} - set(nodes) - {draft.x}
    return [draft.x, *sorted(outside)], nodes


def behind(end: Node, known: set[Node]) -> set[Node]:
    """The node and all that it is computed from, known ones aside."""
    seen: set[Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node not in seen and node not in known:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _erase_unused(node: Node) -> None:
    """Erases a node whose value nobody uses, checks of its type aside."""
    if all(op_name(user) == "_assert_tensor_metadata" for user in node.users):
        for user in [*node.users, node]:
            user.graph.erase_node(user)


def _place(gm: GraphModule, base: str) -> str:
    """`base` if nothing else of the graph lives there, else a new name in it."""
    inside = f"{base}."
    used = any(
        node.op in ("get_attr", "call_module") and f"{node.target}.".startswith(inside)
        for node in gm.graph.nodes
    )
    return base if base and not used else _free_name(gm, f"{inside}attention".strip("."))


def _free_name(gm: GraphModule, name: str) -> str:
    parent = gm.get_submodule(name.rpartition(".")[0])
    leaf, number = name.rpartition(".")[2], 0
    while hasattr(parent, leaf if not number else f"{leaf}_{number}"):
        number += 1
    return name if not number else f"{name}_{number}"


def _graph_module(gm: GraphModule, graph: Graph, base: str = "") -> GraphModule:
    """A graph over what it uses of gm, the same objects; names below `base` are read from there."""
    saved, attributes, transient = gm.state_dict().keys(), {}, []
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = attrgetter(node.target)(gm)
            name = node.target.removeprefix(f"{base}.")
            if isinstance(value, Tensor) and node.target not in saved:
                transient.append(name)
            attributes[name], node.target = value, name
    module = GraphModule(attributes, graph)
    for name in transient:
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._non_persistent_buffers_set.add(leaf)
    return module.train(gm.training)


def _forget_unused(gm: GraphModule) -> None:
    """Deletes parameters, buffers and modules that the graph no longer reads."""
    used = {n.target for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    parameters = gm.named_parameters(remove_duplicate=False)
    buffers = gm.named_buffers(remove_duplicate=False)
    for name, _ in [*parameters, *buffers]:
        if used.isdisjoint(upwards(name)):
            parent, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(parent), leaf)
    gm.delete_all_unused_submodules()


def _names(site: AttentionSite) -> list[str]:
    """Names of the parameters of a site."""
    projections = (site.q, site.k, site.v, site.o)
    norms = [norm.fqn for norm in (site.q_norm, site.k_norm) if norm]
    names = [*(p.fqn for p in projections), *(p.bias_fqn for p in projections), *norms]
    return [name for name in names if name]


def _moved(
    site: AttentionSite, model: nn.Module, path: str, parameters: dict[str, nn.Parameter]
) -> AttentionSite:
    """The site at its new path, with the names that its parameters have there."""
    new = {id(p): f"{path}.{n}" for n, p in model.get_submodule(path).named_parameters()}

    def name(old: str | None) -> str | None:
        """The new name of a parameter; None stays None."""
        return old and new[id(parameters[old])]

    def projection(old: Projection) -> Projection:
        """With the new names of its weight and bias."""
        return replace(old, fqn=name(old.fqn), bias_fqn=name(old.bias_fqn))

    def norm(old: NormSite | None) -> NormSite | None:
        """With the new name of its weight."""
        return old and replace(old, fqn=name(old.fqn))

    moved = {n: projection(getattr(site, n)) for n in "qkvo"}
    moved |= {n: norm(getattr(site, n)) for n in ("q_norm", "k_norm")}
    return replace(site, path=path, inline=None, **moved)
