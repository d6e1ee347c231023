"""Conversion: exact where softmax stays softmax, safe, complete and honest where it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from model_table import BROKEN, PAGE, results_row
from models import LAYERS, MIXED, MODELS, REJECTED, VOCAB, llama
from transformers import AutoModelForImageTextToText

import flacompile
from flacompile.convert import report
from flacompile.layers import MIXERS, Attention, GatedLinearAttention
from flacompile.layers.base import RecurrentMixer
from flacompile.layers.qkv import QKVMixer
from flacompile.passes.swap_attention import routed, swapped

LINEAR = sorted(name for name, cls in MIXERS.items() if issubclass(cls, RecurrentMixer))
TRANSFORMERS = [name for name in MODELS if not name.startswith("handwritten")]


def ids_of(seed: int, batch: int = 2, time: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, time), generator=generator)


def logits(model: torch.nn.Module, *ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        out = model(*ids, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.logits


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_attention_for_attention_is_exact(name):
    model, inputs, _ = MODELS[name]()
    ids = ids_of(7)
    want = logits(model, ids)
    flacompile.convert(model, "attn", init="neutral", example_inputs=inputs)
    assert distance(logits(model, ids), want) < 1e-5
    if name not in TRANSFORMERS:  # PyTorch's layers take other ways in training, ours no dropout
        assert distance(logits(model.train(), ids), want) < 1e-5
    assert len(swapped(model)) == LAYERS
    assert [layer.path for layer in report(model).layers] == list(swapped(model))
    for path in swapped(model):
        assert f"{path} -> attn" in str(report(model))
    assert all(layer.before < 1e-9 for layer in report(model).layers)


@pytest.mark.parametrize("name", MIXED)
def test_part_of_a_model(name):
    """A decoder's self-attention with a cache, beside that of its cross-attention, or images."""
    build, _, left = MIXED[name]
    model, _, kwargs = build()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    options["attention_mask"] = torch.ones_like(kwargs["input_ids"])
    want, tokens = logits(model, **kwargs), model.generate(**options)
    flacompile.convert(model, "attn", init="neutral", example_inputs=kwargs)
    assert distance(logits(model, **kwargs), want) < 1e-5
    assert model.generate(**options).equal(tokens)
    assert len(report(model).rejected) == LAYERS * len(left)


def test_a_model_of_images_is_saved(tmp_path):
    build, *_ = MIXED["llava"]
    model, _, inputs = build()
    flacompile.convert(model, "gla", init="neutral", example_inputs=inputs)
    model.save_pretrained(tmp_path)
    for load in (flacompile.load, AutoModelForImageTextToText.from_pretrained):
        assert logits(load(tmp_path), **inputs).equal(logits(model, **inputs))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mixtral", "gptj"])
