"""What the kernels of a state [K, V] are made of: rows and states in memory, decays, dots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DOTS = {
    "bf16": {"DOT": tl.bfloat16, "PRECISION": "tf32"},
    "tf32": {"DOT": tl.float32, "PRECISION": "tf32"},
    "ieee": {"DOT": tl.float32, "PRECISION": "ieee"},
}
# Narrower tiles are padded: with 32 columns of 16 bits Triton 3.6 makes reads of shared memory
# outside of it on Hopper, in some kernels (compute-sanitizer).
NARROWEST = 64
LIMITS = {"bf16": 60.0, "tf32": 60.0, "ieee": 16.0}  # e^60 is far from the largest bf16, e^88


def dot_of(*dtypes: torch.dtype) -> str:
    """What the factors of dots of such tensors are: a name of DOTS."""
    if torch.float32 in dtypes:
        return "ieee"
    return "bf16" if set(dtypes) == {torch.bfloat16} else "tf32"


def dot_of_sums(dot: str) -> str:
    """What they are where a decay's gradient adds the results up over all tokens.

    The terms of that sum cancel. Rounding to bf16 does not: it left 10 % of the gradient wrong
    after 1,000 tokens, tf32 1 %.
    """
    return "tf32" if dot == "bf16" else dot


def key_tiles(K: int, V: int, dot: str) -> dict[str, int]:
    """Block sizes and warps of the kernels of the keys' gradients.

    Of spills: exact fp32 dots keep their factors in registers, tf32 ones all of a row's.
    """
    BK, BV = (max(NARROWEST, triton.next_power_of_2(n)) for n in (K, V))
    widest = 16 if dot == "ieee" else 64 if BV <= 128 else 32
    warps = 4 if dot == "bf16" and BV <= 128 else 8
    return {"BK": min(BK, widest), "BV": BV, "num_warps": warps, "num_stages": 1}


@triton.jit
def _sequence(cu_seqlens, n, T):
    """First token and number of tokens of sequence n."""
    if cu_seqlens is None:
        start = n.to(tl.int64) * T
        length = start * 0 + T
    else:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - start
    return start, length


@triton.jit
def _rows(first, i, start, length, h, H, REVERSE: tl.constexpr):
    """Rows first + i of the sequence, as indices in [B * T * H]: at + by, and at + by + later.

    The second is where the decay of a row stands. Offsets by are small, so that only the scalar at
    needs 64 bits. Also which of the rows are there, and which have a decay.
    """
    inside = i < (length - first).to(tl.int32)
    if REVERSE:
        decayed = inside & ((first > 0) | (i > 0))
        return (start + length - 1 - first) * H + h, -i * H, H, inside, decayed
    else:
        return (start + first) * H + h, i * H, H * 0, inside, inside


@triton.jit
def _load(pointer, at, by, inside, col, WIDTH: tl.constexpr):
    """Rows of a [*, WIDTH] tensor, zero outside."""
    mask = inside[:, None] & (col < WIDTH)[None, :]
    offsets = by[:, None] * WIDTH + col[None, :]
    return tl.load(pointer + at * WIDTH + offsets, mask=mask, other=0.0)


@triton.jit
def _load_row(pointer, at, inside, col, WIDTH: tl.constexpr):
    """One row in fp32, zero outside."""
    mask = inside & (col < WIDTH)
    return tl.load(pointer + at * WIDTH + col, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _dot(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x y with fp32 sums, the factors in DOT."""
    return tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)


@triton.jit
def _decay_sums(g, at, by, inside):
    """``_sums_of`` the log decays of rows."""
    return _sums_of(tl.load(g + at + by, mask=inside, other=0.0))


@triton.jit
def _sums_of(g_c):
    """Running sums of the log decays of a chunk, each row's own, and the sums of all: hi and lo.

    g = hi + lo with hi a multiple of 2^-10: sums of up to 128 hi are exact, so a difference of sums
    is as good as the sum between. e^-128 is 0 in fp32 already.
    """
    g_c = tl.where(g_c < -128.0, -128.0, g_c)
    hi = tl.floor(g_c * 1024.0) * (1.0 / 1024.0)
    lo = g_c - hi
    return tl.cumsum(hi, 0), tl.cumsum(lo, 0), hi, lo, tl.sum(hi, 0), tl.sum(lo, 0)


