"""delta_rule and dplr where the table of ops does not look: what only a low-rank transition has."""

import pytest
import torch
import torch.nn.functional as F

from flacompile.ops import delta_rule, dplr, spec
from flacompile.ops.chunked_dplr import folds, loop


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("beta", [1.0, 1.9])
def test_a_key_that_repeats(beta):
    """The powers of a chunk's matrix are huge then, and cancel: an inverse must not need them."""
    q, v = normal(1, 300, 2, 8), normal(1, 300, 2, 8, seed=1)
    k = F.normalize(normal(1, 1, 2, 8, seed=2), dim=-1).expand(1, 300, 2, 8)
    betas = torch.full((1, 300, 2), beta)
    got = delta_rule(q, k, v, None, betas)
    want = spec.delta_rule(q.double(), k.double(), v.double(), None, betas.double())
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


def test_a_and_b_may_be_wider_than_q():
    q, k, v = (normal(1, 70, 2, 8, seed=i).bfloat16() for i in range(3))
    b = F.normalize(normal(1, 70, 2, 8, seed=3), dim=-1)
    o, state = dplr(q, k, v, None, -b, b)
    wide = [x.double() for x in (q, k, v)]
    want = spec.dplr(*wide, None, -b.double(), b.double())
    assert o.dtype == torch.bfloat16
    assert error(o, want[0]) < torch.finfo(torch.bfloat16).eps and error(state, want[1]) < 1e-5


@pytest.mark.parametrize("num_chunks", [1, 2, 16, 17, 300])
def test_folds_are_the_loop(num_chunks):
    """The exported form of the chunks' recurrence, beyond one fold and beyond many."""
    M = torch.linalg.qr(normal(1, 2, num_chunks, 6, 6).double()).Q
    N, state = normal(1, 2, num_chunks, 6, 4, seed=1).double(), normal(1, 2, 6, 4, seed=2).double()
    for got, want in zip(folds(M, N, state), loop(M, N, state), strict=True):
        assert error(got, want) < 1e-12
