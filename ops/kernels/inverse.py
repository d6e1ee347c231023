"""The inverse of a unit triangular matrix in registers."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(8)  # rows that are taken one after the other


@triton.jit
def _inverse(A, i, C: tl.constexpr, PRECISION: tl.constexpr):
    """(1 - A)^-1 of a strictly lower matrix.

    First of its blocks on the diagonal, all at once and apart from the rest, row by row:
    X_i = e_i + sum_j A_ij X_j. Then of blocks twice as large, from A below the diagonal in each:
    X + X A X.
    """
    # 1. [BLOCKS, BLOCK, BLOCK] blocks.
    BLOCKS: tl.constexpr = C // BLOCK
    block = tl.arange(0, BLOCKS)
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    whole = tl.reshape(A, [BLOCKS, BLOCK, BLOCKS, BLOCK])
    inside = tl.sum(tl.where(on_diagonal, whole, 0.0), 2)
    row, col = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    X = tl.where(row == col, 1.0, tl.zeros([BLOCKS, BLOCK, BLOCK], tl.float32))
    turned = tl.trans(inside, 0, 2, 1)
    for r in range(1, BLOCK):
        A_r = tl.sum(tl.where(col == r, turned, 0.0), 2)  # [BLOCKS, j]
        X_r = tl.sum(A_r[:, :, None] * X, 1)
        X += tl.where(row == r, X_r[:, None, :], 0.0)
    X = tl.reshape(tl.where(on_diagonal, X[:, :, None, :], 0.0), [C, C])

    # 2. Larger ones.
    row, col = i[:, None], i[None, :]
    size = BLOCK
    while size < C:
        joins = (row // (2 * size) == col // (2 * size)) & (row // size > col // size)
        below = tl.dot(tl.where(joins, A, 0.0), X, input_precision=PRECISION)
        X += tl.dot(X, below, input_precision=PRECISION)
        size *= 2
    return X
