"""Based and ReBased: the features of their weights, and conversions that start near softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from mixer_inputs import close, draw
from op_cases import OPS, Draw, gradients, leaves
from test_mixer_conversion import attention_weights, convert, heads, site, teacher

from flacompile.ops import quadratic_attn, spec
from flacompile.ops.quadratic_attn import features, num_features


@pytest.mark.parametrize("width", [1, 2, 5, 16])
@pytest.mark.parametrize("weights", [(1.0, 0.5, 0.125), (0.0, 0.0, 0.3), (0.0, 0.7, 0.3)])
def test_products_of_features_are_the_polynomial(width, weights):
    q, k = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0)).double()
    psi, phi = features(q, k, weights)
    assert psi.shape == phi.shape == (7, num_features(width, weights))
    a, (c0, c1, c2) = (q * k).sum(-1), weights
    assert close((psi * phi).sum(-1), c0 + c1 * a + c2 * a * a)


@pytest.mark.parametrize(("name", "order"), [("based", 3), ("rebased", 2)])
def test_nears_softmax_as_scores_vanish(name, order):
    """Scores of size ε leave an error of ε³ where weights are e^a to second order, or of ε²."""
    x, errors = draw(2, 17), []
    for size in (1e-2, 5e-3):
        w = attention_weights()
        w.q_weight, w.q_bias = w.q_weight * size, w.q_bias * size
        mixer = convert(name, site(), w)
        mixer.set_half_life(torch.full((4,), 1e15))
        errors.append((mixer(x)[0] - teacher(w, x)).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", ["based", "linear_attn", "rebased"])
def test_half_life_weighs_by_age(name):
    """Keys of zero leave a mean of v whose weights halve every half-life."""
    w, x = attention_weights(), draw(1, 9)
    w.k_weight.zero_()
    w.k_bias.zero_()
    mixer, tokens = convert(name, site(), w), torch.tensor([0.5, 3.0, 12.0, 50.0])
    mixer.set_half_life(tokens)
    age = (torch.arange(9)[:, None] - torch.arange(9)).double()
    weights = (0.5 ** (age / tokens.view(4, 1, 1).double())).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    o = torch.einsum("hts,bshv->bthv", weights, heads(mixer, x)[2])
    want = F.linear(o.flatten(2), w.o_weight, w.o_bias)
    assert close(mixer(x)[0].float(), want.float())  # but for eps, which softmax has not


@pytest.mark.parametrize("decay", [False, True])
def test_masked_tokens_count_nothing(decay):
    """They still make what came before them fade."""
    draw, weights = Draw(2, 40, 0.1), (1.0, 0.5, 0.125)
    q, k, v, gk, state = OPS["quadratic_attn"].tensors("head" if decay else "None", draw)
    mask, args = draw.at_tokens() < 0.5, leaves([q, k, v, gk, state])
    *inputs, before = args
    got = quadratic_attn(*inputs, weights=weights, state=before, mask=mask)
    want = spec.quadratic_attn(*inputs, weights=weights, state=before, mask=mask)
    assert close(got, want) and close(gradients(got, args)[:3], gradients(want, args)[:3])


BAD = {
    "mask: expected bool, got torch.uint8": {"mask": torch.ones(2, 9, dtype=torch.uint8)},
    r"mask: expected shape \(2, 9\)": {"mask": torch.ones(9, dtype=torch.bool)},
    "mask: expected the device of q, cpu": {
        "mask": torch.ones(2, 9, dtype=torch.bool, device="meta")
    },
    r"gk: expected shape \(2, 9, 2\)": {"gk": -torch.ones(2, 9, 2, 6)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    q, k, v = torch.randn(3, 2, 9, 2, 6)
    with pytest.raises(ValueError, match=message):
        quadratic_attn(q, k, v, weights=(1.0, 0.5, 0.125), **BAD[message])
