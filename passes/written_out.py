"""Attention written out as products and a softmax, folded into one node of the graph.

    softmax(c tanh(a q kᵀ) + mask) v   becomes   attention(q, k, v, mask, scale=a c, softcap=c)

Without a cap c the scale is a and the node is PyTorch's own. The mask is what the steps between
product and softmax make of scores that are zero, so that no form of masking need be known. The
products are matmul or einsum of four dims. The graph computes what it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .walk import CASTS, NotProvable, op_name, read_projection

aten = torch.ops.aten

_STEPS = {"mul", "div", "add", "sub", "tanh", "where", "masked_fill"}
_SAME = CASTS | {"clone", "contiguous", "alias", "detach", "dropout"}
_LONGEST = 12  # steps between the product and the softmax


def softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, *, scale: float, softcap: float
) -> Tensor:
    """softmax(c tanh(scale q kᵀ / c) + mask) v, which PyTorch has no kernel for.

    Args:
        query: [B, H, T, K].
        key: [B, H_kv, S, K].
        value: [B, H_kv, S, V].
        attn_mask: [.., T, S], True where a query sees a key, or numbers that are added.
        scale: factor on q·k.
        softcap: c, which no score exceeds (Gemma Team 2024, arXiv 2408.00118).

    Returns:
        [B, H, T, V]. The scores [B, H, T, S] are held in memory.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scale / softcap))
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    else:
        scores = scores + attn_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(value.dtype) @ value


@dataclass(frozen=True)
class _Product:
    """A product of two tensors whose dims are letters."""

    node: Node
    factors: tuple[Node, Node]
    dims: tuple[str, str]
    result: str

    @classmethod
    def of(cls, node: Node) -> _Product:
        """Reads a matmul or an einsum."""
        if _name(node) == "matmul":
            left, right, equation = node.args[0], node.args[1], "bhik,bhkj->bhij"
        elif _name(node) == "einsum" and len(node.args[1]) == 2:
            (left, right), equation = node.args[1], str(node.args[0]).replace(" ", "")
        else:
            bias = "adds a bias to the scores (ALiBi or another): " * (_name(node) == "baddbmm")
            raise NotProvable(f"its product {bias or 'is a '}{op_name(node)}")
        dims, _, result = equation.partition("->")
        product = cls(node, (left, right), tuple(dims.split(",")), result)  # type: ignore[arg-type]
        shapes = [len(n.meta["val"].shape) for n in (*product.factors, node)]
        if shapes != [4, 4, 4] or [len({*d}) for d in (*product.dims, result)] != [4, 4, 4]:
            raise NotProvable(f"its product {equation} has other dims than batch, head, query, key")
        return product

    def factor(self, index: int, dims: str) -> tuple[Node, str, str]:
        """One factor, its dims and those wanted; "*" is the dim that is not in the result."""
        own = self.dims[index]
        return self.factors[index], own, dims.replace("*", next(iter({*own} - {*self.result}), "*"))


def fold_attention(gm: GraphModule) -> list[tuple[Node, str]]:
    """Folds every attention written out, in place; the softmax nodes that it left, and why."""
    left = []
    for softmax in [n for n in gm.graph.nodes if _name(n) in ("softmax", "_softmax")]:
        path = _path_to_scores(softmax.args[0])
        if path is None:
            continue  # a softmax over something else
        try:
            _fold(gm, path, softmax)
        except NotProvable as reason:
            text = f"attention is written out as a softmax, and {reason}"
            left.append((softmax, f"{text}; use scaled_dot_product_attention"))
    gm.recompile()
    return left


def _name(node: Node) -> str:
    """Name of the operator, whether in place or not."""
    return op_name(node).rstrip("_") if node.op == "call_function" else ""


def _path_to_scores(node: Node, longest: int = _LONGEST) -> list[Node] | None:
    """From a product of two computed tensors to `node`; None where there is no such product."""
    if _name(node) in ("matmul", "einsum", "bmm", "baddbmm"):
        return [node] if read_projection(node) is None else None
    for source in node.all_input_nodes if longest else []:
        path = _path_to_scores(source, longest - 1)
        if path is not None:
            return [*path, node]
    return None


