"""Triton kernels of `ternary_linear`: one for a few rows, two for many.

    y = s r (X (W + 1)^T - X 1)        X = clip(round(x / max(r, 1e-5)), -128, 127)
                                       r = max |x| / 127

The packed bytes hold W + 1; the sum of X is taken off in the end. All sums are of int32. A row of
packed has G times 16 bytes, which tells the compiler that it may load that many at once.

Few rows (decode): a program takes one row of x and ROWS of W, whole. It asks for its words of W
first, rounds x while they come, and multiplies four neighbouring weights, a word shifted by 2 j and
masked, with four of X in one instruction, dp4a. It moves N P / 4 bytes and is to be bound by that.

Many rows (prefill): one program a row rounds it. Tiles of y^T = W X^T are products on int8 tensor
cores, with W on the left, so that on Hopper it is multiplied from the registers it is unpacked in.
A tile of bytes, shifted and masked four to an instruction, is the left side of four products.

The interpreter has no inline assembly: ASM = False is the same in Triton's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flacompile.ops.kernels.launch import launch, on_interpreter

LONGEST = 2**15  # inputs that a program of the first kernel holds
FEW = 2**25  # products up to which reading W once a row costs less than a kernel that rounds
ENOUGH = 256  # tiles for a large GPU, two on each multiprocessor
ROUND = {"COLUMNS": 1024, "num_warps": 4}


@triton.jit
def _larger(a, b):
    """The larger, or NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scales(largest, dtype: tl.constexpr):
    """r, rounded to the dtype of x, and what x is multiplied with, of a row's largest size."""
    r = tl.math.div_rn(largest, 127.0).to(dtype).to(tl.float32)
    return r, tl.math.div_rn(1.0, _larger(r, 1e-5))


