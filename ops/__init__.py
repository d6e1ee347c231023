"""Tensors in, tensors out: each recurrence as one op of torch.library.

Everywhere: time second, ``[B, T, H, *]``; g is the natural log of a decay, <= 0, in fp32; a state
is ``[N, H, K, V]`` in fp32, goes in and comes out; ``cu_seqlens [N + 1]`` bounds packed sequences.
"""

from flacompile.ops.conv import conv, conv_step
from flacompile.ops.delta_rule import delta_rule, delta_rule_step
from flacompile.ops.dplr import dplr, dplr_step
from flacompile.ops.linear_attn import linear_attn, linear_attn_step
from flacompile.ops.quadratic_attn import quadratic_attn, quadratic_attn_step
from flacompile.ops.scan import scan, scan_step
from flacompile.ops.selective_scan import selective_scan, selective_scan_step
from flacompile.ops.ternary import ternary_linear

__all__ = [
    "conv",
    "conv_step",
    "delta_rule",
    "delta_rule_step",
    "dplr",
    "dplr_step",
    "linear_attn",
    "linear_attn_step",
    "quadratic_attn",
    "quadratic_attn_step",
    "scan",
    "scan_step",
    "selective_scan",
    "selective_scan_step",
    "ternary_linear",
]
