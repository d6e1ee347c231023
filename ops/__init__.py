"""Tensors in, tensors out: each recurrence as one op of torch.library.

Everywhere: time second, ``[B, T, H, *]``; g is the natural log of a decay, <= 0, in fp32; a state
is ``[N, H, K, V]`` in fp32, goes in and comes out; ``cu_seqlens [N + 1]`` bounds packed sequences.
"""

from flacompile.ops.linear_attn import linear_attn, linear_attn_step

__all__ = ["linear_attn", "linear_attn_step"]
