"""Mamba and Mamba-2 against transformers' own, from their start, and as what attention becomes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mixer_inputs import HALVES, close, draw
from test_mixer_conversion import attention_weights, convert, site
from textbook import rotate
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from flacompile.layers import MIXERS

NAMES = ["mamba", "mamba2"]
THEIRS = {  # their mixer, its config, ours
    "mamba": (
        MambaMixer,
        MambaConfig(
            hidden_size=32, intermediate_size=64, state_size=8, time_step_rank=5,
            num_hidden_layers=1, use_mambapy=False,
        ),
        {"hidden_size": 32, "intermediate_size": 64, "state_size": 8, "dt_rank": 5},
    ),
    "mamba2": (
        Mamba2Mixer,
        Mamba2Config(
            hidden_size=32, num_heads=8, head_dim=8, n_groups=2, state_size=16,
            chunk_size=16, num_hidden_layers=1, time_step_limit=(0.001, 0.5),
        ),
        {
            "hidden_size": 32, "head_dim": 8, "n_groups": 2, "state_size": 16,
            "dt_limit": (0.001, 0.5),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_values_of_transformers(name):
    cls, their_config, fields = THEIRS[name]
    torch.manual_seed(0)
    theirs = cls(their_config, layer_idx=0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    ours = MIXERS[name](MIXERS[name].Config(**fields))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, mask = torch.randn(2, 37, 32), torch.ones(2, 37, dtype=torch.int64)
    assert close(ours(x)[0], theirs(x))
    mask[0, :6] = 0  # padding to the left, as they have it
    y = ours(x, mask=mask)[0]
    assert close(y[mask == 1], theirs(x, attention_mask=mask)[mask == 1])


def test_start():
    """dt between its bounds, A from -1 down, D = 1, W_dt up to rank^-0.5."""
    torch.manual_seed(0)
    one = MIXERS["mamba"](MIXERS["mamba"].Config(hidden_size=64, dt_min=0.01, dt_init_floor=0.02))
    two = MIXERS["mamba2"](MIXERS["mamba2"].Config(hidden_size=512, conv_init=0.01))
    steps = F.softplus(one.dt_proj.bias), F.softplus(two.dt_bias)
    for dt, low, wide in zip(steps, (0.02, 0.001), (4.5, 10), strict=True):
        assert low * 0.999 < dt.min() and dt.max() < 0.1001 and dt.max() > wide * dt.min()
    assert close(one.A_log.exp(), torch.arange(1.0, 17).expand(2048, 16))
    A = two.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16 and A.max() > A.min() + 5
    assert 0.45 < one.dt_proj.weight.max() <= 0.5 and -0.5 <= one.dt_proj.weight.min() < -0.45
    assert (one.D == 1).all() and (two.D == 1).all() and two.conv1d.weight.abs().max() <= 0.01
    constant = MIXERS["mamba"](MIXERS["mamba"].Config(hidden_size=64, dt_init="constant"))
    assert (constant.dt_proj.weight == 0.5).all()


@pytest.mark.parametrize("name", NAMES)
def test_conversion(name):
    """o_t = Σ_s dt 2^(-(t - s) / half-life) · scale (q_t·k_s) v_s; every parameter can learn."""
    w, x, tokens = attention_weights(), draw(2, 9), torch.tensor([3.0, 12.0, 50.0, 7.0])
    mixer = convert(name, site(), w)
    dt = math.log(2) / torch.logspace(3, 7, 4, base=2)
    columns = ((1 - (-dt).exp()) / dt).repeat_interleave(12)
    assert close(mixer.out_proj.weight.float(), w.o_weight.float() * columns)
    mixer.set_half_life(tokens)
    q, k, v = (F.linear(x, getattr(w, f"{n}_weight"), getattr(w, f"{n}_bias")) for n in "qkv")
    q, k, v = (y.unflatten(-1, (-1, 12)) for y in (q, k, v))
    q, k, v = (
        rotate(q, mixer.rotary),
        *(y.repeat_interleave(2, 2) for y in (rotate(k, mixer.rotary), v)),
    )
    age = torch.arange(9.0)[:, None] - torch.arange(9.0)
    decay = (math.log(2) / tokens * 2 ** (-age[..., None] / tokens)).double() * (age >= 0)[
        ..., None
    ]
    o = torch.einsum("bthk,bshk,tsh,bshv->bthv", 0.4 * q, k, decay, v)
    y = mixer(x)[0]
    assert close(y.float(), F.linear(o.flatten(2), mixer.out_proj.weight, w.o_bias).float())
    y.square().sum().backward()
    assert all(p.grad.any() for p in mixer.parameters())
    mixer.scale_heads(torch.zeros(4))
    assert close(mixer(x)[0], w.o_bias.expand(2, 9, -1))


@pytest.mark.parametrize("name", NAMES)
def test_converted_norms_and_biases(name):
    norm = SimpleNamespace(eps=1e-6, per_head=True, offset=1.0)
    w = attention_weights(q_norm=torch.randn(12).double(), k_norm=torch.randn(12).double())
    found = site(q_norm=norm, k_norm=norm)
    mixer = convert(name, found, w)
    assert close((mixer.C_norm.weight, mixer.B_norm.weight), (w.q_norm, w.k_norm))
    mixer.load_attention(attention_weights(k_bias=None))  # norms without weight: that of one
    layer, rows = mixer.attention_rows["k"]
    assert not mixer.C_norm.weight.any() and not layer.bias[rows].any() and layer.bias.any()
    with pytest.raises(ValueError, match=r"k_weight: expected shape \(24, 48\), got \(48, 48\)"):
        convert(name, found, attention_weights(k_weight=torch.zeros(48, 48)))
    with pytest.raises(ValueError, match="v_bias: expected None, got a tensor"):
        bare = {n: SimpleNamespace(bias_fqn=None) for n in "qkv"}
        convert(name, site(**bare), attention_weights())


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """Sums, decays and states are fp32 where the projections are bf16."""
    mixer = MIXERS[name](MIXERS[name].Config(hidden_size=64, state_size=8))
    x = torch.randn(2, 50, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
    assert y.dtype == torch.bfloat16 and state.recurrent[0].dtype == torch.float32
    assert (y - mixer(x)[0]).norm() < 0.05 * y.norm()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "mamba",
            {"dt_init": "ones"},
            r"dt_init: expected one of \('constant', 'random'\), got on",
        ),
        ("mamba", {"num_heads": 3}, "num_heads: expected a divisor of 2048, got 3"),
        ("mamba", {"num_kv_heads": 2}, "num_kv_heads: expected a divisor of 1, got 2"),
        ("mamba2", {"n_groups": 3}, "n_groups: expected a divisor of 64, got 3"),
        ("mamba2", {"head_dim": 65}, "head_dim: expected a divisor of 4096, got 65"),
        ("mamba2", {"state_size": 4, "rotary": HALVES}, "rotary: expected at most 4 channels"),
        ("mamba2", {"hidden_act": "sin"}, "activation: expected one of"),
    ],
)
def test_bad_config(name, fields, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        MIXERS[name](MIXERS[name].Config(**fields))
