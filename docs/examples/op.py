"""An op alone: linear attention with a decay a head, in pieces, in packs and with gradients.

python docs/examples/op.py
"""

import torch

from flacompile.ops import linear_attn, linear_attn_step

B, T, H, K, V = 2, 100, 4, 16, 32


def main() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, B, T, H, K)
    v = torch.randn(B, T, H, V, requires_grad=True)
    g = -torch.rand(B, T, H)  # log decays, never positive; [B, T, H, K] for one a channel

    o, state = linear_attn(q, k, v, g)
    print("output", tuple(o.shape), "state", tuple(state.shape))  # the state: [B, H, K, V], fp32

    # A sequence in two calls and a step: the state carries on.
    _, before = linear_attn(q[:, :60], k[:, :60], v[:, :60], g[:, :60])
    _, before = linear_attn(q[:, 60:-1], k[:, 60:-1], v[:, 60:-1], g[:, 60:-1], state=before)
    last, _ = linear_attn_step(q[:, -1], k[:, -1], v[:, -1], g[:, -1], state=before)
    torch.testing.assert_close(last, o[:, -1], rtol=1e-4, atol=1e-4)

    # Sequences of different lengths stand in one row, with their bounds.
    row = [x[:1] for x in (q, k, v, g)]
    packed, states = linear_attn(*row, cu_seqlens=torch.tensor([0, 30, 100]))
    alone, _ = linear_attn(*(x[:, 30:] for x in row))
    torch.testing.assert_close(packed[:, 30:], alone, rtol=1e-4, atol=1e-4)
    print("two sequences in a row: states", tuple(states.shape))

    (gradient,) = torch.autograd.grad(o.square().mean(), v)
    print("gradient of v", tuple(gradient.shape), f"of norm {gradient.norm():.3f}")


if __name__ == "__main__":
    main()
