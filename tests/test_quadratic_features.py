"""Based and ReBased: the products that stand for x ⊗ x, and conversions that start near softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from mixer_inputs import close, draw
from test_mixer_conversion import attention_weights, convert, heads, site, teacher

from flacompile.layers.based import pairs


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_pairs_are_the_square_of_the_product(width):
    q, k = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0)).double()
    assert pairs(q).shape == (7, width * (width + 1) // 2)
    assert close((pairs(q, 2) * pairs(k)).sum(-1), (q * k).sum(-1).square())


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
