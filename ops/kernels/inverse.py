"""The inverse of a unit triangular matrix in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inverse(A, i, C: tl.constexpr, PRECISION: tl.constexpr):
    """(1 - A)^-1 of a strictly lower matrix.

    First of its 8 x 8 blocks on the diagonal, all at once, row by row: X_i = e_i + sum_j A_ij X_j.
    Then of blocks twice as large, from A below the diagonal in each: X + X A X.
    """
    row, col = i[:, None], i[None, :]
    X = tl.where(row == col, 1.0, 0.0)
    inside = tl.trans(tl.where(row // 8 == col // 8, A, 0.0))
    for r in range(1, 8):
        A_r = tl.sum(tl.where(col % 8 == r, inside, 0.0), 1)  # of row r of every block
        X_r = tl.sum(A_r[:, None] * X, 0)
        X += tl.where((row % 8 == r) & (row // 8 == col // 8), X_r[None, :], 0.0)
    size = 8
    while size < C:
        joins = (row // (2 * size) == col // (2 * size)) & (row // size > col // size)
        below = tl.dot(tl.where(joins, A, 0.0), X, input_precision=PRECISION)
        X += tl.dot(X, below, input_precision=PRECISION)
        size *= 2
    return X
