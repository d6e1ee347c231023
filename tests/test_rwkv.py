"""What only RWKV has: values of the first layer, and how an attention becomes r, k and v."""

import pytest
import torch
from mixer_inputs import close, draw
from test_mixer_conversion import attention_weights, attention_weights_mha, convert, site
from test_mixers import build
from textbook import TEXTBOOK, before

over_both = pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])


def values_of(layer, x):
    return layer.v_proj(x + (before(x) - x) * layer.x_v)


def two_layers():
    """A first layer, a second one, and what comes to each."""
    layers = build("rwkv7"), build("rwkv7", {"layer_idx": 1, "v_low_rank_dim": 5})
    return *layers, draw(2, 13), draw(2, 14)[:, 1:]


def test_values_of_the_first_layer():
    first, second, x, z = two_layers()
    v_first = first.values(x)
    assert close(v_first, values_of(first, x))
    assert close(second(z, v_first=v_first)[0], TEXTBOOK["rwkv7"](second, z, v_first))


def test_values_token_by_token():
    first, second, x, z = two_layers()
    want, want_state = second(z, v_first=first.values(x))
    below, above, outputs = first.init_state(2), second.init_state(2), []
    for token, upper in zip(x.unbind(1), z.unbind(1), strict=True):
        v_first = first.values(token[:, None], below)[:, 0]
        below = first.step(token, below)[1]
        y, above = second.step(upper, above, v_first)
        outputs.append(y)
    assert close(torch.stack(outputs, 1), want) and close(above, want_state)


def test_values_move_with_their_tokens():
    """Padding in front and between, and packed sequences, against each sequence alone."""
    first, second, x, z = two_layers()
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4], mask[1, [2, 3, 9]] = False, False
    v_first = first.values(x, mask=mask)
    y, state = second(z, mask=mask, v_first=v_first)
    assert not v_first[~mask].any()
    packed = [torch.cat([i[row, mask[row]] for row in (0, 1)])[None] for i in (x, z)]
    cu_seqlens = torch.tensor([0, 9, 19])
    v_packed = first.values(packed[0], cu_seqlens=cu_seqlens)
    y_packed, _ = second(packed[1], cu_seqlens=cu_seqlens, v_first=v_packed)
    for row, span in ((0, slice(0, 9)), (1, slice(9, 19))):
        alone = [i[row, mask[row]][None] for i in (x, z)]
        want, want_state = second(alone[1], v_first=values_of(first, alone[0]))
        assert close((y[row, mask[row]], y_packed[0, span]), (want[0], want[0]))
        assert close([s[row] for s in (*state.recurrent, *state.conv)],
                     [s[0] for s in (*want_state.recurrent, *want_state.conv)])  # fmt: skip


def test_values_that_do_not_fit():
    first, second, x, z = two_layers()
    for call, message in (
        (lambda: second(z), "v_first: expected the values of layer 0 in layer 1, got None"),
        (lambda: second.step(z[:, 0], second.init_state(2)), "v_first: expected the values"),
        (lambda: second(z, v_first=x[..., 1:]), r"v_first: expected shape \(2, 13, 48\)"),
        (lambda: first(x, v_first=x), "v_first: expected None in layer 0"),
        (lambda: second.values(z), "layer_idx: expected 0, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@over_both
def test_conversion_starts_as_gla(name):
    """With nothing removed from the state, rwkv7's a = 0."""
    weights, found = attention_weights_mha(attention_weights()), site(num_kv_heads=4)
    mixer, gla = (convert(n, found, weights) for n in (name, "gla"))
    if name == "rwkv7":
        mixer.a_lora.up.bias.data.fill_(-1e4)
    assert close(mixer(draw(2, 70))[0], gla(draw(2, 70))[0])


@over_both
def test_conversion_of_grouped_heads(name):
    mixer, gla = (convert(n, site(), attention_weights()) for n in (name, "gla"))
    for each in (mixer, gla):
        each.set_half_life(torch.full((4,), 20.0))
        each.o_proj.weight.data.copy_(attention_weights().o_weight)
    if name == "rwkv7":
        mixer.a_lora.up.bias.data.fill_(-1e4)
    else:
        mixer.o_proj.weight.data.mul_(2 ** (-1 / 20))
    assert close(mixer(draw(2, 70))[0], gla(draw(2, 70))[0])


@over_both
def test_conversion_learns_everywhere(name):
    """A neutral start that stands still in no gate: two steps of descent move every weight."""
    mixer = convert(name, site(), attention_weights())
    start = {key: value.clone() for key, value in mixer.named_parameters()}
    optimizer = torch.optim.Adam(mixer.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        mixer(draw(2, 30))[0].square().mean().backward()
        optimizer.step()
    still = [key for key, value in mixer.named_parameters() if close(value, start[key])]
    assert not still


def test_fastest_decays():
    """Half-lives out of reach of rwkv7 give the fastest it has; rwkv6's logits may be anything."""
    mixer = convert("rwkv7", site(), attention_weights())
    mixer.set_half_life(torch.full((4,), 0.1))
    x = draw(1, 3)
    assert close(mixer.decay(x).sigmoid(), torch.full((1, 3, 48), 0.99, dtype=x.dtype))
    mixer = convert("rwkv6", site(), attention_weights())
    mixer.decay.up.bias.data.fill_(1e4)
    y = mixer(draw(1, 30))[0]
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())
