"""The softmax over time behind ABC and LightNet, where logits are extreme or there are none."""

import itertools

import pytest
import torch
from mixer_inputs import close
from test_mixer_conversion import attention_weights, convert, site

from flacompile.ops import running_softmax as module
from flacompile.ops.kernels import linear_attn as linear_attn_kernels
from flacompile.running_softmax import RunningSoftmax


@pytest.fixture(params=["plain", "kernel"])
def way(request, monkeypatch, poisoned_empty, device):
    """PyTorch as on a CPU, or the kernel with its own gradients."""
    apply = module._weigh.function.apply

    def by_kernel(*args):
        return [y.cpu() for y in apply(*(x if x is None else x.to(device) for x in args))]

    if request.param == "kernel":
        monkeypatch.setattr(module, "on_plain_cuda", lambda args: True)
        monkeypatch.setattr(module, "_weigh", by_kernel)
    return request.param


def logits(scale, dtype, time=50):
    generator = torch.Generator().manual_seed(time)
    return scale * torch.randn(2, time, 3, 4, generator=generator, dtype=dtype)


def means(running, x, v, state=None, cu_seqlens=None):
    """The mean of v [B, T] under the weights of every step, by its recurrence."""
    weight, g, total, _ = running(x, state, cu_seqlens)
    S, o = torch.zeros_like(total[:, 0]), []
    for t in range(x.shape[1]):
        S = g[:, t].exp() * S + weight[:, t] * v[:, t, None, None]
        o.append(S / total[:, t])
    return torch.stack(o, 1)


@pytest.mark.parametrize("recency", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_and_gradients(recency, scale, dtype, way):
    x, v = logits(scale, dtype), logits(1.0, dtype)[..., 0, 0]
    running, age = RunningSoftmax(3, 4, recency), torch.arange(50)[:, None] - torch.arange(50)
    x.requires_grad_()
    got = means(running, x, v)
    rate = running.log_rate.exp() if recency else torch.zeros(3, 4)
    scores = x.double()[:, None] - rate * age[..., None, None]
    scores = scores.masked_fill(age[..., None, None] < 0, -torch.inf)
    want = torch.einsum("btshm,bs->bthm", scores.softmax(2), v.double())
    assert close(got, want)
    a, b = (torch.autograd.grad((y * y).mean(), x)[0] for y in (got, want))
    assert close(a, b)


@pytest.mark.parametrize("recency", [False, True])
def test_packed_extremes(recency, way):
    """No sequence sees the maximum of the one before it, nor forgets with it."""
    x = torch.cat([logits(s, torch.float32, 10)[:1] + s for s in (1e4, 1.0, -1e4, 1e2)], 1)
    running, bounds = RunningSoftmax(3, 4, recency), [0, 10, 20, 20, 30, 40]
    *packed, states = running(x, None, torch.tensor(bounds))
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start < end:
            *alone, state = running(x[:, start:end], None, None)
            assert close([y[:, start:end] for y in packed], alone)
            assert close([s[i : i + 1] for s in states], state)


@pytest.mark.parametrize("recency", [False, True])
def test_no_token(recency, way):
    """Rows of padding are finite, leave a carried state alone and an empty one empty."""
    running, padding = RunningSoftmax(3, 4, recency), torch.full((2, 5, 3, 4), -torch.inf)
    padding.requires_grad_()
    carried = running(logits(1.0, torch.float32), None, None)[-1]
    for state in (None, carried):
        weight, g, total, last = running(padding, state, None)
        assert not weight.any() and not g.any()
        dx, *_ = torch.autograd.grad((weight + g + total).sum(), padding)
        assert not dx.any()
        want = last if state is None else state
        assert close(last, want) and all(part.isfinite().all() for part in last)
    assert not running(padding, None, None)[-1][1].any()


@pytest.mark.parametrize("bounds", [None, [0, 150, 150, 151, 400]])
@pytest.mark.parametrize("segments", [1, 3])
def test_kernel_over_blocks_and_segments(bounds, segments, monkeypatch, device):
    """Several blocks of tokens, and sequences cut where there are few."""
    monkeypatch.setattr(linear_attn_kernels, "SHORTEST", 400 // segments)
    x = 5 * logits(1.0, torch.float32, 400)[:1].to(device)
    x[:, 40:300, :, :2] -= 100.0  # an early maximum lasts
    rate = 0.01 * x.abs().sigmoid()
    cu = None if bounds is None else torch.tensor(bounds, device=device)
    start = torch.full((1 if bounds is None else 4, 3, 4), 2.0, device=device)
    start[:, 0] = module.LOWEST
    before, m, last = module.maxima(x, rate.double(), start, cu)
    want = *module._relative(x, rate, before, m), last
    flat = (y.flatten(2) for y in (x, rate))
    got = module._weigh.kernels(*flat, start.flatten(1), cu)
    assert close([y.view_as(z) for y, z in zip(got, want, strict=True)], want)


def test_half_lives():
    running = RunningSoftmax(3, 5, True)
    running.set_half_life(torch.tensor([16.0, 2.0, 1.0]))
    want = torch.tensor([[1, 2, 4, 8, 16], [1, 2**0.25, 2**0.5, 2**0.75, 2], [1] * 5])
    assert close(0.5 ** (1 / want), (-running.log_rate.exp()).exp())
    with pytest.raises(ValueError, match=r"tokens: expected shape \(3,\)"):
        running.set_half_life(torch.ones(2))
    with pytest.raises(ValueError, match="recency: expected True"):
        RunningSoftmax(3, 5, False).set_half_life(torch.ones(3))


@pytest.mark.parametrize("name", ["abc", "lightnet"])
def test_a_conversion_takes_means_of_values(name):
    """The weights of v add up to one at every token, for any input."""
    w = attention_weights(o_bias=torch.zeros(48).double())
    w.v_weight.zero_()
    w.v_bias.fill_(1.0)
    x = torch.randn(1, 9, 48, dtype=torch.float64)
    assert close(convert(name, site(), w)(x)[0], w.o_weight.sum(1).expand(1, 9, -1))


def test_slots_of_a_conversion_fill_by_the_keys():
    w = attention_weights(k_bias=None)
    mixer, x = convert("abc", site(k=type("Bare", (), {"bias_fqn": None})), w), torch.randn(5, 48)
    slots = mixer.s_proj(x.double()).unflatten(-1, (4, 12))
    keys = (x.double() @ w.k_weight.T).unflatten(-1, (2, 12))
    assert close(slots, keys[:, [0, 0, 1, 1]])
