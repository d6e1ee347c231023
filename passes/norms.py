"""RMSNorm of queries and keys: found by its shape in the graph, checked later by value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

from .sites import NormSite
from .walk import CASTS, Branch, NotProvable, op_name, parameter_name


@dataclass(frozen=True)
class NormMatch:
    """A norm between the nodes `start` and `end`; `inside` are its nodes, `end` included."""

    start: Node
    end: Node
    inside: frozenset[Node]
    fqn: str | None
    eps: float
    offset: float


def _after(node: Node) -> Node | None:
    """The only user of a node, casts skipped; None if there are several."""
    users = [n for n in node.users if op_name(n) != "_assert_tensor_metadata"]
    if len(users) != 1:
        return None
    return _after(users[0]) if op_name(users[0]) in CASTS else users[0]


def _before(node: Node) -> Node:
    while node.op == "call_function" and op_name(node) in CASTS:
        node = node.args[0]
    return node


def _weight(node: object) -> tuple[str, float] | None:
    """(name, offset) of w or (offset + w), None if the node is something else."""
    if not isinstance(node, Node):
        return None
    node = _before(node)
    if node.op == "call_function" and op_name(node) == "add":
        numbers = [a for a in node.args if isinstance(a, int | float)]
        names = [parameter_name(a) for a in node.args if isinstance(a, Node)]
        return (names[0], float(numbers[0])) if numbers and names and names[0] else None
    name = parameter_name(node)
    return (name, 0.0) if name else None


def _inverse_root(mean: Node) -> tuple[Node, float] | None:
    """(node, eps) of 1 / sqrt(mean + eps)."""
    add = _after(mean)
    if add is None or op_name(add) != "add" or not isinstance(add.args[1], int | float):
        return None
    root = _after(add)
    if root is None or not (
        op_name(root) == "rsqrt" or (op_name(root) == "pow" and root.args[1] == -0.5)
    ):
        return None
    return root, float(add.args[1])


def _is_square(node: Node) -> bool:
    name = op_name(node)
    return (
        (name == "pow" and node.args[1] == 2)
        or name == "square"
        or (name == "mul" and node.args[0] is node.args[1])
    )


def _match_mean(branch: Branch, mean: Node) -> NormMatch | None:
    """x * rsqrt(mean(x²) + eps) * w, written out."""
    square = _before(mean.args[0])
    inverse = _inverse_root(mean)
    if not _is_square(square) or inverse is None or list(mean.args[1]) != [-1]:
        return None
    root, eps = inverse
    end = _after(root)
    if end is None or op_name(end) != "mul":
        return None
    weight, product = None, _after(end)
    if product is not None and op_name(product) == "mul":
        other = [a for a in product.args if _before(a) is not end]
        weight = _weight(other[0]) if other else None
        end = product if weight else end
    start = _before(square.args[0])
    return _between(branch, start, end, weight, eps)


def _match_fused(branch: Branch, node: Node) -> NormMatch:
    """aten.rms_norm(x, shape, weight, eps); torch's default eps is that of x's type."""
    x, _, weight, eps = (*node.args, None, None)[:4]
    if eps is None:
        eps = torch.finfo(x.meta["val"].dtype).eps
    return _between(branch, _before(x), node, _weight(weight), float(eps))


def _between(
    branch: Branch, start: Node, end: Node, weight: tuple[str, float] | None, eps: float
) -> NormMatch:
    inside, stack = {end}, [end]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node is not start and node in branch.data and node not in inside:
                inside.add(node)
                stack.append(node)
    fqn, offset = weight or (None, 0.0)
    return NormMatch(start, end, frozenset(inside), fqn, eps, offset)


def match_norm(branch: Branch) -> NormMatch | None:
    """The RMSNorm in a branch, None without one; several or another norm are not provable."""
    found: list[NormMatch | None] = []
    for node in branch.data:
        if op_name(node) in ("layer_norm", "native_layer_norm", "group_norm"):
            raise NotProvable(f"{branch.name} have a {op_name(node)}; only RMSNorm is known")
        if op_name(node) == "rms_norm":
            found.append(_match_fused(branch, node))
        elif op_name(node) == "mean":
            found.append(_match_mean(branch, node))
    if not found:
        return None
    if len(found) > 1 or found[0] is None:
        raise NotProvable(f"{branch.name} have a norm that is not a known RMSNorm")
    return found[0]


def norm_site(match: NormMatch | None, head_dim: int, model: nn.Module) -> NormSite | None:
    """The norm as data; its weight must span the dims it norms."""
    if match is None:
        return None
    width = match.start.meta["val"].shape[-1]
    if match.fqn is not None and tuple(model.get_parameter(match.fqn).shape) != (width,):
        shape = tuple(model.get_parameter(match.fqn).shape)
        raise NotProvable(f"the norm {match.fqn} has weight {shape}, not ({width},)")
    return NormSite(match.fqn, match.eps, width == head_dim, match.offset)
