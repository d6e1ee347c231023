"""What exporters open our CPU ops into: a runtime without Python has no ops of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram

from flacompile.ops.conv import decomposed as conv
from flacompile.ops.delta_rule import decomposed as delta_rule
from flacompile.ops.dplr import decomposed as dplr
from flacompile.ops.linear_attn import decomposed as linear_attn
from flacompile.ops.scan import decomposed as scan
from flacompile.ops.selective_scan import decomposed as selective_scan
from flacompile.ops.ternary import decomposed as ternary_linear


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """op overload -> the same function in a fixed number of aten operations, any T."""
    return {
        torch.ops.flacompile.conv_forward.default: conv,
        torch.ops.flacompile.delta_rule_forward.default: delta_rule,
        torch.ops.flacompile.dplr_forward.default: dplr,
        torch.ops.flacompile.linear_attn_forward.default: linear_attn,
        torch.ops.flacompile.scan_forward.default: scan,
        torch.ops.flacompile.selective_scan_forward.default: selective_scan,
        torch.ops.flacompile.ternary_linear_forward.default: ternary_linear,
    }


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Opens every op of ours in an exported program; the other operations stay as they are."""
    return program.run_decompositions(decomposition_table())
