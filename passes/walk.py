"""Walks in a captured graph: from an attention back to its projections, and on to the output."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node


class NotProvable(Exception):
    """Ends the look at one attention; the message is the reason in the report."""


_LAYOUT = {
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "transpose", "permute", "t",
    "numpy_T", "mT", "unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone", "alias",
    "detach", "detach_", "split", "split_with_sizes", "chunk", "unbind", "select", "slice",
    "unflatten", "flatten", "repeat", "repeat_interleave", "narrow", "movedim", "swapaxes",
    "swapdims", "lift_fresh_copy", "index", "broadcast_to",
}  # fmt: skip
CASTS = {"to", "_to_copy", "type_as", "float", "_assert_tensor_metadata"}
_LINEAR = {
    "mul", "div", "add", "sub", "rsub", "neg", "cat", "stack", "concat", "real", "imag",
    "view_as_complex", "view_as_real", "complex", "index_select", "hstack",
}  # fmt: skip
_PROJECTIONS = {"linear", "addmm", "mm", "matmul"}


def op_name(node: Node) -> str:
    """Name of the aten operator without overload, or a Python function's name."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", node.op)


def is_layout(node: Node) -> bool:
    """Moves, repeats or converts elements and leaves their values alone."""
    if node.target is operator.getitem or op_name(node) in _LAYOUT | CASTS:
        return True
    return op_name(node) == "dropout" and not node.args[2]


def is_linear(node: Node) -> bool:
    """Linear in its data as long as only one factor of a product is data."""
    return is_layout(node) or op_name(node) in _LINEAR


def origin(node: Node) -> Node:
    """The node behind a chain of layout operators."""
    while is_layout(node) and node.op == "call_function":
        node = node.args[0]
    return node


@dataclass(frozen=True)
class ProjectionNode:
    """A product with a parameter: x [.., D] times weight, plus bias."""

    node: Node
    x: Node
    weight: str
    transposed: bool
    bias: str | None


def parameter_name(node: object) -> str | None:
    """Name of the parameter that a get_attr node, maybe cast, reads; None for anything else."""
    while isinstance(node, Node) and op_name(node) in CASTS and node.op == "call_function":
        node = node.args[0]
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else None


def read_projection(node: Node) -> ProjectionNode | None:
    """The projection at this node, None if it is something else."""
    name = op_name(node)
    if node.op == "call_function" and name == "add":
        return _with_bias(node)
    if node.op != "call_function" or name not in _PROJECTIONS:
        return None
    if name == "linear":
        x, weight, bias = (*node.args, None)[:3]
        transposed = False
    else:
        bias, x, weight = node.args[:3] if name == "addmm" else (None, *node.args[:2])
        transposed = True
    while isinstance(weight, Node) and op_name(weight) in ("t", "transpose", "permute", "numpy_T"):
        weight, transposed = weight.args[0], not transposed
    fqn = parameter_name(weight)
    if fqn is None or (bias is not None and parameter_name(bias) is None):
        return None
    return ProjectionNode(node, x, fqn, transposed, parameter_name(bias))


def _with_bias(add: Node) -> ProjectionNode | None:
    """A product with a parameter whose bias is added in a step of its own."""
    product, bias = add.args[:2]
    if not isinstance(product, Node) or parameter_name(bias) is None or _dims(bias) != 1:
        return None
    found = read_projection(product)
    return replace(found, node=add, bias=parameter_name(bias)) if found and not found.bias else None


def _dims(node: Node) -> int:
    return node.meta["val"].dim()


@dataclass(frozen=True)
class Branch:
    """From a projection to the queries, keys or values of an attention.

    `data` depends on the projection; `constants` are the other nodes behind `end`.
    """

    name: str
    end: Node
    projection: ProjectionNode
    data: tuple[Node, ...]
    constants: frozenset[Node]


def _behind(end: Node) -> tuple[list[Node], list[ProjectionNode]]:
    """All nodes behind `end` in graph order, stopping at projections."""
    seen: set[Node] = set()
    stack, found = [end], []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        projection = read_projection(node)
        if projection is None:
            stack.extend(node.all_input_nodes)
        else:
            found.append(projection)
    return sorted(seen), found


def walk_back(name: str, end: Node) -> Branch:
    """The one projection behind queries, keys or values and what stands between."""
    nodes, projections = _behind(end)
    if len(projections) != 1:
        names = ", ".join(sorted(p.weight for p in projections)) or "none"
        raise NotProvable(
            f"{name} must come from one projection, found {len(projections)}: {names}"
        )
    data = {projections[0].node}
    for node in nodes:
        if any(source in data for source in node.all_input_nodes):
            data.add(node)
    ordered = tuple(node for node in nodes if node in data and node is not projections[0].node)
    return Branch(name, end, projections[0], ordered, frozenset(nodes) - data)


def _step(node: Node) -> str:
    if op_name(node) == "dropout":
        return f"dropout {node.args[1]:g} is active"
    return f"{op_name(node)} stands"


def check_linear(branch: Branch, skipped: frozenset[Node]) -> None:
    """Only operators that are linear in the projection's output, outside of a norm."""
    for node in branch.data:
        if node in skipped:
            continue
        data_inputs = [n for n in node.all_input_nodes if n not in branch.constants]
        product = op_name(node) in ("mul", "div") and (
            len(data_inputs) > 1 or (op_name(node) == "div" and node.args[1] in data_inputs)
        )
        if not is_linear(node) or product:
            raise NotProvable(f"{_step(node)} between the projection and the {branch.name}")


def walk_forward(attention: Node) -> ProjectionNode:
    """The output projection, reached through layout operators only."""
    node = attention
    while True:
        users = [n for n in node.users if op_name(n) != "_assert_tensor_metadata"]
        if len(users) != 1:
            raise NotProvable(f"the attention's result is used {len(users)} times, not once")
        node = users[0]
        projection = read_projection(node)
        if projection is not None:
            after = [_with_bias(n) for n in node.users if op_name(n) == "add"]
            return (after[0] if len(node.users) == 1 and after else None) or projection
        if not is_layout(node):
            raise NotProvable(f"{_step(node)} between attention and output projection")


def module_stack(node: Node) -> list[str]:
    """Paths of the modules a node ran in, outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def upwards(path: str) -> list[str]:
    """The path and those of all modules around it; "" is the model."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def attention_nodes(gm: GraphModule) -> list[Node]:
    """The attentions that are one node, in order."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    return [n for n in gm.graph.nodes if n.target is sdpa or op_name(n) == "softcapped_attention"]


def describe_graph(gm: GraphModule, path: str) -> str:
    """The nodes that ran inside the module at `path`: one line a node, operators by short name."""
    lines = []
    for node in gm.graph.nodes:
        inside = any(p == path or p.startswith(path + ".") for p in module_stack(node))
        if node.op == "call_function" and inside and node.users:
            inputs = ", ".join(
                str(n.target).removeprefix(path + ".") if n.op == "get_attr" else n.name
                for n in node.all_input_nodes
            )
            lines.append(f"{node.name} = {op_name(node)}({inputs})")
    return "\n".join(lines)
