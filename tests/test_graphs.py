"""Graphs as input: rewritten where attention stands, otherwise the same graph, alive as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from models import DIM, GPT, LAYERS, MODELS, VOCAB, Case, InlineBlock, PackedAttention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, ShapesCollection, export

import flacompile
from flacompile.convert import report
from flacompile.passes.capture import capture
from flacompile.passes.find_attention import find_attention
from flacompile.passes.swap_attention import routed, swap_attention, swapped
from flacompile.passes.walk import attention_nodes, op_name

SIZES = ((2, 20), (1, 1), (3, 33), (1, 70))
NAMES = ["llama", "gpt2", "handwritten_rope", "handwritten_inline"]


def ids_of(batch: int, time: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(time))


def call(model: nn.Module, ids: Tensor, case: Case) -> Tensor:
    """Logits, the model called as it was exported."""
    return torch.utils._pytree.tree_leaves(model(ids, **options(case)))[0]


def options(case: Case) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(case.model, "config") else {}


def exported(case: Case, kwargs: dict[str, Any] | None = None) -> torch.export.ExportedProgram:
    """A program for any batch and length."""
    kwargs = options(case) if kwargs is None else kwargs
    shapes = ShapesCollection()
    shapes[case.inputs[0]] = {0: Dim.AUTO, 1: Dim.AUTO}
    return export(case.model, case.inputs, kwargs, dynamic_shapes=shapes, strict=False)


GRAPHS = {
    "program": exported,
    "its module": lambda case: exported(case).module(),
    "its unguarded module": lambda case: exported(case).module(check_guards=False),
    "captured": lambda case: capture(case.model, case.inputs, options(case)),
    "traced": lambda case: torch.fx.symbolic_trace(case.model),
}
FORMS = [(name, "program") for name in NAMES] + [
    ("handwritten_rope", "its module"),
    ("handwritten_rope", "its unguarded module"),
    ("handwritten_rope", "captured"),
    ("handwritten", "traced"),
]


def names_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def converted(name: str, form: str, mixer: str = "attn", **arguments: Any) -> tuple[Case, Any]:
    case = MODELS[name]()
    given = GRAPHS[form](case)
    example = None if form == "program" else case.inputs
    model = flacompile.convert(given, mixer, example_inputs=example, **arguments)
    assert model is not given
    return case, model


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_attention_for_attention_is_exact(name, form):
    """At sizes other than the example's, where the graph that was given allowed others."""
    case, model = converted(name, form, init="neutral")
    assert len(swapped(model)) == LAYERS
    for size in SIZES if form != "captured" else SIZES[:1]:
        want = call(case.model, ids_of(*size), case)
        assert distance(call(model, ids_of(*size), case), want) < 1e-5
        with routed(model, "original"):
            assert call(model, ids_of(*size), case).equal(want)
    flacompile.finalize(model)
    assert not attention_nodes(model)
    names = names_of(model)
    tree = flacompile.convert(case.model, "attn", init="neutral", example_inputs=case.inputs)
    assert names == names_of(flacompile.finalize(tree))
    assert names >= {f"{path}.mixer.q_proj.weight" for path in swapped(model)}


