"""Compile every variant of the kernels ahead of time, without a GPU, and print what it needs.

One JSON line a variant: name, architecture, shared memory, registers and stack (spills) a thread.
A process of its own, because under TRITON_INTERPRET=1 `triton.jit` makes interpreted kernels:

    TRITON_INTERPRET=0 python tests/compile_kernels.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from itertools import chain, product
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flacompile.ops.kernels import conv, dplr, linear_attn, scan, selective_scan, ternary, tiles
from flacompile.ops.selective_scan import SPAN

DECAYS = ("none", "g", "gk", "gv", "g gk", "g gv", "gk gv")
DTYPES = {"bf16": "bf16", "fp16": "tf32", "fp32": "ieee"}  # and what their dots are
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((128, 128), (64, 64), (256, 256), (16, 24))  # K, V
ARCHITECTURES = (80, 90)


class Variant(NamedTuple):
    """A kernel with the types and constants of one launch; its other arguments are None."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    architectures: tuple[int, ...] = ARCHITECTURES


def linear_attn_variants():
    """Everything at the most common shape; at the others the simplest and the most decays."""
    for decay, dtype, reverse in product(DECAYS, DTYPES, (False, True)):
        yield from linear_attn_variant(decay, dtype, *SHAPES[0], reverse)
    for (K, V), decay, dtype in product(SHAPES[1:], ("g", "gk gv"), DTYPES):
        yield from linear_attn_variant(decay, dtype, K, V, False)


def linear_attn_variant(decay, dtype, K, V, reverse):
    """One for each architecture; reverse is also packed, fp32 out."""
    given = decay.split()
    diagonal = "gk" in given or "gv" in given
    kernel = linear_attn._diagonal_kernel if diagonal else linear_attn._scalar_kernel
    types = dict.fromkeys("qkvo", f"*{dtype}") | {"final_state": "*fp32", "state": "*fp32"}
    types |= {"scale": "fp32"} | dict.fromkeys(("T", "H", "SEGMENT", "SEGMENTS"), "i32")
    types |= dict.fromkeys(given, "*fp32")
    if reverse:
        types |= {"cu_seqlens": "*i64", "o": "*fp32"}
    dot = tiles.dot_of_sums(DTYPES[dtype]) if reverse else DTYPES[dtype]
    name = f"linear_attn, {decay}{', reverse' if reverse else ''}, {dtype}, {K}x{V}"
    for arch in ARCHITECTURES:
        meta = linear_attn.tiles(K, V, len({"gk", "gv"} & {*given}), dot, arch >= 90)
        constants = dict(K=K, V=V, REVERSE=reverse, LIMIT=60.0, **meta, **tiles.DOTS[dot])
        yield Variant(name, kernel, types, constants, (arch,))


def conv_variants():
    """Each kernel at few and many taps, the latter packed."""
    names = ("x", "weight", "bias", "state", "y", "final", "dy", "dfinal", "dx", "dstate")
    for dtype, (W, packed) in product(DTYPES, ((4, False), (8, True))):
        constants = dict.fromkeys(("forward", "backward"), conv.tiles(W))
        constants["sums"] = {"W": W, **conv.SUMS}
        types = dict.fromkeys((*names, "dweight", "dbias"), f"*{dtype}") | {"sums": "*fp32"}
        types |= dict.fromkeys(("T", "N", "C", "RUNS"), "i32")
        types |= {"cu_seqlens": "*i64"} if packed else {}
        for kernel in constants:
            name = f"conv {kernel}, {dtype}, {W} taps"
            yield Variant(name, getattr(conv, f"_{kernel}_kernel"), types, constants[kernel])


def scan_variants():
    """Both kernels: packed or not, and both passes over segments."""
    sizes, saved = ("T", "D", "SEGMENT", "SEGMENTS"), ("x", "h", "dh", "dx")
    for dtype, packed in product(DTYPES, (False, True)):
        types = dict.fromkeys(saved, f"*{dtype}") | dict.fromkeys(sizes, "i32")
        types |= dict.fromkeys(("g", "state", "final", "dfinal", "dg", "dstate"), "*fp32")
        ends = dict.fromkeys(("decays", "ends"), "*fp32")
        first = {n: t for n, t in (types | ends).items() if n not in ("h", "dx", "dg")}
        packs = {"cu_seqlens": "*i64"} if packed else {}
        for kernel in ("forward", "backward"):
            for form, given in (("whole", types), ("first pass", first), ("cut", types | ends)):
                name = f"scan {kernel}, {form}{', packed' if packed else ''}, {dtype}"
                tile = scan.tiles(2048, TORCH[dtype], getattr(scan, kernel.upper()))
                yield Variant(name, getattr(scan, f"_{kernel}_kernel"), given | packs, tile)


