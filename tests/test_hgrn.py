"""The forget gate of HGRN and HGRN2, and how they take over an attention."""

import pytest
import torch
import torch.nn.functional as F
from mixer_inputs import WIDTH, close, draw
from test_mixer_conversion import attention_weights, convert, site

from flacompile.layers import HGRN2Attention
from flacompile.layers.hgrn import APART, ForgetGate

BOUNDS = (0.0, 1e-6, 0.25, 0.999)


@pytest.mark.parametrize("bound", BOUNDS)
def test_forget_gate_is_exact_near_zero_and_one(bound):
    z = torch.linspace(-80, 80, 641).requires_grad_()
    gate = ForgetGate(bound)
    log_f, write = gate(z)
    exact, lb = z.detach().double(), gate.lower_bound.double()
    want = (1 - lb) * torch.sigmoid(-exact)
    f = lb + (1 - lb) * torch.sigmoid(exact)
    want_log = torch.where(f < 0.5, f.log(), torch.log1p(-want))
    assert ((write - want).abs() <= 1e-6 * want).all()
    assert ((log_f - want_log).abs() <= 1e-5 * want_log.abs()).all()
    assert (log_f <= 0).all()
    (log_f.sum() + write.sum()).backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("bound", BOUNDS)
def test_forget_gate_of_a_half_life(bound):
    gate = ForgetGate((bound, bound))
    log_f = -torch.tensor([1e-3 / 3, 1e-7]).double()
    assert close(gate(gate.logit(log_f))[0] / log_f, torch.ones(2).double())


def test_the_bound_stays_fp32():
    gate = ForgetGate((0.1, 0.3)).bfloat16()
    assert gate.lower_bound.dtype == torch.float32
    assert gate.lower_bound.tolist() == torch.tensor([0.1, 0.3]).tolist()


def test_hgrn_averages_values_at_several_half_lives():
    """Each head: the mean over timescales of decayed means of v, times its columns of W_o."""
    w, x = attention_weights(), draw(2, 31)
    mixer = convert("hgrn", site(), w)
    half_life = torch.tensor([2.0, 5.0, 20.0, 90.0]).double()
    mixer.set_half_life(half_life)
    v = F.linear(x, w.v_weight, w.v_bias).unflatten(-1, (2, 12)).repeat_interleave(2, 2)
    age = torch.arange(31)[:, None] - torch.arange(31)
    o = 0.0
    for step in (-0.5, 0.5):
        f = 0.5 ** (1 / (half_life * APART**step))[:, None, None]
        weights = torch.where(age >= 0, (1 - f) * f ** age.clamp(min=0), 0.0)
        o = o + torch.einsum("hts,bshv->bthv", weights, v) / 2
    assert (mixer(x)[0] - F.linear(o.flatten(2), w.o_weight, w.o_bias)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_decay_weights_of_a_conversion_add_up_to_one(name):
    """With q·k = 1 and v = 1 a long sequence gives the column sums of W_o, as softmax would."""
    w = attention_weights(o_bias=torch.zeros(WIDTH).double())
    for key in ("q", "k", "v"):
        getattr(w, f"{key}_weight").zero_()
        getattr(w, f"{key}_bias").fill_(1.0)
    mixer = convert(name, site(rotary=None, scale=1 / 12), w)
    mixer.set_half_life(torch.tensor([3.0, 8.0, 30.0, 100.0]))
    assert close(mixer(draw(1, 16000))[0][0, -1].float(), w.o_weight.sum(1).float())


def test_hgrn2_keeps_keys_and_halves_on_time():
    w, x = attention_weights(o_bias=torch.zeros(WIDTH).double()), draw(1, 9)
    mixer = convert("hgrn2", site(rotary=None), w)
    mixer.set_half_life(torch.tensor([3.0, 12.0, 50.0, 50.0]))  # two and two share a gate
    q, k, v = (
        F.linear(x, getattr(w, f"{n}_weight"), getattr(w, f"{n}_bias")).unflatten(-1, (-1, 12))
        for n in "qkv"
    )
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    f = 0.5 ** (1 / torch.tensor([6.0, 6.0, 50.0, 50.0]).double())[:, None, None]
    age = torch.arange(9)[:, None] - torch.arange(9)
    weights = torch.where(age >= 0, (1 - f) * f ** age.clamp(min=0), 0.0) * 0.4
    o = torch.einsum("bthk,bshk,hts,bshv->bthv", q, k, weights, v)
    assert close(mixer(x)[0], F.linear(o.flatten(2), w.o_weight))


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_scaled_heads(name):
    w = attention_weights()
    mixer, scale = convert(name, site(), w), torch.tensor([2.0, 0.5, 1.0, 0.0]).double()
    before = mixer.o_proj.weight.clone()
    mixer.scale_heads(scale)
    heads = zip(mixer.o_proj.weight.chunk(4, 1), before.chunk(4, 1), scale, strict=True)
    assert all(close(new, old * s) for new, old, s in heads)


@pytest.mark.parametrize("name", ["hgrn", "hgrn2"])
def test_bad_half_life(name):
    mixer = convert(name, site(), attention_weights())
    with pytest.raises(ValueError, match=r"tokens: expected shape \(4,\), got \(3,\)"):
        mixer.set_half_life(torch.ones(3))


@pytest.mark.parametrize("expand_ratio", [None, 2048])
def test_hgrn2_without_heads(expand_ratio):
    message = f"expand_ratio: expected at most 1024, or None and num_heads, got {expand_ratio}"
    with pytest.raises(ValueError, match=message):
        HGRN2Attention(HGRN2Attention.Config(expand_ratio=expand_ratio))