def _fold(gm: GraphModule, path: list[Node], softmax: Node) -> None:
    """Puts one node where the weights [B, H, T, S] meet the values."""
    if softmax.args[1] not in (-1, 3):
        raise NotProvable("it is over another dim than the last")
    scores = _Product.of(path[0])
    scale, softcap = _scale_and_cap(path)
    weights, result = _meeting(softmax)
    b, h, i, j = scores.result
    rows = 0 if i in scores.dims[0] else 1  # which factor has the queries
    if _reaches_output(softmax, result.node):
        raise NotProvable("the model uses its weights for something else")
    at = result.factors.index(weights)
    wb, wh, wi, wj = result.dims[at]
    width = next(iter({*result.result} - {*result.dims[at]}), "")
    with gm.graph.inserting_before(result.node):
        query = _permuted(gm, *scores.factor(rows, f"{b}{h}{i}*"))
        key = _permuted(gm, *scores.factor(1 - rows, f"{b}{h}{j}*"))
        value = _permuted(gm, result.factors[1 - at], result.dims[1 - at], wb + wh + wj + width)
        args = (query, key, value, _mask(gm, path, query, key))
        if softcap is None:
            sdpa = aten.scaled_dot_product_attention.default
            node = gm.graph.call_function(sdpa, args, {"scale": scale})
        else:
            options = {"scale": scale, "softcap": softcap}
            node = gm.graph.call_function(softcapped_attention, args, options)
        order = wb + wh + wi + width
        whole = result.node.meta["val"].permute([result.result.index(x) for x in order])
        node.meta = {**result.node.meta, "val": whole, "weights": softmax.meta["val"].shape}
        result.node.replace_all_uses_with(_permuted(gm, node, order, result.result))


def _scale_and_cap(path: list[Node]) -> tuple[float, float | None]:
    """(a c, c) where the steps make c tanh(a s) of a score s, (a, None) where they make a s."""
    scale, softcap = 1.0, None
    for before, node in pairwise(path):
        name = _name(node)
        if name not in _STEPS | _SAME or (name == "tanh" and softcap is not None):
            raise NotProvable(f"{op_name(node)} stands between its product and the softmax")
        if name == "tanh":
            softcap = 1.0
        elif name in ("mul", "div"):
            number = next((a for a in node.args if isinstance(a, int | float)), None)
            if number is None or (name == "div" and node.args[0] is not before):
                raise NotProvable("its scores are scaled by more than a number")
            number = 1 / number if name == "div" else number
            scale, softcap = scale * number, softcap and softcap * number
    return scale, softcap


def _meeting(softmax: Node) -> tuple[Node, _Product]:
    """The weights as they stand in the product with the values, and that product."""
    for weights in _same_after(softmax):
        for user in weights.users:
            if _name(user) in ("matmul", "einsum", "bmm"):
                return weights, _Product.of(user)
    raise NotProvable("its weights meet no values in a product")


def _same_after(node: Node) -> Iterator[Node]:
    """The node, and what only copies or converts it."""
    yield node
    for user in node.users:
        if _name(user) == "dropout" and user.args[2] and user.args[1]:
            raise NotProvable(f"dropout {user.args[1]:g} is active")
        if _name(user) in _SAME:
            yield from _same_after(user)


def _reaches_output(node: Node, without: Node) -> bool:
    """Whether the graph's output depends on a node by another way than through `without`."""
    seen, stack = {without}, [node]
    while stack:
        users = set(stack.pop().users) - seen
        if any(user.op == "output" for user in users):
            return True
        seen |= users
        stack.extend(users)
    return False


def _mask(gm: GraphModule, path: list[Node], query: Node, key: Node) -> Node:
    """The steps on scores that are zero, of one sequence and head."""
    scores = path[0].meta["val"]
    options = {"dtype": scores.dtype, "device": scores.device}
    sizes = [1, 1, _size(gm, query, 2), _size(gm, key, 2)]
    node = gm.graph.call_function(aten.zeros.default, (sizes,), options)
    copies = {path[0]: node}
    for step in path[1:]:
        node = copies[step] = gm.graph.node_copy(step, lambda n: copies.get(n, n))
    return gm.graph.call_function(aten.to.dtype, (node, query.meta["val"].dtype))


def _size(gm: GraphModule, node: Node, dim: int) -> int | Node:
    """A number, or what reads it where it may change from call to call."""
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else gm.graph.call_function(aten.sym_size.int, (node, dim))


def _permuted(gm: GraphModule, node: Node, dims: str, wanted: str) -> Node:
    """The tensor with its dims, named by letters, in another order."""
    if dims == wanted:
        return node
    order = [dims.index(x) for x in wanted]
    permuted = gm.graph.call_function(aten.permute.default, (node, order))
    permuted.meta = {**node.meta, "val": node.meta["val"].permute(order)}
    return permuted
