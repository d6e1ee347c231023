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
    """A kernel with the types and constants of one launch; its other arguments are None.

    even are integers that 16 divides; pointers are aligned always.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    architectures: tuple[int, ...] = ARCHITECTURES
    even: tuple[str, ...] = ()


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
    """Each kernel at few and many taps, the latter packed and of odd channels."""
    names = ("x", "weight", "bias", "state", "y", "final", "dy", "dfinal", "dx", "dstate")
    for dtype, (W, packed) in product(DTYPES, ((4, False), (8, True))):
        constants = dict.fromkeys(("forward", "backward"), conv.tiles(W))
        constants["sums"] = {"W": W, **conv.SUMS}
        types = dict.fromkeys((*names, "dweight", "dbias"), f"*{dtype}") | {"sums": "*fp32"}
        types |= dict.fromkeys(("T", "N", "C", "RUNS"), "i32")
        types |= {"cu_seqlens": "*i64"} if packed else {}
        for kernel in constants:
            name, even = f"conv {kernel}, {dtype}, {W} taps", () if packed else ("C",)
            function = getattr(conv, f"_{kernel}_kernel")
            yield Variant(name, function, types, constants[kernel], even=even)


def scan_variants():
    """Both kernels packed in segments; in bf16 also whole, the first pass and of odd channels."""
    sizes, saved = ("T", "D", "SEGMENT", "SEGMENTS"), ("x", "h", "dh", "dx")
    for dtype, kernel in product(DTYPES, ("forward", "backward")):
        whole = dict.fromkeys(saved, f"*{dtype}") | dict.fromkeys(sizes, "i32")
        whole |= dict.fromkeys(("g", "state", "final", "dfinal", "dg", "dstate"), "*fp32")
        cut = whole | dict.fromkeys(("decays", "ends"), "*fp32") | {"cu_seqlens": "*i64"}
        first = {n: t for n, t in cut.items() if n not in ("h", "dx")}
        forms = {"whole": whole, "first pass": first, "cut": cut, "odd": cut}
        for form, types in forms.items() if dtype == "bf16" else [("cut", cut)]:
            D, even = (2047, ()) if form == "odd" else (2048, ("D",))
            tile = scan.tiles(D, TORCH[dtype], getattr(scan, kernel.upper()))
            name, function = f"scan {kernel}, {form}, {dtype}", getattr(scan, f"_{kernel}_kernel")
            yield Variant(name, function, types, tile, even=even)


def selective_scan_variants():
    """Both kernels at small states, and packed at large ones of odd channels; in bf16 the rest."""
    sizes = ("T", "D", "G", "SEQUENCES", "NUM_TOKENS", "SLOTS", "SEGMENT", "SEGMENTS")
    kept = ("final", "starts", "dfinal", "ddt", "dA", "sums", "dstate", "totals", "ends")
    for dtype, (N, packed) in product(DTYPES, ((16, False), (24, True), (128, True))):
        types = dict.fromkeys(("u", "B", "C", "y", "dy", "du", "dB", "dC"), f"*{dtype}")
        types |= dict.fromkeys(("dt", "A", "state", *kept), "*fp32")
        types |= dict.fromkeys(("SIZE", "BLOCKS", *sizes), "i32")
        types |= {"cu_seqlens": "*i64"} if packed else {}
        forms = {"cut": types}
        if N == 16 and dtype == "bf16":
            forms["first pass"] = {n: t for n, t in types.items() if n not in ("y", "du")}
            kernel = selective_scan._sums_kernel
            yield Variant(f"selective_scan sums, {dtype}", kernel, types, selective_scan.SUMS)
        for kernel, form in product(("forward", "backward"), forms):
            tile = selective_scan.tiles(1536, N, getattr(selective_scan, kernel.upper()))
            name = f"selective_scan {kernel}, {form}, {dtype}, {N} states"
            constants = {"N": N, "SPAN": SPAN, **tile}
            function = getattr(selective_scan, f"_{kernel}_kernel")
            even = () if packed else ("D",)
            yield Variant(name, function, forms[form], constants, even=even)


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
    even = [i for i, (n, t) in enumerate(types.items()) if t[0] == "*" or n in variant.even]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
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
