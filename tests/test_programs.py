"""What is exported, before it is compiled: one step over explicit states, at any B and T."""

from importlib import import_module
from itertools import pairwise

import pytest
import sympy
import torch
from models import MODELS, llama
from packages import mixed
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

import flacompile
from flacompile import lm
from flacompile.export.gate import compare, references
from flacompile.export.programs import SPAN, Step, all_mixers, capture
from flacompile.export.strides import remembered_strides
from flacompile.layers import MIXERS
from flacompile.passes.decompose import decompose
from flacompile.passes.stream_weights import stream_weights
from flacompile.passes.swap_attention import swapped

LENGTHS = (1, 64, 65, SPAN + 1)
ROOM = SPAN + 40


def of_all_mixers():
    """A Llama whose every layer is nothing but another mixer."""
    model = llama(num_hidden_layers=len(MIXERS), num_key_value_heads=4)().model.double()
    mixed(model, MIXERS)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def published(name):
    """A tiny model of ``flacompile.lm`` with a layer of softmax."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_heads": 2}
    sizes |= {"head_dim": 16, "state_size": 8, "expand_ratio": 16, "intermediate_size": 64}
    known = lm.KINDS[name].defaults
    fields = {key: value for key, value in sizes.items() if key in known}
    fields["attn"] = {"layers": [1], "num_heads": 2, "window_size": 9 if name == "samba" else None}
    config, _, model = lm.MODELS[name]
    torch.manual_seed(0)
    made = model(config(**fields)).eval()
    for parameter in made.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


@torch.no_grad()
def test_every_mixer_in_one_program():
    """That of each mixer alone, opened and with a state, is in test_mixers."""
    model = of_all_mixers()
    cases = references(model, LENGTHS, ROOM)
    assert {len(case.ids) for case in cases} == {1, 2, 3}
    with all_mixers(model):
        step = Step(model, ROOM)
        errors = compare({"prefill": step, "decode": step}, step.begin, cases)
        assert max(errors.values()) < 1e-9
        program = capture(step, "prefill")
        both = {"prefill": program.module(check_guards=False), "decode": step}
        assert compare(both, step.begin, cases)["prefill"] < 1e-9


STORED = {  # dtype, config of torchao, and how many tensors are read as others
    "fp32": (torch.float32, None, 0),
    "bf16": (torch.bfloat16, None, 3 * (4 + 1)),
    "fp16": (torch.float16, None, 0),
    "int8": (torch.float32, Int8WeightOnlyConfig(), 4 + 1),
}


@pytest.mark.parametrize(("dtype", "config", "views"), STORED.values(), ids=STORED)
@torch.no_grad()
def test_weights_are_read_as_they_are_stored(dtype, config, views, monkeypatch):
    """In words of 32 bits where they fill them, and in four places where the rows go into four."""
    monkeypatch.setattr(import_module("flacompile.passes.stream_weights"), "LARGE", 1)
    torch.manual_seed(0)
    sizes = pairwise((24, 8, 6, 3, 4))
    layers = nn.Sequential(*(nn.Linear(*pair) for pair in sizes)).to(dtype)
    layers[2].weight = nn.Parameter(torch.randn(6, 3).to(dtype).t())
    if config is not None:
        flacompile.quantize_(layers, config)
    example, dims = torch.ones(2, 24, dtype=dtype), ({0: torch.export.Dim.DYNAMIC},)
    program = decompose(torch.export.export(layers, (example,), dynamic_shapes=dims))
    one = stream_weights(program)
    assert count(one, "linear") == count(one, "mm") == 0
    assert sum(node.target is torch.ops.aten.view.dtype for node in one.graph.nodes) == views
    for rows in (1, 3):
        x = torch.randn(rows, 24).to(dtype)
        torch.testing.assert_close(one.module()(x), layers(x))


def count(program, name):
    """How many nodes of a program are of that operation."""
    return sum(name in str(node.target).split(".") for node in program.graph.nodes)


@pytest.mark.parametrize("name", lm.KINDS)
@torch.no_grad()
def test_published_models_step_as_they_run(name):
    model = published(name)
    cases = references(model, (1, 65), None)
    with all_mixers(model):
        step = Step(model, 200)
        errors = compare({"prefill": step, "decode": step}, step.begin, cases)
    assert max(errors.values()) < 1e-5


def stale(step):
    """The recurrent states stay what they were."""

    def run(ids, states):
        logits, *after = step(ids, states)
        parts = zip(step.names, states, after, strict=True)
        return logits, *(old if "recurrent" in name else new for name, old, new in parts)

    return run


def one_further(step):
    """The position of what follows a first token."""
    return lambda ids, states: step(ids, [x + (x > 0) if x.ndim == 1 else x for x in states])


def lost_chunk(step):
    """What follows the first chunk does not know its recurrent states."""

    def run(ids, states):
        if ids.shape[1] <= 64:
            return step(ids, states)
        _, *states = stale(step)(ids[:, :64], states)
        return step(ids[:, 64:], states)

    return run


ROUNDED = {  # dtype, layers, config of torchao
    "deep": (torch.bfloat16, 30, None),
    "fp16": (torch.float16, 4, None),
    "int8": (torch.bfloat16, 4, Int8WeightOnlyConfig()),
}


@pytest.mark.parametrize(("dtype", "layers", "config"), ROUNDED.values(), ids=ROUNDED)
@torch.no_grad()
def test_the_gate_allows_rounding_and_no_mistake(dtype, layers, config):
    """Also that of a package that rounds less than the model does."""
    model = llama(num_hidden_layers=layers)().model.to(dtype)
    model = flacompile.convert(model, "gated_deltanet", init="neutral")
    model = flacompile.finalize(model).eval()
    if config is not None:
        flacompile.quantize_(model, config)
    cases = references(model, (1, 65), None)
    with all_mixers(model):
        step = Step(model, None)
        own = max(compare({"prefill": step, "decode": step}, step.begin, cases).values())
        assert own < cases[0].allowed < 0.5
        for mistake in (stale, one_further, lost_chunk):
            wrong = mistake(step)
            with pytest.raises(ValueError, match="package: expected the model's values within"):
                compare({"prefill": wrong, "decode": wrong}, step.begin, cases)
    model.float()
    with all_mixers(model):
        exact = Step(model, None)
        errors = compare({"prefill": exact, "decode": exact}, exact.begin, cases)
    assert max(errors.values()) < 1e-3 * own


HYBRIDS = {
    "window": ("mistral", {"window": 9}),
    "kept_window": ("mistral", {"keep": [1], "window": 9}),
    "untouched": ("qwen3", None),
    "learned_positions": ("gpt2", {"keep": [1]}),
}


@pytest.mark.parametrize(("model", "options"), HYBRIDS.values(), ids=HYBRIDS)
@torch.no_grad()
def test_kept_layers_step_as_they_run(model, options):
    model = MODELS[model]().model
    if options is not None:
        flacompile.convert(model, "gla", init="neutral", **options)
    before = dict(model.named_modules())
    cases = references(model, (1, 40), 80)
    with all_mixers(model):
        assert len(swapped(model)) == model.config.num_hidden_layers
        step = Step(model, 80)
        errors = compare({"prefill": step, "decode": step}, step.begin, cases)
    assert max(errors.values()) < 1e-5
    assert dict(model.named_modules()) == before


def test_attention_that_cannot_be_proved_is_refused():
    model = MODELS["llama"]().model
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    message = "expected a mixer or a causal attention that can be proved in each of 2 layers"
    with pytest.raises(ValueError, match=message), all_mixers(model):
        pass
    assert not swapped(model)


def test_strides_are_found_once():
    """Of more expressions than Inductor's own cache holds."""
    from torch._inductor.codegen import cpp

    x, short = sympy.Symbol("x", integer=True), cpp.stride_at_vec_range
    with remembered_strides():
        for _ in range(2):
            assert [cpp.stride_at_vec_range(i * x, x) for i in range(200)] == list(range(200))
        assert cpp.stride_at_vec_range.cache_info().misses == 200
    assert cpp.stride_at_vec_range is short
