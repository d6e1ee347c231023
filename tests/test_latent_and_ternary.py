"""MLA against transformers' DeepSeek, BitNet's rounding, and both as what attention becomes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from mixer_inputs import HALVES, WIDTH, Largest, close, draw
from test_mixer_conversion import attention_weights, attention_weights_mha, convert, site
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from flacompile.layers import BitAttention, MultiheadLatentAttention
from flacompile.layers.bitattn import BitLinear, ternary
from flacompile.yarn import RopeScaling

DIMS = {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
PAIRS = SimpleNamespace(inv_freq=(1.0, 0.1), interleaved=True, factor=1.2)


def latent(**fields) -> MultiheadLatentAttention:
    return MultiheadLatentAttention(
        MultiheadLatentAttention.Config(**({"hidden_size": WIDTH, "num_heads": 4} | DIMS | fields))
    )


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_values_of_deepseek(scaling):
    """Frequencies, the factor of cos and sin, and the scale of softmax are those of DeepSeek."""
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_interleave=False,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | (scaling or {}),
        attn_implementation="eager",
        **DIMS,
    )
    theirs, rotary = DeepseekV3Attention(config, 0), DeepseekV3RotaryEmbedding(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3)
    ours = latent(rope_scaling=RopeScaling(**scaling) if scaling else None, norm_eps=1e-6)
    w, rank = theirs.state_dict(), DIMS["kv_lora_rank"]
    ours.load_state_dict({
        "q_proj.0.weight": w["q_a_proj.weight"],
        "q_proj.1.weight": w["q_a_layernorm.weight"],
        "q_proj.2.weight": w["q_b_proj.weight"],
        "k_rope.weight": w["kv_a_proj_with_mqa.weight"][rank:],
        "kv_proj.0.weight": w["kv_a_proj_with_mqa.weight"][:rank],
        "kv_proj.1.weight": w["kv_a_layernorm.weight"],
        "kv_proj.2.weight": w["kv_b_proj.weight"],
        "o_proj.weight": w["o_proj.weight"],
    })  # fmt: skip
    x = draw(2, 90, torch.float32)
    position = torch.arange(90).expand(2, -1)
    causal = torch.full((90, 90), -torch.inf).triu(1)
    want, _ = theirs(x, rotary(x, position), causal[None, None])
    assert close(ours(x)[0], want)


def test_the_state_is_the_latent():
    """Whatever the number of heads; with a window it is that of the window from the start."""
    for heads, window in ((4, None), (16, None), (4, 5)):
        mixer = latent(num_heads=heads, window_size=window).double()
        state = mixer(draw(2, 9))[1]
        kept = window or 9
        assert [tuple(x.shape) for x in state.cached] == [(2, kept, 12), (2, kept, 8)]
        state = mixer.step(draw(2, 1)[:, 0], state)[1]
        assert state.valid.shape == (2, window or 10)


def test_a_step_is_absorbed():
    """It makes no keys and values of the heads: nothing is larger than what is kept."""
    mixer = latent(num_heads=16)
    state = mixer(draw(1, 500, torch.float32))[1]
    with torch.no_grad(), Largest() as largest:
        mixer.step(draw(1, 1, torch.float32)[:, 0], state)
    assert largest.numel == 501 * (DIMS["kv_lora_rank"] + DIMS["qk_rope_head_dim"])


@pytest.mark.parametrize(
    ("changes", "prepare"),
    [
        ({}, lambda w: w),
        ({"num_kv_heads": 4}, attention_weights_mha),
        ({"rotary": None}, lambda w: w),
        ({"rotary": PAIRS, "window": 5}, lambda w: w),
    ],
    ids=["grouped", "all_heads", "no_rotary", "interleaved"],
)
def test_converted_attention_is_the_teacher(changes, prepare):
    found, w, x = site(**changes), prepare(attention_weights()), draw(2, 17)
    assert close(convert("mla", found, w)(x)[0], convert("attn", found, w)(x)[0])


def test_values_of_a_lower_rank_are_the_nearest():
    w = attention_weights()
    config = MultiheadLatentAttention.config_for(site())
    mixer = MultiheadLatentAttention(dataclasses.replace(config, kv_lora_rank=7)).double()
    mixer.load_attention(w)
    up = mixer.kv_proj[2].weight.unflatten(0, (4, 12))[::2].flatten(0, 1)
    lost = torch.linalg.svdvals(w.v_weight)[7:].square().sum()
    assert close((up @ mixer.kv_proj[0].weight - w.v_weight).square().sum(), lost)
    assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()  # whatever the library


def take_over(**fields):
    latent(**fields).load_attention(attention_weights())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RopeScaling(rope_type="linear"), "rope_type: expected 'yarn', got linear"),
        (lambda: RopeScaling(factor=0.5), "factor: expected at least 1, got 0.5"),
        (lambda: latent(rotary=HALVES, rope_scaling=RopeScaling()), "rope_scaling: expected None"),
        (lambda: latent(rotary=HALVES, qk_rope_head_dim=4), "rotary: expected at most 4"),
        (lambda: take_over(), "config: expected no q_lora_rank and qk_nope_head_dim = 0"),
        (
            lambda: take_over(
                q_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=24, v_head_dim=12,
                kv_lora_rank=25,
            ),
            "kv_lora_rank: expected at most 24, got 25",
        ),
        (
            lambda: MultiheadLatentAttention.config_for(
                site(k_norm=SimpleNamespace(eps=1e-6, per_head=True, offset=0.0))
            ),
            "k_norm: expected None",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding():
    """Three values of a weight, 8 bits of an input, and gradients as if there were neither."""
    layer, x = BitLinear(40, 3, norm_eps=None).double(), draw(1, 5)[..., :40].requires_grad_()
    weight = ternary(layer.weight)
    assert close(weight.abs().unique(), torch.stack((weight[0, 0] * 0, layer.weight.abs().mean())))
    step = x.abs().amax(-1, keepdim=True) / 127
    y = layer(x)
    assert close(y, (x / step).round() * step @ weight.T)
    assert not close(y, x @ weight.T)
    y.sum().backward()
    assert close(x.grad, weight.sum(0).expand_as(x))
    assert close(layer.weight.grad, ((x / step).round() * step).sum((0, 1)).expand(3, -1))


@pytest.mark.parametrize("eps", [1e-8, 1e-6])
def test_values_of_a_published_layer(eps):
    """The norm, then both roundings, of inputs so small that its eps is seen."""
    layer, x = BitLinear(WIDTH, 7, norm_eps=eps).double(), 1e-3 * draw(2, 5)
    torch.nn.init.normal_(layer.norm.weight, 1.0, 0.3)
    w = layer.weight
    h = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * layer.norm.weight
    s = 127 / h.abs().amax(-1, keepdim=True)
    rounded = (w / w.abs().mean()).round().clamp(-1, 1) * w.abs().mean()
    assert close(layer(x), (h * s).round() / s @ rounded.T)


def test_a_norm_follows_the_published_default():
    assert BitAttention.Config().norm_eps == 1e-8
    mixer = BitAttention(BitAttention.Config(hidden_size=8, num_heads=2, norm_eps=1e-6))
    assert mixer.o_proj.norm.eps == 1e-6


def test_converted_weights_are_the_nearest_ternary_ones():
    """No other scale of the matrix is nearer, and zeros stay zeros."""
    w = attention_weights(k_weight=torch.zeros(24, WIDTH).double())
    mixer = convert("bitattn", site(), w)
    assert not mixer.k_proj.weight.any()
    for name in "qvo":
        teacher = getattr(w, f"{name}_weight")
        rounded = ternary(getattr(mixer, f"{name}_proj").weight.detach())
        assert close((teacher * rounded).sum(), rounded.square().sum())
        assert (teacher - rounded).norm() < 0.5 * teacher.norm()


def test_converted_attention_is_near_the_teacher():
    """Exact but for the rounding: with rounding switched off by weights of three values."""
    w = attention_weights()
    for name in "qkvo":
        weight = getattr(w, f"{name}_weight")
        weight.copy_(weight.sign() / 7)
    x = draw(2, 17)
    got, want = convert("bitattn", site(), w)(x)[0], convert("attn", site(), w)(x)[0]
    assert (got - want).norm() < 0.02 * want.norm()
