"""Triton kernels of `ternary_linear`: one for a few rows, two for many.

    y = s r (X (W + 1)^T - X 1)        X = clip(round(x / max(r, 1e-5)), -128, 127)
                                       r = max |x| / 127

The packed bytes hold W + 1; the sum of X is taken off in the end. All sums are of int32.

Few rows (decode): a program takes ROWS rows of W and one of x, rounds that in registers, and reads
its packed bytes once, four to a word. A word shifted by 2 j and masked holds four neighbouring
weights, whose products with four of X are one instruction, dp4a; the interpreter, which has none,
adds up the four bytes. It moves N P / 4 bytes, and is to be bound by that.

Many rows (prefill): one program a row rounds it, and tiles of y are products on int8 tensor cores,
whose tiles of W are unpacked from one load of bytes for four products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch, on_interpreter

FEW = 8  # rows, each of which reads all of W
ROUND = {"COLUMNS": 1024, "num_warps": 4}
GEMV = {"ROWS": 16, "WORDS": 128, "num_warps": 4}
GEMM = {"M_TILE": 64, "N_TILE": 128, "BYTES": 32, "num_warps": 8, "num_stages": 3}


@triton.jit
def _scale_of(x, K, COLUMNS: tl.constexpr):
    """r of a row, rounded to the dtype of x."""
    k = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, K, COLUMNS):
        values = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    r = tl.math.div_rn(tl.max(largest, 0), 127.0)
    return r.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _codes(x, k, K, r):
    """X at columns k, int32; adding 1.5 2^23 rounds to the nearest even integer."""
    values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    inverse = tl.math.div_rn(1.0, tl.maximum(r, 1e-5))
    rounded = (values * inverse + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int32)


@triton.jit
def _dot4(a, b, total, DP4A: tl.constexpr):
    """total + the dot product of four int8 in each word of a and b."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for c in tl.static_range(4):
            total += ((a << (24 - 8 * c)) >> 24) * ((b << (24 - 8 * c)) >> 24)
        return total


@triton.jit
def _gemv_kernel(
    x, packed, scale, y, N, K, P_WORDS,
    ROWS: tl.constexpr, WORDS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """y at one row and ROWS columns; packed as words [N, P_WORDS], field j at x + 4 j P_WORDS."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1).to(tl.int64)
    x += m * K
    r = _scale_of(x, K, 8 * WORDS)
    total = tl.zeros([ROWS, WORDS], tl.int32)
    sums = tl.zeros([WORDS], tl.int32)
    for start in range(0, P_WORDS, WORDS):
        i = start + tl.arange(0, WORDS)
        inside = (n < N)[:, None] & (i < P_WORDS)[None, :]
        offset = n.to(tl.int64)[:, None] * P_WORDS + i[None, :]
        words = tl.load(packed + offset, mask=inside, other=0)
        for j in tl.static_range(4):
            # 1. four neighbours of X as one word; beyond P there are no weights, but X goes on
            four = tl.zeros([WORDS], tl.int32)
            for c in tl.static_range(4):
                k = tl.where(i < P_WORDS, 4 * (j * P_WORDS + i) + c, K)
                code = _codes(x, k, K, r)
                sums += code
                four |= (code & 255) << (8 * c)
            # 2. their products with the weights of field j
            fields = (words >> (2 * j)) & 0x03030303
            fours = tl.broadcast_to(four[None, :], [ROWS, WORDS])
            total = _dot4(fours, fields, total, DP4A)
    sum_of_products = (tl.sum(total, 1) - tl.sum(sums, 0)).to(tl.float32)
    value = sum_of_products * tl.load(scale) * r
    tl.store(y + m * N + n, value.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _round_kernel(x, codes, r, sums, K, P, COLUMNS: tl.constexpr):
    """X with its padding, r and the sum of X of one row."""
    m = tl.program_id(0).to(tl.int64)
    x += m * K
    scale = _scale_of(x, K, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, P, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        code = _codes(x, k, K, scale)
        total += code
        tl.store(codes + m * P + k, code.to(tl.int8), mask=k < P)
    tl.store(r + m, scale)
    tl.store(sums + m, tl.sum(total, 0))


@triton.jit
def _gemm_kernel(
    codes, r, sums, packed, scale, y, M, N, BYTES_A_ROW,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One tile of y; packed as bytes [N, BYTES_A_ROW], field j at codes + j BYTES_A_ROW."""
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    rows = m.to(tl.int64)[:, None] * (4 * BYTES_A_ROW)
    columns = n.to(tl.int64)[None, :] * BYTES_A_ROW
    total = tl.zeros([M_TILE, N_TILE], tl.int32)
    for start in range(0, BYTES_A_ROW, BYTES):
        i = start + tl.arange(0, BYTES)
        of_x = (m < M)[:, None] & (i < BYTES_A_ROW)[None, :]
        of_w = (i < BYTES_A_ROW)[:, None] & (n < N)[None, :]
        bytes_of_w = tl.load(packed + columns + i[:, None], mask=of_w, other=0)
        for j in tl.static_range(4):
            a = tl.load(codes + rows + j * BYTES_A_ROW + i[None, :], mask=of_x, other=0)
            b = ((bytes_of_w >> (2 * j)) & 3).to(tl.int8)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
    total -= tl.load(sums + m, mask=m < M, other=0)[:, None]
    r_of_rows = tl.load(r + m, mask=m < M, other=0.0)
    value = total.to(tl.float32) * tl.load(scale) * r_of_rows[:, None]
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def gemv_tiles(P: int) -> dict[str, Any]:
    """Constants of a launch for rows of P weights."""
    return GEMV | {"WORDS": min(GEMV["WORDS"], triton.next_power_of_2(P // 16))}


def ternary_linear_forward(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """y [M, N] in the dtype of x.

    Args:
        x: [M, K], any float dtype but float64, whose rounding is that of fp32.
        packed: [N, P / 4] uint8, contiguous.
        scale: fp32, of no dimensions.
    """
    (M, K), N, P = x.shape, packed.shape[0], 4 * packed.shape[1]
    x = x.contiguous()
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return y
    if M <= FEW:
        launch(
            _gemv_kernel, (triton.cdiv(N, GEMV["ROWS"]), M),
            x, packed.view(torch.int32), scale, y, N, K, P // 16,
            DP4A=not on_interpreter(_gemv_kernel), **gemv_tiles(P),
        )  # fmt: skip
        return y
    codes = torch.empty(M, P, dtype=torch.int8, device=x.device)
    r = torch.empty(M, dtype=torch.float32, device=x.device)
    sums = torch.empty(M, dtype=torch.int32, device=x.device)
    launch(_round_kernel, (M,), x, codes, r, sums, K, P, **ROUND)
    grid = (triton.cdiv(M, GEMM["M_TILE"]), triton.cdiv(N, GEMM["N_TILE"]))
    launch(_gemm_kernel, grid, codes, r, sums, packed, scale, y, M, N, P // 4, **GEMM)
    return y
