"""Hybrids: attentions kept by what they are worth, and softmax over a window beside a mixer."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from mixer_inputs import Largest, close, draw
from models import MODELS, llama
from test_convert import distance, ids_of, left_padded, logits
from test_hf import argmax_loop, generate, state_size
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import flacompile
from flacompile import keep
from flacompile.convert import report
from flacompile.distill import Recipe, Stage
from flacompile.evaluate.needle import needles
from flacompile.hf_cache import StateLayer
from flacompile.layers import MIXERS, Attention, HybridAttention
from flacompile.layers.base import Tokens
from flacompile.passes.swap_attention import routed, swapped

INNER = ("gla", "gated_deltanet", "linear_attn", "mamba2")
over_inner = pytest.mark.parametrize("inner", INNER)


@pytest.fixture
def sharp():
    """Four layers whose attentions are far from uniform."""
    model = llama(num_hidden_layers=4)().model
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(4)
    return model


@over_inner
def test_all_softmax_over_all_tokens_is_the_teacher(inner):
    model, ids = MODELS["qwen3"]().model, ids_of(7)
    want = logits(model, ids)
    flacompile.convert(model, inner, window=ids.shape[1], init="neutral")
    assert distance(logits(model, ids), want) > 1e-3
    for layer in swapped(model).values():
        layer.mixer.share.data.fill_(40.0)
    assert distance(logits(model, ids), want) < 1e-5


@over_inner
def test_no_softmax_is_the_linear_mixer(inner):
    ids, models = ids_of(7), []
    for window in (None, 5):
        models.append(flacompile.convert(llama()().model, inner, window=window, init="neutral"))
    for layer in swapped(models[1]).values():
        layer.mixer.share.data.fill_(-40.0)
    assert distance(logits(models[1], ids), logits(models[0], ids)) < 1e-5


@pytest.mark.parametrize("inner", [*INNER, "hgrn"])  # hgrn: heads wider than the attention's
def test_a_window_is_calibrated_and_does_no_harm(inner):
    """Its columns of W_o are fitted with the others: no error is above that without a window."""
    errors, calibration = [], [ids_of(1)]
    for window in (None, 4):
        torch.manual_seed(0)
        model = flacompile.convert(llama()().model, inner, window=window, calibration=calibration)
        errors.append(report(model).layers)
    for without, beside in zip(*errors, strict=True):
        assert beside.after < beside.before
        assert beside.after <= without.after + 1e-3
        assert (beside.mixer, beside.window) == (inner, 4)
        assert f"-> {inner} and softmax over 4 tokens" in str(beside)


@over_inner
def test_windows_do_not_see_left_padding(inner):
    model = flacompile.convert(llama()().model, inner, window=4)
    ids, mask, position = left_padded((0, 5))
    got = logits(model, ids, attention_mask=mask, position_ids=position)
    assert distance(got[1, 5:], logits(model, ids[1:, 5:])[0]) < 1e-5
    assert distance(got[0], logits(model, ids[:1])[0]) < 1e-5


@over_inner
def test_generate_and_save(inner, tmp_path):
    """By a state as large after 9 tokens as after 40; a saved model gives equal logits."""
    model, ids = flacompile.convert(llama()().model, inner, window=4), ids_of(3, time=8)
    model.generation_config.eos_token_id = None
    outs = [generate(model, ids, n, return_dict_in_generate=True) for n in (2, 24)]
    assert outs[1].sequences.equal(argmax_loop(model, ids, 24))
    assert len({state_size(out.past_key_values) for out in outs}) == 1
    model.save_pretrained(tmp_path)
    assert logits(flacompile.load(tmp_path), ids).equal(logits(model, ids))


def test_a_step_exports_for_any_batch():
    mixer = HybridAttention(HybridAttention.Config(hidden_size=48))
    x, state = draw(2, 1, torch.float32)[:, 0], mixer(draw(2, 9, torch.float32))[1]
    batch = {0: torch.export.Dim.DYNAMIC}

    class Step(torch.nn.Module):
        def forward(self, x, leaves):
            state = tree_unflatten(list(leaves), layout)
            y, state = mixer.step(x, state)
            return y, *tree_leaves(state)

    leaves, layout = tree_flatten(state)
    program = torch.export.export(
        Step(), (x, tuple(leaves)), dynamic_shapes=(batch, tuple(batch for _ in leaves))
    )
    first = [leaf[:1].clone() for leaf in leaves]
    assert close(program.module()(x[:1].clone(), tuple(first)), Step()(x[:1], first))


def test_distillation_trains_the_share(tmp_path):
    model = flacompile.convert(llama()().model, window=4)
    shares = [[layer.mixer.share.detach().clone() for layer in swapped(model).values()]]
    tokens = ids_of(1, 1, 4000)[0]
    for stage in ("align", "logits"):
        stages = {"align": Stage(steps=0), "logits": Stage(steps=0)} | {stage: Stage(steps=5)}
        recipe = Recipe(**stages, sequence_length=16, batch_size=4, eval_tokens=64)
        flacompile.distill(model, tokens, recipe, out=tmp_path / stage)
        shares.append([layer.mixer.share.detach().clone() for layer in swapped(model).values()])
    for before, after in itertools.pairwise(shares):
        assert all((a != b).all() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["attn", "bitattn", "mla"])
def test_memory_of_a_window_is_linear(name, packed):
    """Twice the tokens, twice the largest tensor; nothing as large as T²."""
    sizes = MLA if name == "mla" else {"num_heads": 4}
    config = MIXERS[name].Config(hidden_size=48, window_size=16, **sizes)
    mixer, found = MIXERS[name](config), []
    for time in (2048, 4096):
        bounds = torch.tensor([0, 100, time]) if packed else None
        with torch.no_grad(), Largest() as largest:
            mixer(draw(1, time, torch.float32), cu_seqlens=bounds)
        found.append(largest.numel)
    assert found[1] < 2.1 * found[0] and found[1] < 4096**2 / 4


MLA = {
    "num_heads": 2, "q_lora_rank": None, "qk_rope_head_dim": 4, "kv_lora_rank": 8,
    "v_head_dim": 4, "qk_nope_head_dim": 4,
}  # fmt: skip


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 300])
def test_windows_beyond_a_block(window):
    """As softmax under the mask of the window, in one call and in two."""
    torch.manual_seed(0)
    config = Attention.Config(hidden_size=48, num_heads=4, num_kv_heads=2, window_size=window)
    near = Attention(config).double()
    full = Attention(dataclasses.replace(config, window_size=None)).double()
    full.load_state_dict(near.state_dict())
    x, time = draw(2, 400), torch.arange(400)
    age = time[:, None] - time
    q, kept = full.project(x, Tokens.of(x, None, None, None))
    want = full.o_proj(full.mix(q, kept, ((age >= 0) & (age < window))[None]).flatten(2))
    first, state = near(x[:, :150])
    assert close(near(x)[0], want)
    assert close(torch.cat((first, near(x[:, 150:], state)[0]), 1), want)


def divergence(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """KL to the original, by hand."""
    got = logits(model, ids).log_softmax(-1)
    with routed(model, "original"):
        want = logits(model, ids).log_softmax(-1)
    return (want.exp() * (want - got)).sum(-1).mean().item()


def test_gains_are_what_keeping_one_gains(sharp):
    calibration = [ids_of(i) for i in range(2)]
    options = {"mixer": "simple_gla", "calibration": calibration, "init": "neutral"}
    ranked = flacompile.convert(copy.deepcopy(sharp), keep="auto:2", **options)
    models = [flacompile.convert(copy.deepcopy(sharp), **options)]
    models += [flacompile.convert(copy.deepcopy(sharp), keep=[i], **options) for i in range(4)]
    base, *kept = (sum(divergence(m, ids) for ids in calibration) / 2 for m in models)
    gains = report(ranked).gains
    assert list(gains) == [f"model.layers.{i}.self_attn" for i in range(4)]
    assert list(gains.values()) == pytest.approx([base - one for one in kept], abs=1e-5)
    best = sorted(sorted(gains, key=gains.get)[2:])
    assert list(report(ranked).kept) == best
    assert list(swapped(ranked)) == [path for path in gains if path not in best]
    for path in best:
        assert f"{path}: kept, a gain of {gains[path]:.4f}" in str(report(ranked))
        assert all(p.requires_grad for p in ranked.get_submodule(path).parameters())
    again = flacompile.convert(sharp, keep="auto:2", **options)
    assert report(again) == report(ranked)


def test_recall_drops_are_what_converting_one_loses(sharp):
    calibration = [ids_of(i, time=40) for i in range(2)]
    options = {"calibration": calibration, "init": "neutral"}
    ranked = flacompile.convert(copy.deepcopy(sharp), keep="recall:1", **options)
    drops = []
    for i in range(4):
        others = [j for j in range(4) if j != i]
        one = flacompile.convert(copy.deepcopy(sharp), keep=others, **options)
        drops.append(sum(lost(one, sharp, ids, j) for j, ids in enumerate(calibration)) / 2)
    assert list(report(ranked).gains.values()) == pytest.approx(drops, abs=1e-5)
    assert report(ranked).kept == (f"model.layers.{drops.index(max(drops))}.self_attn",)


@pytest.mark.parametrize("which", ["auto:2", [-1, 0]], ids=str)
def test_kept_later_is_kept_at_once(which, sharp, tmp_path):
    """Untrained mixers gain the same; trained ones are asked anew."""
    options = {"mixer": "simple_gla", "calibration": [ids_of(0)], "init": "neutral"}
    at_once = flacompile.convert(copy.deepcopy(sharp), keep=which, **options)
    later = flacompile.convert(copy.deepcopy(sharp), **options)
    trained = copy.deepcopy(later)
    assert flacompile.keep_layers(later, which, calibration=[ids_of(0)]) is later
    assert report(later) == report(at_once) and list(swapped(later)) == list(swapped(at_once))
    for key, value in at_once.state_dict().items():
        assert later.state_dict()[key].equal(value)
    later.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(flacompile.load(tmp_path), ids_of(1)), logits(later, ids_of(1))
    )
    with torch.no_grad():
        for layer in swapped(trained).values():
            layer.mixer.o_proj.weight.mul_(0.5)
    flacompile.keep_layers(trained, "auto:1", calibration=[ids_of(0)])
    gains = report(trained).gains
    assert report(trained).kept == (max(gains, key=gains.get),) and gains != report(later).gains


def lost(model: torch.nn.Module, teacher: torch.nn.Module, ids: torch.Tensor, seed: int) -> float:
    """Of the nll of needles that were seen, by the logits."""
    rows = needles(ids.flatten(), 24, 2, seed).seen
    nll = []
    for each in (model, teacher):
        log_p = logits(each, rows).log_softmax(-1)[:, -9:-1]
        nll.append(-log_p.gather(-1, rows[:, -8:, None]).mean().item())
    return nll[0] - nll[1]


@pytest.mark.parametrize("calibration", [[ids_of(0, time=20)], [torch.rand(2, 40, 32)]])
def test_recall_wants_tokens(calibration, sharp):
    embedded = [{"inputs_embeds": x} if x.is_floating_point() else x for x in calibration]
    with pytest.raises(
        ValueError, match=r"calibration: expected token ids \[B, T\] of at least 28"
    ):
        flacompile.convert(sharp, keep="recall", calibration=embedded, init="neutral")
    assert not swapped(sharp)


@pytest.mark.parametrize("window", [None, 4])
def test_the_only_attention_that_matters_is_kept(sharp, window):
    for i in (1, 2, 3):
        sharp.model.layers[i].self_attn.v_proj.weight.data.mul_(1e-3)
    flacompile.convert(sharp, keep="auto", window=window, init="neutral")
    assert report(sharp).kept == ("model.layers.0.self_attn",)
    gains = report(sharp).gains
    assert gains["model.layers.0.self_attn"] > 100 * sorted(gains.values())[-2]


def test_without_logits_gains_are_of_the_output():
    case = MODELS["handwritten"]()
    want, model = case.model(*case.inputs), copy.deepcopy(case.model)
    options = {"init": "neutral", "example_inputs": case.inputs}
    flacompile.convert(case.model, keep="auto", **options)
    flacompile.convert(model, **options)
    errors = []
    for path in ("", *swapped(model)):
        for name, layer in swapped(model).items():
            layer.route = "original" if name == path else "mixer"
        errors.append(distance(model(*case.inputs), want) ** 2)
    gains = [errors[0] - error for error in errors[1:]]
    assert list(report(case.model).gains.values()) == pytest.approx(gains, rel=1e-3)


def test_only_the_first_batches_are_ranked(sharp, monkeypatch):
    seen, batches = [], [ids_of(i, 1, 16) for i in range(6)]
    monkeypatch.setattr(keep, "_distance", lambda got, want: seen.append(got) or 0.0)
    flacompile.convert(sharp, "attn", keep="auto", init="neutral", calibration=batches)
    assert len(seen) == keep.BATCHES * 5


NUMBERS = {"auto": 2, "auto:0.5": 4, "auto:.4": 3, "auto:0.01": 1, "auto:1": 1, "auto:7": 7}
BAD = {
    "auto:8": "keep: expected fewer than all 8 attentions, got 'auto:8'",
    "auto:0": "keep: expected auto, recall, uniform, each alone or with ':<share below 1>' or ':<n",
    "auto:1.5": "keep: expected auto,",
    "recall:-1": "keep: expected auto,",
    "auto:nan": "keep: expected auto,",
    "best": "keep: expected auto,",
    "uniform:8": "keep: expected fewer than all 8 attentions, got 'uniform:8'",
}


def test_what_cannot_be_kept_later(sharp):
    with pytest.raises(ValueError, match="expected converted attentions beside their originals"):
        flacompile.keep_layers(copy.deepcopy(sharp), "auto")
    model = flacompile.convert(sharp, init="neutral", keep=[0])
    with pytest.raises(ValueError, match=r"keep: expected fewer than all 3 attentions, got \[0, 1"):
        flacompile.keep_layers(model, [0, 1, 2])
    flacompile.keep_layers(model, [0])
    assert report(model).kept == tuple(f"model.layers.{i}.self_attn" for i in (0, 1))


def test_auto_is_read():
    for text, number in NUMBERS.items():
        assert keep.read_keep(text, 8) == (set(), ("auto", number))
        recall = text.replace("auto", "recall")
        assert keep.read_keep(recall, 8) == (set(), ("recall", number))
        indices, choice = keep.read_keep(text.replace("auto", "uniform"), 8)
        assert len(indices) == number and choice is None
    assert keep.read_keep("uniform:2", 8) == keep.read_keep(0.25, 8) == ({2, 6}, None)


@pytest.mark.parametrize("text", BAD)
def test_bad_auto(text):
    with pytest.raises(ValueError) as error:
        keep.read_keep(text, 8)
    assert str(error.value).startswith(BAD[text])


WRONG = {
    "window of none": ({"window": 0}, "window: expected a number of tokens, at least 1, got 0"),
    "no linear mixer": (
        {"mixer": "attn", "window": 4},
        "window: expected None where mixer is no linear one, got 4 and 'attn'",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_bad_window(arguments, message):
    with pytest.raises(ValueError, match=message):
        flacompile.convert(llama()().model, **arguments)


def test_bad_parts():
    gla, attn = (MIXERS[name].Config(hidden_size=48, num_heads=4) for name in ("gla", "attn"))
    near = dataclasses.replace(attn, window_size=4)
    for message, config in {
        "linear: expected the Config of a recurrent mixer": {"linear": near},
        "softmax: expected a window_size": {"linear": gla, "softmax": attn},
        "softmax: expected the 4 heads of the linear part, got 2": {
            "linear": gla, "softmax": dataclasses.replace(near, num_heads=2),
        },
        "hidden_size: expected 48, got 24": {"linear": dataclasses.replace(gla, hidden_size=24)},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HybridAttention(HybridAttention.Config(hidden_size=48, **config))


def test_an_error_while_ranking_leaves_the_model(sharp, monkeypatch):
    modules, ids = dict(sharp.named_modules()), ids_of(7)
    want, calls = logits(sharp, ids), []

    def broken(got, want):
        calls.append(got)
        if len(calls) == 3:
            raise ArithmeticError("in the middle")
        return 0.0

    monkeypatch.setattr(keep, "_distance", broken)
    with pytest.raises(ArithmeticError):
        flacompile.convert(sharp, keep="auto", init="neutral")
    assert dict(sharp.named_modules()) == modules
    assert all(p.requires_grad for p in sharp.parameters())
    assert logits(sharp, ids).equal(want)


def test_a_kept_layers_cache_alone_grows(sharp):
    model, sizes = flacompile.convert(sharp, keep="auto:1", window=4, init="neutral"), []
    for count in (9, 25):
        layers = generate(
            model, ids_of(3, time=8), count, return_dict_in_generate=True
        ).past_key_values.layers
        ours = [layer for layer in layers if isinstance(layer, StateLayer)]
        (softmax,) = set(layers) - set(ours)
        sizes.append((softmax.keys.shape[2], state_size(SimpleNamespace(layers=ours))))
    assert [length for length, _ in sizes] == [16, 32] and sizes[0][1] == sizes[1][1]
