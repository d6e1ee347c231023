"""The Triton kernel of dplr against a token loop in float64, where the table of ops is coarse."""

import pytest
import torch
import torch.nn.functional as F

from flacompile.ops.kernels.dplr import dplr_sweep

pytestmark = pytest.mark.usefixtures("poisoned_empty")

H = 2


def draw(device, time, kind, K=16, V=24, strength=0.1):
    """a, b, q, k, v, c, g and a state: -a and b are one direction."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(1, time, H, *shape, generator=generator).to(device)

    b = F.normalize(normal(K), dim=-1)
    g = {None: None, "head": -strength * normal().abs(), "channel": -strength * normal(K).abs()}
    tensors = [-b * normal(1).sigmoid(), b, normal(K), normal(K), normal(V), normal(V), g[kind]]
    return tensors, torch.randn(1, H, K, V, generator=generator).to(device)


def reference(tensors, state, reverse):
    """u, o and the final state, as the kernels' module defines the two directions."""
    a, b, q, k, v, c, g = (x if x is None else x.double() for x in tensors)
    S, rows = state.double(), []

    def read(x, S):
        return torch.einsum("bhk,bhkv->bhv", x, S)

    for t in reversed(range(a.shape[1])) if reverse else range(a.shape[1]):
        second = k[:, t, :, :, None] * v[:, t, :, None]
        S = S + second if reverse else S
        u, o = read(a[:, t], S) + c[:, t], read(q[:, t], S)
        S = S if g is None else S * g[:, t].exp().reshape(1, H, -1, 1)
        S = S + b[:, t, :, :, None] * u[:, :, None]
        S = S if reverse else S + second
        rows.append((u, o if reverse else read(q[:, t], S)))
    u, o = (torch.stack(side[::-1] if reverse else side, 1) for side in zip(*rows, strict=True))
    return u, 0.3 * o, S


def check(tensors, state, reverse, tolerance=1e-5, dtype=torch.float32):
    u, o, final = dplr_sweep(*tensors, state, None, 0.3, reverse, dtype=dtype)
    assert (u.dtype, o.dtype, final.dtype) == (dtype, dtype, torch.float32)
    for x, want in zip((u, o, final), reference(tensors, state, reverse), strict=True):
        assert (x - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", [None, "head", "channel"])
@pytest.mark.parametrize(("time", "K", "V"), [(1, 16, 24), (16, 40, 16), (63, 8, 80)])
def test_sizes(device, kind, time, K, V, reverse):
    check(*draw(device, time, kind, K, V), reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_strong_decay_does_not_blur_the_weak_ones_after_it(device, kind, reverse):
    tensors, state = draw(device, 40, kind, strength=0.01)
    g = tensors[-1]
    g[:, ::9], g[:, 4::9], g[:, 14] = -100.0, 0.0, -torch.inf
    check(tensors, state, reverse)


def test_equal_directions(device):
    """The powers of such a matrix are of 10^4, its inverse is of ones."""
    tensors, state = draw(device, 40, None)
    tensors[1] = tensors[1][:, :1].expand_as(tensors[1])
    tensors[0] = -tensors[1]
    check(tensors, state, False)


@pytest.mark.parametrize("kind", [None, "head", "channel"])
def test_half(device, kind):
    tensors, state = draw(device, 40, kind)
    half = [x if x is None else x.half() for x in tensors[:6]] + tensors[6:]
    check(half, state, False, 2e-3, torch.float16)


def test_memory_may_be_strided(device):
    tensors, state = draw(device, 33, "channel")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    check(strided, state.mT.contiguous().mT, True)