@triton.jit
def _codes(x, inverse):
    """X in the lowest byte of each int32: adding 1.5 2^23 rounds to the nearest even integer.

    Clipping comes first, which is the same and keeps the product and the sum two roundings.
    """
    clipped = tl.minimum(tl.maximum(x.to(tl.float32) * inverse, -128.0), 127.0)
    return (clipped + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _dot4(a, b, total, ASM: tl.constexpr):
    """total + the dot product of four int8 in each word of a and b."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for c in tl.static_range(4):
            total += ((a << (24 - 8 * c)) >> 24) * ((b << (24 - 8 * c)) >> 24)
        return total


@triton.jit
def _lowest(fields, ASM: tl.constexpr):
    """The lowest two bits of each byte, int8, and the bytes without them.

    As words, four bytes at once: what a shift brings in from a neighbour is never the lowest.
    """
    if ASM:
        lowest = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x03030303;", "=r,r", [fields], dtype=tl.int8, is_pure=True, pack=4
        )
        rest = tl.inline_asm_elementwise(
            "shr.b32 $0, $1, 2;", "=r,r", [fields], dtype=tl.uint8, is_pure=True, pack=4
        )
        return lowest, rest
    else:
        return (fields & 3).to(tl.int8), fields >> 2


@triton.jit
def _field(x, k, j: tl.constexpr, K, QUARTER):
    """x at columns j P/4 + k, below P/4; zeros beyond K."""
    start = j * QUARTER
    return tl.load(x + start + k, mask=(k < QUARTER) & (start + k < K), other=0.0)


@triton.jit
def _gemv_kernel(
    x, packed, scale, y, N, K, G,
    ROWS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y at one row and ROWS columns; packed as words [N, 4 G], 4 G <= WORDS."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i, c = tl.arange(0, WORDS), tl.arange(0, 4)
    x += m * K
    # 1. all of W that it needs, then all of x
    inside = (n < N)[:, None] & (i < 4 * G)[None, :]
    offset = n.to(tl.int64)[:, None] * (4 * G) + i[None, :]
    words = tl.load(packed + offset, mask=inside, other=0)
    s = tl.load(scale)
    tl.debug_barrier()  # or the compiler asks for W after x has come
    k = 4 * i[:, None] + c[None, :]
    fields = (
        _field(x, k, 0, K, 16 * G),
        _field(x, k, 1, K, 16 * G),
        _field(x, k, 2, K, 16 * G),
        _field(x, k, 3, K, 16 * G),
    )
    # 2. r
    largest = tl.zeros([WORDS, 4], tl.float32)
    for j in tl.static_range(4):
        largest = _larger(largest, tl.abs(fields[j].to(tl.float32)))
    largest = tl.reduce(tl.reduce(largest, 1, _larger), 0, _larger)
    r, inverse = _scales(largest, x.dtype.element_ty)
    # 3. four neighbours of X as one word, times the weights of field j
    total = tl.zeros([ROWS, WORDS], tl.int32)
    sums = tl.zeros([WORDS], tl.int32)
    for j in tl.static_range(4):
        four = tl.sum((_codes(fields[j], inverse) & 255) << (8 * c)[None, :], 1)
        sums = _dot4(four, tl.full([WORDS], 0x01010101, tl.int32), sums, ASM)
        fours = tl.broadcast_to(four[None, :], [ROWS, WORDS])
        total = _dot4(fours, (words >> (2 * j)) & 0x03030303, total, ASM)
    value = tl.sum(total - sums[None, :], 1).to(tl.float32) * s * r
    tl.store(y + m * N + n, value.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _round_kernel(x, codes, r, sums, K, G, COLUMNS: tl.constexpr):
    """X with its padding, r and the sum of X of one row."""
    m, P = tl.program_id(0).to(tl.int64), 64 * G
    x += m * K
    columns = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, K, COLUMNS):
        values = tl.load(x + start + columns, mask=start + columns < K, other=0.0)
        largest = _larger(largest, tl.abs(values.to(tl.float32)))
    scale, inverse = _scales(tl.reduce(largest, 0, _larger), x.dtype.element_ty)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, P, COLUMNS):
        k = start + columns
        code = _codes(tl.load(x + k, mask=k < K, other=0.0), inverse).to(tl.int8)
        total += code
        tl.store(codes + m * P + k, code, mask=k < P)
    tl.store(r + m, scale)
    tl.store(sums + m, tl.sum(total, 0))


@triton.jit
def _gemm_kernel(
    codes, r, sums, packed, scale, y, M, N, G,
    M_TILE: tl.constexpr, N_TILE: tl.constexpr, BYTES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of y; packed as bytes [N, 16 G], field j at codes + 16 j G."""
    m = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    n = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    columns = m.to(tl.int64)[None, :] * (64 * G)
    rows = n.to(tl.int64)[:, None] * (16 * G)
    total = tl.zeros([N_TILE, M_TILE], tl.int32)
    for start in range(0, 16 * G, BYTES):
        i = start + tl.arange(0, BYTES)
        of_w = (n < N)[:, None] & (i < 16 * G)[None, :]
        of_x = (i < 16 * G)[:, None] & (m < M)[None, :]
        fields = tl.load(packed + rows + i[None, :], mask=of_w, other=0)
        for j in tl.static_range(4):
            a, fields = _lowest(fields, ASM)
            b = tl.load(codes + columns + j * (16 * G) + i[:, None], mask=of_x, other=0)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
    total -= tl.load(sums + m, mask=m < M, other=0)[None, :]
    r_of_rows = tl.load(r + m, mask=m < M, other=0.0)
    value = total.to(tl.float32) * tl.load(scale) * r_of_rows[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + place, tl.trans(value.to(y.dtype.element_ty)), mask=inside)


def gemv_tiles(P: int) -> dict[str, Any]:
    """Constants of a launch for rows of P weights: 32 words of W a thread at most."""
    words = max(32, triton.next_power_of_2(P // 16))
    rows = 16 if words <= 1024 else 8
    return {"ROWS": rows, "WORDS": words, "num_warps": min(16, max(4, words // 64))}


def gemm_tiles(M: int, N: int) -> dict[str, Any]:
    """Constants of a launch: the widest tile of which there are enough."""
    wide = {"BYTES": 32, "num_warps": 4, "num_stages": 3}
    for n in (128, 64):
        if M > 64 and triton.cdiv(M, 128) * triton.cdiv(N, n) >= ENOUGH:
            return {"M_TILE": 128, "N_TILE": n, **wide}
    rows = 16 if M <= 16 else 32 if M <= 32 else 64
    width = 128 if rows < 64 else 64
    return {"M_TILE": rows, "N_TILE": 64, "BYTES": width, "num_warps": 4, "num_stages": 4}


def ternary_linear_forward(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """y [M, N] in the dtype of x.

    Args:
        x: [M, K], any float dtype but float64, whose rounding is that of fp32.
        packed: [N, P / 4] uint8, contiguous.
        scale: fp32, of no dimensions.
    """
    (M, K), N, G = x.shape, packed.shape[0], packed.shape[1] // 16
    P = 64 * G
    x = x.contiguous()
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return y
    asm = not on_interpreter(_gemv_kernel)
    if P <= LONGEST and (M == 1 or (M <= 8 and M * N * P <= FEW)):
        tiles = gemv_tiles(P)
        words, grid = packed.view(torch.int32), (M, triton.cdiv(N, tiles["ROWS"]))
        launch(_gemv_kernel, grid, x, words, scale, y, N, K, G, ASM=asm, **tiles)
        return y
    codes = torch.empty(M, P, dtype=torch.int8, device=x.device)
    r = torch.empty(M, dtype=torch.float32, device=x.device)
    sums = torch.empty(M, dtype=torch.int32, device=x.device)
    launch(_round_kernel, (M,), x, codes, r, sums, K, G, **ROUND)
    tiles = gemm_tiles(M, N)
    grid = (triton.cdiv(M, tiles["M_TILE"]), triton.cdiv(N, tiles["N_TILE"]))
    launch(_gemm_kernel, grid, codes, r, sums, packed, scale, y, M, N, G, ASM=asm, **tiles)
    return y
