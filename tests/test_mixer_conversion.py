"""What a mixer takes over from an attention: weights, norms, rotary, and a neutral start."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mixer_inputs import HALVES, WIDTH, close, draw
from textbook import rotate

from flacompile.blocks import QKNorm, Rotary
from flacompile.layers import MIXERS


def site(**changes):
    rotary = {"inv_freq": HALVES.inv_freq, "interleaved": False, "factor": 1.0}
    fields = {
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "hidden_size": WIDTH, "scale": 0.4,
        "rotary": SimpleNamespace(**rotary), "q_norm": None, "k_norm": None,
        "window": None, "softcap": None,
        **{name: SimpleNamespace(bias_fqn=f"{name}.bias") for name in "qkvo"},
    }  # fmt: skip
    return SimpleNamespace(**(fields | changes))


def attention_weights(**changes):
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (48, 48), "k": (24, 48), "v": (24, 48), "o": (48, 48)}
    fields = {"q_norm": None, "k_norm": None}
    for name, shape in shapes.items():
        fields[f"{name}_weight"] = torch.randn(shape, generator=generator, dtype=torch.float64) / 7
        fields[f"{name}_bias"] = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return SimpleNamespace(**(fields | changes))


def convert(name, found, weights):
    mixer = MIXERS[name](MIXERS[name].config_for(found)).double()
    mixer.load_attention(weights)
    return mixer


def teacher(w, x, groups=2):
    """The attention of ``site`` and ``attention_weights``, by hand."""
    q, k, v = (F.linear(x, getattr(w, f"{n}_weight"), getattr(w, f"{n}_bias")) for n in "qkv")
    q, k, v = (y.unflatten(-1, (-1, 12)) for y in (q, k, v))
    rotary = Rotary(HALVES)
    q, k = rotate(q, rotary), rotate(k, rotary)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
    return F.linear(o.transpose(1, 2).flatten(2), w.o_weight, w.o_bias)


def test_converted_attention_is_the_teacher():
    w, x = attention_weights(), draw(2, 17)
    assert close(convert("attn", site(), w)(x)[0], teacher(w, x))
    w.k_bias = None
    mixer = convert("attn", site(k=SimpleNamespace(bias_fqn=None)), w)
    assert not mixer.k_proj.bias.any()


def test_converted_norms():
    norm = SimpleNamespace(eps=1e-6, per_head=True, offset=1.0)
    w = attention_weights(q_norm=torch.randn(12).double(), k_norm=torch.randn(12).double())
    mixer = convert("gla", site(q_norm=norm, k_norm=norm), w)
    assert close(mixer.q_norm.weight, w.q_norm) and mixer.config.qk_norm == QKNorm(1e-6, True, 1.0)
    mixer.load_attention(attention_weights())  # norms without weight: that of one
    assert not mixer.q_norm.weight.any()


@pytest.mark.parametrize("name", ["gla", "mamba", "mamba2", "simple_gla"])
def test_decay_weights_of_a_conversion_add_up_to_one(name):
    """With q·k = 1 and v = 1 a head of long memory gives its column of W_o, as softmax would."""
    w = attention_weights(o_bias=torch.zeros(WIDTH).double())
    for key in ("q", "k", "v"):
        getattr(w, f"{key}_weight").zero_()
        getattr(w, f"{key}_bias").fill_(1.0)
    mixer = convert(name, site(rotary=None, scale=1 / 12, num_kv_heads=4), attention_weights_mha(w))
    y = mixer(draw(1, 8000))[0][0, -1]
    assert close(y.float(), w.o_weight.sum(1).float())


def attention_weights_mha(w):
    """The same with a key head for every query head."""
    changes = {f"{n}_weight": getattr(w, f"{n}_weight").repeat(2, 1) for n in "kv"}
    changes |= {f"{n}_bias": getattr(w, f"{n}_bias").repeat(2) for n in "kv"}
    return SimpleNamespace(**(vars(w) | changes))


@pytest.mark.parametrize("name", ["gla", "simple_gla"])
def test_half_life(name):
    mixer = convert(name, site(num_kv_heads=2), attention_weights())
    tokens = torch.tensor([3.0, 12.0, 50.0, 50.0])
    mixer.set_half_life(tokens)
    decay = mixer.decay(draw(1, 3)).exp()  # [B, T, heads, ...]
    want = tokens if name == "simple_gla" else torch.tensor([6.0, 50.0])  # shared by a group
    halves = decay.reshape(3, len(want), -1) ** want[:, None].double()
    assert close(halves, torch.full_like(halves, 0.5))


@pytest.mark.parametrize("name", ["gla", "simple_gla", "linear_attn"])
def test_converted_linear_mixers(name):
    """Half-lives beyond any T leave scale Σ (q·k) v; φ leaves a weighted mean of v."""
    w, x = attention_weights(o_bias=torch.zeros(WIDTH).double()), draw(1, 9)
    mixer = convert(name, site(), w)
    if name == "linear_attn":
        w.v_weight.zero_()
        w.v_bias.fill_(1.0)
        mixer.load_attention(w)
        assert close(mixer(x)[0].float(), w.o_weight.sum(1).expand(1, 9, -1).float())
    else:
        mixer.set_half_life(torch.full((4,), 1e15))
        mixer.o_proj.weight.data.copy_(w.o_weight)
        (q, k), v = (rotate(y, mixer.rotary) for y in heads(mixer, x)[:2]), heads(mixer, x)[2]
        o = torch.einsum("bthk,bshk->bhts", q, k).tril() * 0.4
        o = torch.einsum("bhts,bshv->bthv", o, v)
        assert close(mixer(x)[0], F.linear(o.flatten(2), w.o_weight))
    y = mixer(x)[0]
    mixer.scale_heads(torch.tensor([2.0, 0.5, 1.0, 0.0]))
    columns = torch.tensor([2.0, 0.5, 1.0, 0.0]).double().repeat_interleave(12)
    assert close(mixer.o_proj.weight, w.o_weight * columns) and not close(mixer(x)[0], y)


def heads(mixer, x):
    q, k, v = (getattr(mixer, f"{n}_proj")(x).unflatten(-1, (-1, 12)) for n in "qkv")
    return q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)


def test_weights_that_do_not_fit():
    w = attention_weights(k_weight=torch.zeros(48, 48))
    with pytest.raises(ValueError, match=r"k_weight: expected shape \(24, 48\)"):
        convert("gla", site(), w)
    with pytest.raises(ValueError, match="k_norm: expected the norm of q"):
        convert("gla", site(q_norm=SimpleNamespace(eps=1.0, per_head=True, offset=0.0)), w)