def test_decoding_from_a_cache_is_exact(name):
    """Twelve tokens, past the window, one by one."""
    model, options = MODELS[name]().model, {"max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids_of(6, 2, 5), **options)
    flacompile.convert(model, "attn", init="neutral")
    assert model.generate(ids_of(6, 2, 5), **options).equal(want)


@pytest.mark.parametrize("name", ["handwritten_encoder", "handwritten_time_first"])
def test_padding_of_pytorchs_layers_is_not_seen(name):
    model, inputs, _ = MODELS[name]()
    ids, padding = ids_of(3), torch.arange(24) >= torch.tensor([[24], [17]])
    added = torch.zeros(ids.shape).masked_fill(padding, -torch.inf)
    want = logits(model, ids, added)
    flacompile.convert(model, "attn", init="neutral", example_inputs=inputs)
    assert distance(logits(model, ids, added)[~padding], want[~padding]) < 1e-5


def test_a_window_that_a_mixer_does_not_keep_is_said():
    note = "note: gla sees all of the past, also where the attention had a sliding window"
    for mixer, said in (("gla", True), ("attn", False)):
        model = flacompile.convert(MODELS["mistral"]().model, mixer, init="neutral")
        assert (note in str(report(model))) == said


@pytest.mark.parametrize("name", [*MODELS, *MIXED])
def test_every_model_with_every_mixer(name):
    """As the table of the documentation says; ``python tests/model_table.py`` makes it again."""
    row = results_row(name)
    assert BROKEN not in row and row in PAGE.read_text().splitlines()


def left_padded(pads: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = ids_of(3, len(pads))
    mask = torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]
    return ids, mask.long(), (mask.long().cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_left_padding_is_not_seen(name):
    model, inputs, _ = MODELS[name]()
    ids, mask, position = left_padded((0, 5))
    want = logits(model, ids, attention_mask=mask, position_ids=position)
    flacompile.convert(model, "attn", init="neutral", example_inputs=inputs)
    got = logits(model, ids, attention_mask=mask, position_ids=position)
    assert distance(got[mask.bool()], want[mask.bool()]) < 1e-5


@pytest.mark.parametrize("mixer", LINEAR)
def test_linear_mixers_do_not_see_left_padding(mixer):
    model = flacompile.convert(MODELS["qwen3"]().model, mixer)
    ids, mask, position = left_padded((0, 5))
    got = logits(model, ids, attention_mask=mask, position_ids=position)
    assert distance(got[1, 5:], logits(model, ids[1:, 5:])[0]) < 1e-5
    assert distance(got[0], logits(model, ids[:1])[0]) < 1e-5


def test_key_heads_repeated_by_row_would_be_noticed():
    """The published bug: heads 0 1 0 1 for the groups 0 0 1 1."""
    model, ids = llama()().model, ids_of(7)
    want = logits(model, ids)
    flacompile.convert(model, "attn", init="neutral")
    for layer in swapped(model).values():
        for proj in (layer.mixer.k_proj, layer.mixer.v_proj):
            rows = proj.weight.data.unflatten(0, (layer.mixer.kv_heads, -1)).repeat(2, 1, 1)
            proj.weight.data = rows.flatten(0, 1)
        layer.mixer.kv_heads = layer.mixer.config.num_heads
    assert distance(logits(model, ids), want) > 1e-2


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "handwritten_rope"])
def test_mixer_trains_and_teacher_stays(name, mixer):
    case = MODELS[name]()
    model = flacompile.convert(case.model, mixer, example_inputs=case.inputs)
    out = model(ids_of(5))
    out = out if isinstance(out, torch.Tensor) else out.logits
    assert out.isfinite().all()
    out.square().mean().backward()
    for path, layer in swapped(model).items():
        for key, parameter in layer.mixer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (path, key)
        inner = layer.mixer.projection("q") if isinstance(layer.mixer, QKVMixer) else None
        for linear in filter(None, (inner, layer.mixer.output_layer)):
            assert linear.weight.grad.any()
        assert not any(p.requires_grad or p.grad is not None for p in layer.original.parameters())