def selective_scan_variants():
    """Both kernels at small and large states, the latter packed."""
    outputs = ("final", "starts", "dfinal", "ddt", "dA", "dB", "dC", "dstate")
    for dtype, (N, packed) in product(DTYPES, ((16, False), (24, True), (128, True))):
        types = dict.fromkeys(("u", "B", "C", "y", "dy", "du"), f"*{dtype}")
        types |= dict.fromkeys(("dt", "A", "state", *outputs), "*fp32")
        types |= dict.fromkeys(("T", "D", "G", "SLOTS", "NUM_TOKENS"), "i32")
        types |= {"cu_seqlens": "*i64"} if packed else {}
        constants = {"N": N, "SPAN": SPAN, **selective_scan.tiles(1536, N)}
        for kernel in ("forward", "backward"):
            name = f"selective_scan {kernel}, {dtype}, {N} states"
            yield Variant(name, getattr(selective_scan, f"_{kernel}_kernel"), types, constants)


def dplr_variants():
    """Everything at the most common shape; at the others the widest sweep once a dtype."""
    for decay, dtype, writes, reverse in product(("g", "gk"), DTYPES, (1, 2), (False, True)):
        yield from dplr_variant(decay, dtype, *SHAPES[0], writes, reverse)
    for (K, V), dtype in product(SHAPES[1:], DTYPES):
        yield from dplr_variant("gk", dtype, K, V, 2, False)


def dplr_variant(decay, dtype, K, V, writes, reverse):
    """Both kernels of a sweep with one write or two; back in time it is of a pack."""
    dot = DTYPES[dtype]
    types = dict.fromkeys("abuo", f"*{dtype}") | {decay: "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("state", "final_state"), "*fp32")
    types |= dict.fromkeys(("T", "H", "N", "CHUNKS"), "i32")
    kept = "*bf16" if dot == "bf16" else "*fp32"
    has_q, has_k = writes == 2 or not reverse, writes == 2 or reverse
    types |= {"X": kept} | ({"q": f"*{dtype}", "QU": kept} if has_q else {})
    types |= {"k": f"*{dtype}", "v": f"*{dtype}", "XV": kept} if has_k else {}
    types |= {"QV": kept} if has_q and has_k else {}
    types |= {"c": f"*{dtype}"} if writes == 1 and not reverse else {}
    if reverse:
        types |= dict.fromkeys(("cu_seqlens", "sequences", "places"), "*i64")
    constants = {"K": K, "V": V, "REVERSE": reverse, "LIMIT": tiles.LIMITS[dot]}
    constants |= dplr.tiles(K, V, dot, 128) | tiles.DOTS[dot]
    back = ", reverse" if reverse else ""
    for kernel in ("inside", "sweep"):
        name = f"dplr {kernel}, {decay}, {writes} writes{back}, {dtype}, {K}x{V}"
        yield Variant(name, getattr(dplr, f"_{kernel}_kernel"), types, constants)


def ternary_variants():
    """The kernel for a few rows by their length, those for many by their number."""
    for dtype in ("bf16", "fp32"):
        types = dict.fromkeys(("x", "y"), f"*{dtype}") | dict.fromkeys(("scale", "r"), "*fp32")
        types |= dict.fromkeys(("M", "N", "K", "G"), "i32") | {"codes": "*i8", "sums": "*i32"}
        few, many = types | {"packed": "*i32"}, types | {"packed": "*u8"}
        for P in (32, 2048, 8192, ternary.LONGEST):
            constants = {"ASM": True} | ternary.gemv_tiles(P)
            yield Variant(f"ternary gemv, {dtype}, {P}", ternary._gemv_kernel, few, constants)
        for M, N in ((16, 2048), (32, 2048), (512, 2048), (512, 4096), (512, 8192)):
            constants, name = {"ASM": True} | ternary.gemm_tiles(M, N), f"{dtype}, {M}x{N}"
            yield Variant(f"ternary gemm, {name}", ternary._gemm_kernel, many, constants)
        yield Variant(f"ternary round, {dtype}", ternary._round_kernel, types, ternary.ROUND)


VARIANTS = (
    linear_attn_variants,
    conv_variants,
    scan_variants,
    selective_scan_variants,
    dplr_variants,
    ternary_variants,
)


def source(variant):
    """The kernel as the compiler takes it, and the options of its launch."""
    names, constants = variant.kernel.arg_names, dict(variant.constants)
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    given = {n: t for n, t in variant.types.items() if n in names}
    constants = {n: constants.get(n) for n in names if n not in given}
    types = {n: given.get(n, "constexpr") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    return ASTSource(variant.kernel, types, constants, aligned), options


def needs(compiled):
    """Registers and stack bytes a thread, from the compiled binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def main():
    for variant in chain.from_iterable(variants() for variants in VARIANTS):
        src, options = source(variant)
        for arch in variant.architectures:
            compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
            shared = compiled.metadata.shared
            row = {"name": variant.name, "arch": arch, "shared": shared, **needs(compiled)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
