"""First look at one attention: which nodes, which parameters, which module owns them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .norms import NormMatch, match_norm
from .verify import agrees
from .walk import (
    Branch,
    NotProvable,
    ProjectionNode,
    check_linear,
    is_layout,
    module_stack,
    op_name,
    origin,
    walk_back,
    walk_forward,
)


@dataclass(frozen=True)
class AttentionArgs:
    """Arguments of scaled_dot_product_attention by name, and the cap of a soft-capped one."""

    query: Node
    key: Node
    value: Node
    attn_mask: Node | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    softcap: float | None = None

    @classmethod
    def of(cls, node: Node) -> AttentionArgs:
        """Reads one of the nodes that ``attention_nodes`` lists."""
        return cls(*node.args, **node.kwargs)


@dataclass(frozen=True)
class Draft:
    """One attention as the graph's structure tells it; values still have to prove it.

    x is what is projected, y the output projection's result, both [B, T, D]; `unused` is the shape
    of softmax's result where the model has it and uses it for nothing else.
    """

    path: str
    args: AttentionArgs
    q: Branch
    k: Branch
    v: Branch
    norms: dict[str, NormMatch | None]
    o: ProjectionNode
    x: Node
    y: Node
    unused: torch.Size | None

    def wanted(self) -> set[Node]:
        """Nodes whose values the proof needs."""
        nodes = {self.x, self.q.end, self.k.end, self.v.end, self.y}
        if self.args.attn_mask is not None:
            nodes.add(self.args.attn_mask)
        return nodes.union(self.q.constants, self.k.constants, self.v.constants)

    def parameters(self) -> list[str]:
        """Names of the attention's weights, biases and norms."""
        projections = [self.q.projection, self.k.projection, self.v.projection, self.o]
        names = [name for p in projections for name in (p.weight, p.bias) if name]
        return names + [norm.fqn for norm in self.norms.values() if norm and norm.fqn]


def draft_of(attention: Node) -> Draft:
    """Walks from an attention node both ways; raises NotProvable with the reason."""
    args = AttentionArgs.of(attention)
    if args.dropout_p:
        raise NotProvable(f"dropout {args.dropout_p:g} is active")
    branches = [
        walk_back(name, end)
        for name, end in (("queries", args.query), ("keys", args.key), ("values", args.value))
    ]
    o = walk_forward(attention)
    path = owner_path([attention, *(b.projection.node for b in branches), o.node])
    x = _hidden_states(branches, path)
    norms = {branch.name: match_norm(branch) for branch in branches}
    for branch in branches:
        norm = norms[branch.name]
        check_linear(branch, norm.inside if norm else frozenset())
    if norms["values"]:
        raise NotProvable("the values have a norm")
    q, k, v = branches
    y = _in_layout_of(x, o.node)
    return Draft(path, args, q, k, v, norms, o, x, y, attention.meta.get("weights"))


def owner_path(nodes: list[Node]) -> str:
    """The innermost module that all nodes ran in; "" is the model itself."""
    stacks = [module_stack(node) for node in nodes]
    common = [step[0] for step in zip(*stacks, strict=False) if len(set(step)) == 1]
    return common[-1] if common else ""


def _in_layout_of(x: Node, node: Node) -> Node:
    """The node, or what it becomes as soon as it has as many dims as x, which are [B, T, D]."""
    users = [n for n in node.users if op_name(n) != "_assert_tensor_metadata"]
    same = node.meta["val"].ndim == x.meta["val"].ndim
    return (
        node if same or len(users) != 1 or not is_layout(users[0]) else _in_layout_of(x, users[0])
    )


def _hidden_states(branches: list[Branch], path: str) -> Node:
    sources = [origin(branch.projection.x) for branch in branches]
    for branch, source in zip(branches, sources, strict=True):
        if source is sources[0]:
            continue
        if path and any(path in module_stack(n) for n in (source, sources[0])):
            raise NotProvable(
                f"queries and {branch.name} are projections of different tensors made inside the "
                "module (low-rank, as in latent attention), which no mixer takes over"
            )
        raise NotProvable(f"cross-attention: {branch.name} come from another input than queries")
    return sources[0]


def check_parameters(draft: Draft, model: nn.Module) -> None:
    """The attention's weights are parameters of the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in draft.parameters():
        if name not in parameters:
            raise NotProvable(f"the weight {name} is not a parameter of the model")


def is_owner(draft: Draft, model: nn.Module) -> bool:
    """Whether the module at the draft's path holds the attention's parameters and no others."""
    return bool(draft.path) and not parameters_beside(draft, draft.path, model)


def parameters_beside(draft: Draft, path: str, model: nn.Module) -> list[str]:
    """Names of the parameters in the module at `path` that are not the attention's."""
    used = {id(model.get_parameter(name)) for name in draft.parameters()}
    return [n for n, p in model.get_submodule(path).named_parameters() if id(p) not in used]


def find_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[int | str, bool]:
    """Where x [B, T, D] stands in a module's call, and whether it stands there as [T, B, D]."""
    for key, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor) and agrees(value, x, x.dtype):
            return key, False
        if isinstance(value, Tensor) and agrees(value, x.transpose(0, 1), x.dtype):
            return key, True
    raise NotProvable("what is projected is not an argument of the module as it is")


def find_result(
    result: Any, y: Tensor, *, alone: bool = True, unused: torch.Size | None = None
) -> tuple[int | None, int]:
    """(None, 0) where a module returns y, else (length, index) of the tuple it stands in.

    Args:
        y: the output rebuilt from the weights that were found, [B, T, D].
        alone: nothing else may stand in the tuple.
        unused: but a tensor of this shape may, which nothing uses.
    """

    def is_y(value: Any) -> bool:
        """Whether the value is y, within the rounding of its dtype."""
        return isinstance(value, Tensor) and agrees(y, value, value.dtype)

    if is_y(result):
        return None, 0
    places = [i for i, v in enumerate(result) if is_y(v)] if isinstance(result, tuple) else []
    if not places:
        raise NotProvable("the module does not return the output rebuilt from the weights found")
    extra = [
        i for i, value in enumerate(result)
        if i != places[0] and value is not None and getattr(value, "shape", None) != unused
    ]  # fmt: skip
    if extra and alone:
        raise NotProvable(f"the module also returns something at index {extra[0]} of its tuple")
    return len(result), places[0]
