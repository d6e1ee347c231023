"""Gated DeltaNet and Gated DeltaProduct: how they begin, and how a conversion to them begins."""

import pytest
import torch
import torch.nn.functional as F
from mixer_inputs import close, draw
from test_mixer_conversion import attention_weights, convert, heads, site
from textbook import rotate

from flacompile.layers import MIXERS

BOTH = ["gated_deltanet", "gated_deltaproduct"]


@pytest.mark.parametrize("name", BOTH)
def test_first_decays(name):
    """e^A within (0, 16) and softplus(b) within (0.001, 0.1), over the whole of both ranges."""
    torch.manual_seed(0)
    cls = MIXERS[name]
    mixer = cls(cls.Config(hidden_size=8, num_heads=400, head_dim=1, use_short_conv=False))
    rate, step = mixer.A_log.detach().exp() / 16, F.softplus(mixer.dt_bias.detach())
    for share in (rate, step.log10() / 2 + 1.5):
        assert 0 < share.min() < 0.02 and 0.98 < share.max() < 1
        assert share.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", BOTH)
def test_half_life(name):
    mixer, tokens = convert(name, site(), attention_weights()), torch.tensor([3.0, 12, 50, 1e4])
    mixer.set_half_life(tokens)
    halves = mixer.decay(draw(1, 3)).exp() ** tokens.double()
    assert close(halves, torch.full_like(halves, 0.5))


def test_first_token_of_a_conversion():
    """From an empty state o = β (q·k) v, with q and k of length one and β = 1/2."""
    w, x = attention_weights(), draw(2, 1)
    mixer = convert("gated_deltanet", site(), w)
    (q, k), v = (rotate(y, mixer.rotary) for y in heads(mixer, x)[:2]), heads(mixer, x)[2]
    o = 0.5 * F.cosine_similarity(q, k, dim=-1)[..., None] * v
    want = F.linear(o.flatten(2), w.o_weight, w.o_bias)
    assert (mixer(x)[0] - want).norm() < 1e-5 * want.norm()  # the norm has an eps


def test_one_of_the_steps_takes_over_the_attention():
    """Without the betas of the steps before it, DeltaProduct is converted as DeltaNet is."""
    w, x = attention_weights(), draw(2, 21)
    product, net = (convert(name, site(), w) for name in reversed(BOTH))
    assert not close(product(x)[0], net(x)[0])
    product.b_proj.bias.data[:4] = -1e3
    assert close(product(x)[0], net(x)[0])


def test_values_of_more_heads_than_keys():
    with pytest.raises(ValueError, match="num_v_heads: expected a multiple of 6, got 8"):
        MIXERS["gated_deltanet"](MIXERS["gated_deltanet"].Config(num_v_heads=8))