@triton.jit
def _channel_total(g_c):
    """Sum of the log decays of each channel, none below what is 0 in fp32."""
    return tl.sum(tl.maximum(g_c, -128.0), 0)


@triton.jit
def _channel_sums(g_c, REST: tl.constexpr):
    """Sums of the log decays of each channel up to each row, or of the rows after it; and of all.

    They are taken from the row outwards: a strong decay far away does not blur a weak one near by.
    """
    g_c = tl.maximum(g_c, -128.0)  # e^-128 is 0 in fp32
    sums = tl.cumsum(g_c, 0, reverse=REST)
    if REST:
        sums -= g_c
    return sums, tl.sum(g_c, 0)


@triton.jit
def _summed(keep, x, HALF: tl.constexpr):
    """Sums of the rows of x that each row keeps, on tensor cores.

    x is taken as two HALF, of which a product with 1 is exact: 22 bits of fp16, 16 of bf16. A scan
    would carry its sums from warp to warp, and leave them where no dot takes them.
    """
    ones = tl.where(keep, 1.0, 0.0).to(HALF)
    hi = x.to(HALF)
    lo = (x - hi.to(tl.float32)).to(HALF)
    return tl.dot(ones, hi) + tl.dot(ones, lo)


@triton.jit
def _sums_within(g_c, i, PRECISION: tl.constexpr):
    """Sums of the log decays of each channel up to each row, to what a dot in PRECISION needs."""
    if PRECISION == "ieee":
        return _channel_sums(g_c, False)[0]
    else:
        return _summed(i[:, None] >= i[None, :], tl.maximum(g_c, -128.0), tl.float16)


@triton.jit
def _sums_before(g_c, i, PRECISION: tl.constexpr):
    """``_sums_within`` of the rows before each."""
    if PRECISION == "ieee":
        return _channel_sums(g_c, False)[0] - tl.maximum(g_c, -128.0)
    else:
        return _summed(i[:, None] > i[None, :], tl.maximum(g_c, -128.0), tl.float16)


@triton.jit
def _sums_beyond(g_c, i, PRECISION: tl.constexpr):
    """``_sums_within`` of the rows after each."""
    if PRECISION == "ieee":
        return _channel_sums(g_c, True)[0]
    else:
        return _summed(i[:, None] < i[None, :], tl.maximum(g_c, -128.0), tl.float16)


@triton.jit
def _sums_after(x, i, DOT: tl.constexpr):
    """Sums of the rows of x from each row on."""
    if tl.bfloat16 == DOT:
        return _summed(i[:, None] <= i[None, :], x, DOT)
    else:
        return tl.cumsum(x, 0, reverse=True)


@triton.jit
def _load_state(state, sequence_head, kk, vv, K: tl.constexpr, V: tl.constexpr):
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    offsets = kk[:, None] * V + vv[None, :]
    return tl.load(state + sequence_head * K * V + offsets, mask=mask, other=0.0)


@triton.jit
def _store_state(S, state, sequence_head, kk, vv, K: tl.constexpr, V: tl.constexpr):
    mask = (kk < K)[:, None] & (vv < V)[None, :]
    tl.store(state + sequence_head * K * V + (kk[:, None] * V + vv[None, :]), S, mask=mask)


@triton.jit
def _store_rows(o_c, o, at, by, inside, vv, V: tl.constexpr):
    mask = inside[:, None] & (vv < V)[None, :]
    offsets = by[:, None] * V + vv[None, :]
    tl.store(o + at * V + offsets, o_c.to(o.dtype.element_ty), mask=mask)


@triton.jit
def _owned(SEGMENTS, H, NV: tl.constexpr):
    """Sequence, segment, head and value block of this program, and the place of its state."""
    state_index = (tl.program_id(0) // NV).to(tl.int64)
    h = state_index % H
    segment = (state_index // H) % SEGMENTS
    n = state_index // H // SEGMENTS
    return n, segment, h, tl.program_id(0) % NV, state_index


@triton.jit
def _store_end(
    S, ends, final_state, n, segment, SEGMENTS, h, H, kk, vv, K: tl.constexpr, V: tl.constexpr
):
    """The state after a segment, to ends in a first pass, or after the last one to final_state."""
    if ends is not None:
        _store_state(S, ends, (n * SEGMENTS + segment) * H + h, kk, vv, K, V)
    elif segment == SEGMENTS - 1:
        _store_state(S, final_state, n * H + h, kk, vv, K, V)
