"""What ONNX and ExecuTorch lack of aten, in operations that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from flacompile.ops.chunked_dplr import LONGEST


def portable_table() -> dict[Any, Callable[..., Any]]:
    """aten overload -> the same function, for the arguments that our own ops call it with."""
    return {
        torch.ops.aten.cummax.default: running_max,
        torch.ops.aten.linalg_solve_triangular.default: solve_unit_lower,
    }


def portable(program: ExportedProgram) -> ExportedProgram:
    """Opens the operations of a program, decomposed before, that other runtimes lack."""
    table = portable_table()
    has_any = any(node.target in table for node in program.graph.nodes)
    return program.run_decompositions(table) if has_any else program


def running_max(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``x.cummax(dim)`` over at most LONGEST entries and the first state; its indices are zeros."""
    x, span = x.movedim(dim, -1), 1
    while span <= LONGEST:
        x = torch.maximum(x, F.pad(x, (span, 0), value=-torch.inf)[..., : x.shape[-1]])
        span *= 2
    return x.movedim(-1, dim).contiguous(), torch.zeros_like(x, dtype=torch.int64).movedim(-1, dim)


def solve_unit_lower(
    A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """X of A X = B for A [..., C, C], one on the diagonal and zero above it.

    From the inverses of blocks on the diagonal come those of blocks twice as wide:

        [L 0; E R]^-1 = [L^-1 0; -R^-1 E L^-1 R^-1]        X <- X - X E X
    """
    if upper or not left or not unitriangular:
        raise ValueError(
            f"A: expected a unit lower triangle on the left, got upper={upper}, left={left}, "
            f"unitriangular={unitriangular}"
        )
    index = torch.arange(A.shape[-1], device=A.device)
    inverse = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    span = 1
    while span < A.shape[-1]:
        block = index // span
        row, column = block[:, None], block
        is_corner = (row % 2 == 1) & (column == row - 1)
        inverse = inverse - inverse @ torch.where(is_corner, A, 0.0) @ inverse
        span *= 2
    return inverse @ B
