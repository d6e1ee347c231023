"""What the finder says must reproduce the attention it speaks of; the rest is named and left."""

import subprocess
import sys
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from model_table import PAGE, converted_row, find, first_of_each_reason, left_row
from models import MIXED, MODELS, REJECTED, llama
from torch import Tensor, nn

from flacompile.passes.capture import capture, evaluating, record_calls, without_cache
from flacompile.passes.find_attention import AttentionSite, describe, find_attention
from flacompile.passes.outline import outline_sites
from flacompile.passes.swap_attention import (
    PlainConvention,
    restore_attention,
    swap_attention,
)
from flacompile.passes.walk import attention_nodes, describe_graph
from flacompile.passes.written_out import fold_attention


def rotate(x: Tensor, site: AttentionSite) -> Tensor:
    """x [B, H, T, K]: pairs as complex numbers times e^(i t w)."""
    if site.rotary is None:
        return x
    w = torch.tensor(site.rotary.inv_freq, dtype=x.dtype)
    turn = torch.polar(
        torch.tensor(site.rotary.factor, dtype=x.dtype), torch.arange(x.shape[2])[:, None] * w
    )
    n = len(w)
    even, odd = (
        (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
        if site.rotary.interleaved
        else (slice(n), slice(n, 2 * n))
    )
    turned, out = torch.complex(x[..., even], x[..., odd]) * turn, x.clone()
    out[..., even], out[..., odd] = turned.real, turned.imag
    return out


def reference(site: AttentionSite, model: nn.Module, x: Tensor) -> Tensor:
    """y [B, T, D] of the attention as the site describes it, in float64."""
    w = site.weights(model)._make(None if t is None else t.double() for t in site.weights(model))

    def heads(weight, bias, norm=None, scale=None):
        y = F.linear(x.double(), weight, bias)
        if norm is not None:
            y = y.unflatten(-1, (-1, site.head_dim)) if norm.per_head else y
            y = F.rms_norm(
                y, y.shape[-1:], None if scale is None else scale + norm.offset, norm.eps
            )
        y = y.reshape(*x.shape[:2], -1, site.head_dim).transpose(1, 2)
        return y.repeat_interleave(site.num_heads // y.shape[1], 1)

    q = rotate(heads(w.q_weight, w.q_bias, site.q_norm, w.q_norm), site)
    k = rotate(heads(w.k_weight, w.k_bias, site.k_norm, w.k_norm), site)
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    seen = (distance >= 0) & (distance < (site.window or x.shape[1]))
    scores = site.scale * q @ k.mT
    scores = scores if site.softcap is None else site.softcap * (scores / site.softcap).tanh()
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    y = (p @ heads(w.v_weight, w.v_bias)).transpose(1, 2).flatten(2)
    return F.linear(y, w.o_weight, w.o_bias)


class Projections(nn.Module):
    """Stands for a mixer in the swap: the first and the last projection and a bias to train."""

    def __init__(self, site: AttentionSite, model: nn.Module):
        super().__init__()
        weights = site.weights(model)
        self.register_buffer("q", weights.q_weight)
        self.register_buffer("o", weights.o_weight)
        self.bias = nn.Parameter(torch.zeros(site.hidden_size))

    def forward(self, x: Tensor, state=None, *, mask=None):
        return F.linear(F.linear(x, self.q), self.o) + self.bias, state


@pytest.mark.parametrize("name", MODELS)
def test_sites_reproduce_every_attention(name):
    case = MODELS[name]()
    findings = find(case)
    assert not findings.rejected
    assert converted_row(name, findings.sites) in PAGE.read_text()
    sites = outline_sites(case.model, findings.sites, case.inputs, case.kwargs)
    assert len(sites) == 2
    with evaluating(case.model):
        paths = {site.path for site in sites}
        calls = record_calls(case.model, paths, case.inputs, case.kwargs)
    for site in sites:
        convention, call = PlainConvention.of(site), calls[site.path]
        x, y = convention.read(call.args, call.kwargs).x, convention.output(call.result)
        ours = reference(site, case.model, x).to(y.dtype)
        torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_with_reason(name):
    build, reason = REJECTED[name]
    findings = find(build())
    assert findings.sites == ()
    assert findings.rejected
    assert all(item.reason.startswith(reason) for item in findings.rejected), findings.rejected
    for item in first_of_each_reason(findings.rejected):
        assert left_row(name, item) in PAGE.read_text()


@pytest.mark.parametrize("name", MIXED)
def test_what_is_left_has_its_own_reason(name):
    build, converted, left = MIXED[name]
    findings = find(build())
    assert len(findings.sites) == 2
    assert all(fnmatch(site.path, converted) for site in findings.sites)
    for item in findings.rejected:
        assert [r for p, r in left.items() if fnmatch(item.path, p) and item.reason.startswith(r)]
    assert len(findings.rejected) == 2 * len(left)
    assert converted_row(name, findings.sites) in PAGE.read_text()
    for item in first_of_each_reason(findings.rejected):
        assert left_row(name, item) in PAGE.read_text()


def test_mixed_model_keeps_the_provable_layers():
    case = MODELS["handwritten"]()
    case.model.blocks[0].attention.is_causal = False
    findings = find(case)
    assert [site.path for site in findings.sites] == ["blocks.1.attention"]
    assert [item.path for item in findings.rejected] == ["blocks.0.attention"]


@pytest.mark.parametrize("name", ["llama", "handwritten_rope"])
def test_frequencies_are_exact(name):
    site = find(MODELS[name]()).sites[-1]
    want = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    assert torch.equal(torch.tensor(site.rotary.inv_freq), want)


@pytest.mark.parametrize("window", [8, 40])
def test_window_shows_in_the_default_example(window):
    model = llama("Mistral", sliding_window=window)().model
    assert [site.window for site in find_attention(model).sites] == [window, window]


def test_window_too_long_to_check_is_rejected():
    model = llama("Mistral", sliding_window=100_000)().model
    findings = find_attention(model)
    assert findings.sites == ()
    assert (
        findings.rejected[0].reason == "a window of 100000 is in the config, too long to be checked"
    )


def test_layers_of_different_kinds():
    kinds = ["sliding_attention", "full_attention"]
    build = llama("Gemma3Text", "Gemma3", head_dim=16, sliding_window=8, layer_types=kinds)
    sites = find(build()).sites
    assert [site.window for site in sites] == [8, None]
    assert [site.q_norm.offset for site in sites] == [1.0, 1.0]
    assert sites[0].rotary != sites[1].rotary


def test_eager_model_is_switched_for_the_capture_only():
    model = llama(attn_implementation="eager")().model
    findings = find_attention(model)
    assert findings.notes == ("switched from eager to sdpa",)
    assert findings.sites == find_attention(llama()().model).sites
    assert model.config._attn_implementation == "eager"


def test_experts_are_switched_for_the_capture_only():
    case = MODELS["mixtral"]()
    assert len(find(case).sites) == 2
    assert case.model.config._experts_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_number_types(dtype):
    case = MODELS["qwen3"]()
    findings = find(case._replace(model=case.model.to(dtype)))
    assert len(findings.sites) == 2
    assert findings.sites[0].weights(case.model).q_weight.dtype == dtype


def test_model_is_left_as_it_was():
    case = MODELS["llama"]()
    case.model.train()
    case.model.model.layers[0].eval()
    modes = [module.training for module in case.model.modules()]
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    find(case)
    assert modes == [module.training for module in case.model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in case.model.parameters())
    assert not any(module._forward_hooks for module in case.model.modules())


def test_weights_are_detached_views():
    case = MODELS["handwritten"]()
    weights = find(case).sites[0].weights(case.model)
    packed = case.model.blocks[0].attention.qkv.weight
    assert not weights.k_weight.requires_grad
    assert weights.k_weight.data_ptr() == packed[32:].data_ptr()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"example_inputs: expected the inputs .* got none"):
        find_attention(MODELS["handwritten"]().model)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(
        ValueError, match=r"rope_type: expected .* got dynamic in model\.rotary_emb"
    ):
        find_attention(llama(rope_parameters=dynamic)().model)


@pytest.mark.parametrize("name", ["gptj", "gemma2", "handwritten_einsum", "handwritten_softmax"])
def test_folded_graph_computes_the_same(name):
    case = MODELS[name]()
    with evaluating(case.model):
        kwargs = without_cache(case.model, {})
        gm = capture(case.model, case.inputs, kwargs)
        before = torch.utils._pytree.tree_leaves(gm(*case.inputs, **kwargs))[0]
        assert not attention_nodes(gm)
        assert fold_attention(gm) == []
        assert len(attention_nodes(gm)) == 2
        after = torch.utils._pytree.tree_leaves(gm(*case.inputs, **kwargs))[0]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_window_hidden_by_a_short_example():
    """The config's name of it is known, and masks of longer sequences are looked at."""
    sites = find_attention(MODELS["gpt_neo"]().model).sites
    assert [site.window for site in sites] == [None, 30]


def test_passes_do_not_need_transformers():
    code = (
        "import sys, flacompile.passes.find_attention, flacompile.passes.swap_attention;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_snapshot_of_findings():
    case = MODELS["qwen3"]()
    findings = find(case)
    assert_expected_inline(
        describe(findings),
        """\
model.layers.0.self_attn (Qwen3Attention): hidden 32, heads 4/2 x 16, scale 0.25, causal
  q: q_proj.weight
  k: k_proj.weight
  v: v_proj.weight
  o: o_proj.weight
  rotary: half-split, 16 dims, last 0.0003162
  norms: q rms per head, eps 1e-06; k rms per head, eps 1e-06
  call: x = 'hidden_states', returns 0 of 2
model.layers.1.self_attn (Qwen3Attention): hidden 32, heads 4/2 x 16, scale 0.25, causal
  q: q_proj.weight
  k: k_proj.weight
  v: v_proj.weight
  o: o_proj.weight
  rotary: half-split, 16 dims, last 0.0003162
  norms: q rms per head, eps 1e-06; k rms per head, eps 1e-06
  call: x = 'hidden_states', returns 0 of 2""",
    )


def test_snapshot_of_packed_findings():
    assert_expected_inline(
        describe(find(MODELS["gpt2"]())),
        """\
transformer.h.0.attn (GPT2Attention): hidden 32, heads 4/4 x 8, scale 0.3536, causal
  q: c_attn.weight[0:32] transposed + bias
  k: c_attn.weight[32:64] transposed + bias
  v: c_attn.weight[64:96] transposed + bias
  o: c_proj.weight transposed + bias
  rotary: none
  norms: q none; k none
  call: x = 0, returns 0 of 2
transformer.h.1.attn (GPT2Attention): hidden 32, heads 4/4 x 8, scale 0.3536, causal
  q: c_attn.weight[0:32] transposed + bias
  k: c_attn.weight[32:64] transposed + bias
  v: c_attn.weight[64:96] transposed + bias
  o: c_proj.weight transposed + bias
  rotary: none
  norms: q none; k none
  call: x = 0, returns 0 of 2""",
    )


def test_snapshot_of_the_graph_before_and_after():
    case = MODELS["handwritten"]()
    findings = find(case)
    site = findings.sites[0]
    assert_expected_inline(
        describe_graph(findings.graph_module, site.path),
        """\
linear = linear(layer_norm, qkv.weight, qkv.bias)
view = view(linear)
permute = permute(view)
unbind = unbind(permute)
getitem = getitem(unbind)
getitem_1 = getitem(unbind)
getitem_2 = getitem(unbind)
mul = mul(getitem)
scaled_dot_product_attention = scaled_dot_product_attention(mul, getitem_1, getitem_2)
transpose = transpose(scaled_dot_product_attention)
reshape = reshape(transpose)
linear_1 = linear(reshape, out.weight, out.bias)""",
    )
    swap_attention(case.model, site, Projections(site, case.model))
    with evaluating(case.model):
        graph = capture(case.model, case.inputs, case.kwargs)
    assert_expected_inline(
        describe_graph(graph, site.path),
        """\
linear = linear(layer_norm, mixer.q)
linear_1 = linear(linear, mixer.o)
add_1 = add(linear_1, mixer.bias)""",
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "handwritten"])
def test_swap_routes_and_restores(name):
    case = MODELS[name]()
    logits = lambda: torch.utils._pytree.tree_leaves(case.model(*case.inputs))[0]  # noqa: E731
    site = find(case).sites[-1]
    original = case.model.get_submodule(site.path)
    frozen = next(original.parameters()).requires_grad_(False)
    want = logits()
    swapped = swap_attention(case.model, site, Projections(site, case.model))
    assert not any(p.requires_grad for p in original.parameters())
    assert swapped.mixer.bias.requires_grad
    outputs = {}
    for swapped.route in ("mixer", "zero", "original"):
        outputs[swapped.route] = logits()
    assert torch.equal(outputs["original"], want)
    assert not torch.allclose(outputs["mixer"], outputs["zero"], atol=1e-3)
    assert not torch.allclose(outputs["zero"], want, atol=1e-3)
    assert restore_attention(case.model, site.path) is original
    assert torch.equal(logits(), want)
    assert [p for p in original.parameters() if not p.requires_grad] == [frozen]


@pytest.mark.parametrize("name", ["llama", "handwritten"])
def test_swapped_model_traces_in_one_graph(name):
    case = MODELS[name]()
    for site in find(case).sites:
        swap_attention(case.model, site, Projections(site, case.model))
    leaf = lambda out: torch.utils._pytree.tree_leaves(out)[0]  # noqa: E731
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    kwargs = {"use_cache": False} if name == "llama" else {}
    ours, want = leaf(compiled(*case.inputs, **kwargs)), leaf(case.model(*case.inputs, **kwargs))
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)


def test_swap_errors():
    case = MODELS["handwritten"]()
    site = find(case).sites[0]
    with pytest.raises(ValueError, match=r"a swap .* got blocks\.0\.attention: PackedAttention"):
        restore_attention(case.model, site.path)
    swapped = swap_attention(case.model, site, Projections(site, case.model))
    with pytest.raises(ValueError, match=r"got blocks\.0\.attention, already swapped"):
        swap_attention(case.model, site, swapped.mixer)
    swapped.original, swapped.route = None, "original"
    with pytest.raises(ValueError, match="route: expected 'mixer' or 'zero', as finalize"):
        case.model(*case.inputs)


def test_tuple_results_keep_their_shape():
    convention = PlainConvention("hidden_states", 3, 1)
    y = torch.ones(1)
    assert convention.write(convention.read((), {"hidden_states": y}), y, None) == (None, y, None)
    assert convention.output((None, y, None)) is y