def test_result_trains_compiles_and_exports():
    case, model = converted("handwritten_inline", "program", "simple_gla")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
    for size in ((2, 20), (3, 33), (4, 70)):
        got, want = (call(m, ids_of(*size), case) for m in (compiled, model))
        assert distance(got, want) < 1e-5
        weights = [p for layer in swapped(model).values() for p in layer.mixer.parameters()]
        ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (got, want))
        assert all(distance(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == 2  # the second is for all sizes
    again = exported(case._replace(model=model), options(case)).module()
    assert distance(call(again, ids_of(4, 70), case), call(model, ids_of(4, 70), case)) < 1e-5


def test_calibration_and_routes_of_a_graph():
    """As in the module tree, with the same figures."""
    case, model = converted("handwritten", "program", "gla", keep=[0])
    tree = flacompile.convert(case.model, "gla", example_inputs=case.inputs, keep=[0])
    assert list(swapped(model)) == list(swapped(tree)) == ["blocks.1.attention"]
    (ours,), (theirs,) = report(model).layers, report(tree).layers
    assert (ours.before, ours.after) == pytest.approx((theirs.before, theirs.after), rel=1e-4)
    assert len(report(model).kept) == len(attention_nodes(model)) == 1


def test_bidirectional_attention_of_a_graph_is_left_alone():
    case = MODELS["handwritten"]()
    case.model.blocks[0].attention.is_causal = False
    program = exported(case)
    model = flacompile.convert(program, "attn", init="neutral")
    assert list(swapped(model)) == ["blocks.1.attention"]
    assert "blocks.0.attention: left alone, bidirectional" in str(report(model))
    assert distance(model(ids_of(3, 9)), case.model(ids_of(3, 9))) < 1e-5
    case.model.blocks[1].attention.is_causal = False
    with pytest.raises(ValueError, match=r"got none\n  blocks\.0\.attention: bidirectional"):
        flacompile.convert(exported(case))


def test_graph_before_and_after():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(DIM), PackedAttention())
    x = torch.randn(2, 5, DIM)
    shapes = {0: Dim.AUTO, 1: Dim.AUTO}
    gm = export(model, (x,), dynamic_shapes=(shapes,), strict=False).module(check_guards=False)
    assert_expected_inline(
        text_of(gm),
        """\
sym_size_int_2 = sym_size(input_1)
sym_size_int_3 = sym_size(input_1)
layer_norm = layer_norm(input_1, 0.weight, 0.bias)
linear = linear(layer_norm, 1.qkv.weight, 1.qkv.bias)
view = view(linear, sym_size_int_2, sym_size_int_3)
permute = permute(view)
unbind = unbind(permute)
getitem = getitem(unbind)
getitem_1 = getitem(unbind)
getitem_2 = getitem(unbind)
mul = mul(getitem)
scaled_dot_product_attention = scaled_dot_product_attention(mul, getitem_1, getitem_2)
transpose = transpose(scaled_dot_product_attention)
reshape = reshape(transpose, sym_size_int_2, sym_size_int_3)
linear_1 = linear(reshape, 1.out.weight, 1.out.bias)""",
    )
    converted = flacompile.convert(gm, "attn", example_inputs=(x,))
    assert_expected_inline(
        text_of(converted),
        """\
layer_norm = layer_norm(input_1, 0.weight, 0.bias)
attention = 1(layer_norm, input_1)""",
    )
    assert_expected_inline(
        text_of(swapped(converted)["1"].original),
        """\
sym_size_int_2 = sym_size(input_1)
sym_size_int_3 = sym_size(input_1)
linear = linear(layer_norm, qkv.weight, qkv.bias)
view = view(linear, sym_size_int_2, sym_size_int_3)
permute = permute(view)
unbind = unbind(permute)
getitem = getitem(unbind)
getitem_1 = getitem(unbind)
getitem_2 = getitem(unbind)
mul = mul(getitem)
scaled_dot_product_attention = scaled_dot_product_attention(mul, getitem_1, getitem_2)
transpose = transpose(scaled_dot_product_attention)
reshape = reshape(transpose, sym_size_int_2, sym_size_int_3)
linear_1 = linear(reshape, out.weight, out.bias)""",
    )


def text_of(gm: torch.fx.GraphModule) -> str:
    lines = []
    for node in gm.graph.nodes:
        inputs = ", ".join(
            str(n.target) if n.op == "get_attr" else n.name for n in node.all_input_nodes
        )
        if node.op.startswith("call"):
            target = node.target if node.op == "call_module" else op_name(node)
            lines.append(f"{node.name} = {target}({inputs})")
    return "\n".join(lines)


def dropping() -> Case:
    """Blocks that attend inline and drop out."""

    class Dropping(InlineBlock):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    torch.manual_seed(0)
    return Case(GPT(Dropping).eval(), (ids_of(2, 20),), {})


def test_inline_block_in_the_tree():
    """The rest of the block is what it was; its attention has routes, a teacher and an end."""
    case = MODELS["handwritten_inline"]()
    model, ids = case.model, ids_of(3, 33)
    blocks, want = list(model.blocks), model(ids)
    others = {n: p for n, p in model.named_parameters() if ".qkv." not in n and ".out." not in n}
    flacompile.convert(model, "gla", example_inputs=case.inputs)
    assert list(swapped(model)) == ["blocks.0.attention", "blocks.1.attention"]
    after = dict(model.named_parameters())
    assert all(after[n] is p and p.requires_grad for n, p in others.items())
    assert not any(p.requires_grad for n, p in after.items() if ".original." in n)
    with routed(model, "original"):
        assert model(ids).equal(want)
        teacher = copy.deepcopy(model)
    with routed(model, "zero"):
        assert distance(model(ids), want) > 1e-2
    model(ids).square().mean().backward()
    assert all(p.grad is not None for p in others.values())
    assert teacher(ids).equal(want)
    flacompile.finalize(model)
    held = {id(p) for m in model.modules() for p in m.parameters()}
    assert not held & {id(p) for b in blocks for p in (b.qkv.weight, b.out.weight)}
    assert not any(block.meta for block in model.blocks)


def test_dropout_of_an_inline_block_follows_the_mode():
    case = dropping()
    ids, want = ids_of(2, 40), case.model(ids_of(2, 40))
    model = flacompile.convert(case.model, "attn", init="neutral", example_inputs=case.inputs)
    assert distance(model(ids), want) < 1e-5
    model.train()
    assert not model(ids).equal(model(ids))


def test_inline_block_is_put_back_after_an_error(monkeypatch):
    case = MODELS["handwritten_inline"]()
    blocks = list(case.model.blocks)

    def broken(*args):
        raise ArithmeticError("in the middle")

    monkeypatch.setattr(nn.Linear, "load_attention", broken, raising=False)
    monkeypatch.setattr(flacompile.layers.Attention, "load_attention", broken)
    with pytest.raises(ArithmeticError):
        flacompile.convert(case.model, "attn", example_inputs=case.inputs)
    assert list(case.model.blocks) == blocks
    assert all(p.requires_grad for p in case.model.parameters())


def test_two_attentions_in_one_forward():
    class Twice(nn.Module):
        """Two attentions written into one module."""

        def __init__(self):
            super().__init__()
            self.first, self.second = PackedAttention(), PackedAttention(per_head=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x + PackedAttention.forward(self.first, x)
            return x + PackedAttention.forward(self.second, x)

    torch.manual_seed(0)
    model = GPT(Twice).eval()
    want = model(ids_of(3, 33))
    flacompile.convert(model, "attn", init="neutral", example_inputs=(ids_of(2, 20),))
    assert list(swapped(model)) == [f"blocks.{i}.{n}" for i in (0, 1) for n in ("first", "second")]
    assert distance(model(ids_of(3, 33)), want) < 1e-5


def test_errors_name_what_they_need():
    case = MODELS["handwritten_inline"]()
    with pytest.raises(ValueError, match=r"example_inputs: .* blocks\.0, .* at least 2 rows"):
        flacompile.convert(case.model, "attn", example_inputs=(ids_of(1, 20),))
    site = find_attention(case.model, case.inputs).sites[1]
    assert (site.path, site.inline) == ("blocks.1", 0)
    with pytest.raises(
        ValueError, match=r"site: expected one with a module .* inline in 'blocks\.1'"
    ):
        swap_attention(case.model, site, nn.Identity())
    with pytest.raises(ValueError, match="example_inputs: expected those of one call"):
        flacompile.convert(torch.fx.symbolic_trace(case.model))
    model = flacompile.convert(exported(case), "attn")
    with pytest.raises(ValueError, match="expected one that is not converted"):
        flacompile.convert(model)