class Silent(torch.nn.Module):
    """An attention that adds nothing."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner
        self.layer_idx = getattr(inner, "layer_idx", None)

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return torch.zeros_like(out)
        return torch.zeros_like(out[0]), *out[1:]


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "handwritten"])
def test_routes(name, mixer):
    case = MODELS[name]()
    model, ids = case.model, ids_of(9)
    want, silent = logits(model, ids), copy.deepcopy(model)
    flacompile.convert(model, mixer, example_inputs=case.inputs)
    for path in swapped(model):
        silent.set_submodule(path, Silent(silent.get_submodule(path)))
    mixed = logits(model, ids)
    with routed(model, "original"):
        assert logits(model, ids).equal(want)
    with routed(model, "zero"):
        assert distance(logits(model, ids), logits(silent, ids)) < 1e-5
    assert logits(model, ids).equal(mixed)
    if mixer not in ("attn", "mla", "hybrid"):  # whose window is longer than the text
        assert distance(mixed, want) > 1e-3


def test_finalize_drops_the_teacher():
    model = flacompile.convert(llama()().model)
    ids = ids_of(2)
    want, count = logits(model, ids), sum(p.numel() for p in model.parameters())
    teacher = sum(p.numel() for s in swapped(model).values() for p in s.original.parameters())
    assert flacompile.finalize(model) is model
    assert sum(p.numel() for p in model.parameters()) == count - teacher
    assert logits(model, ids).equal(want)
    with (
        routed(model, "original"),
        pytest.raises(ValueError, match="route: expected 'mixer' or 'zero', as finalize"),
    ):
        logits(model, ids)


KEEP = {
    "none": ((), []),
    "first": ([0], [0]),
    "last": ([-1], [3]),
    "both ends": ([0, -1], [0, 3]),
    "twice the same": ([3, -1], [3]),
    "half": (0.5, [1, 3]),
    "quarter": (0.25, [2]),
    "share too small for one": (0.1, []),
}


@pytest.mark.parametrize(("keep", "kept"), KEEP.values(), ids=KEEP)
def test_keep(keep, kept):
    model = flacompile.convert(
        llama(num_hidden_layers=4)().model, "simple_gla", keep=keep, init="neutral"
    )
    paths = [f"model.layers.{i}.self_attn" for i in range(4)]
    assert list(swapped(model)) == [p for i, p in enumerate(paths) if i not in kept]
    assert list(report(model).kept) == [paths[i] for i in kept]
    assert str(report(model)).count(": kept") == len(kept)


BREAKS = {
    "in a later mixer": (GatedLinearAttention, "load_attention", 2),
    "in calibration": (GatedLinearAttention, "scale_heads", 4),
    "in the swap itself": (torch.nn.Module, "set_submodule", 2),
}


@pytest.mark.parametrize(("owner", "name", "call"), BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_all_or_nothing(monkeypatch, owner, name, call, implementation):
    model = llama(attn_implementation=implementation)().model
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    trained = {k: p.requires_grad for k, p in model.named_parameters()}
    calls, method = [], getattr(owner, name)

    def broken(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise ArithmeticError("in the middle")
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(ArithmeticError):
        flacompile.convert(model, "gla")
    monkeypatch.undo()
    assert dict(model.named_modules()) == modules
    assert {k: p.requires_grad for k, p in model.named_parameters()} == trained
    assert model.state_dict().keys() == state.keys()
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert not hasattr(model, "flacompile_report")
    flacompile.convert(model, "gla")


def test_config_fields_of_the_user_win():
    config = GatedLinearAttention.Config(gate_low_rank_dim=3, gate_logit_normalizer=4)
    model = flacompile.convert(llama()().model, config)
    for layer in swapped(model).values():
        assert layer.mixer.config.gate_low_rank_dim == 3
        assert layer.mixer.config.gate_logit_normalizer == 4
        assert layer.mixer.config.num_kv_heads == 2


EXAMPLES = {
    "none": None,
    "a tensor": ids_of(4),
    "a tuple": (ids_of(4),),
    "keywords": {"input_ids": ids_of(4)},
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_example_inputs(example):
    model = flacompile.convert(llama()().model, "attn", example_inputs=example)
    assert len(report(model).layers) == LAYERS


def test_eager_attention_is_switched_and_said():
    model, ids = llama(attn_implementation="eager")().model, ids_of(4)
    want = logits(model, ids)
    flacompile.convert(model, "attn", init="neutral")
    assert "note: switched from eager to sdpa" in str(report(model))
    assert distance(logits(model, ids), want) < 1e-5


def test_half_precision_stays():
    model = llama()().model.bfloat16()
    flacompile.convert(model, "gla")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, ids_of(4)).isfinite().all()


@pytest.mark.parametrize("name", REJECTED)
def test_nothing_convertible_says_why(name):
    build, reason = REJECTED[name]
    case = build()
    modules = dict(case.model.named_modules())
    with pytest.raises(ValueError, match="got none") as error:
        flacompile.convert(case.model, example_inputs=case.inputs or case.kwargs)
    assert reason in str(error.value)
    assert dict(case.model.named_modules()) == modules


BAD = {
    "unknown mixer": ({"mixer": "mamba9"}, "mixer: expected one of abc, .*gla.*, got 'mamba9'"),
    "mixer of a wrong type": ({"mixer": Attention}, "mixer: expected .* flacompile.layers.MIXERS"),
    "another width": (
        {"mixer": GatedLinearAttention.Config(hidden_size=7)},
        r"hidden_size: expected that of model.layers.0.self_attn, \d+, or none, got 7",
    ),
    "init": ({"init": "random"}, "init: expected 'neutral' or 'calibrated', got 'random'"),
    "share above": ({"keep": 1.0}, r"keep: expected indices, .* share in \[0, 1\), got 1.0"),
    "share below": ({"keep": -0.5}, "keep: expected .* got -0.5"),
    "index above": ({"keep": [0, 2]}, r"keep: expected indices of 2 attentions, got \[2\]"),
    "index below": ({"keep": [-3]}, r"keep: expected indices of 2 attentions, got \[-3\]"),
    "all kept": ({"keep": [0, 1]}, r"layers\.0\.self_attn: kept on request"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, message):
    model = llama()().model
    with pytest.raises(ValueError, match=message):
        flacompile.convert(model, **arguments)
    assert not swapped(model)


def test_converting_twice():
    model = flacompile.convert(llama()().model, init="neutral")
    with pytest.raises(ValueError, match="expected one that is not converted"):
        flacompile.convert(model)
    with pytest.raises(ValueError, match="got LlamaForCausalLM; convert it first"):
        report(llama()().model)
