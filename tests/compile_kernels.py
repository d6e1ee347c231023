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

from flacompile.ops.kernels import (
    conv,
    delta,
    delta_backward,
    dplr,
    dplr_backward,
    linear_attn,
    linear_attn_backward,
    quadratic_attn,
    quadratic_attn_backward,
    running_softmax,
    scan,
    selective_scan,
    shared_heads,
    states,
    step,
    ternary,
    tiles,
    walk,
)
from flacompile.ops.selective_scan import SPAN

DECAYS = ("none", "g", "gk", "gv", "g gk", "g gv", "gk gv")
DTYPES = {"bf16": "bf16", "fp16": "tf32", "fp32": "ieee"}  # and what their dots are
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((128, 128), (64, 64), (256, 256), (16, 24))  # K, V
# What stands for all: exact fp32 dots have one tile everywhere, tf32 the larger on Hopper.
PLACES = (("bf16", 90), ("bf16", 80), ("fp16", 90), ("fp32", 80))
SCALE = "fp64"  # of a number from Python under Inductor; Triton itself makes it fp32


class Variant(NamedTuple):
    """A kernel with the types and constants of one launch; its other arguments are None.

    even are integers that 16 divides; pointers are aligned always.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    arch: int = 80  # where nothing knows it, the one with less shared memory
    even: tuple[str, ...] = ()


def linear_attn_variants():
    """Every decay in bf16 on Hopper; elsewhere the simplest and the most decays.

    Small shapes are padded: seen in the widest tiles and the narrowest.
    """
    for decay, reverse in product(DECAYS, (False, True)):
        yield linear_attn_variant(decay, "bf16", *SHAPES[0], 90, reverse)
    for place, decay in product(PLACES, ("g", "gk gv")):
        for shape in SHAPES[1:] if place in (PLACES[0], PLACES[3]) else SHAPES[2:3]:
            yield linear_attn_variant(decay, place[0], *shape, place[1], False)
        for reverse in (False, True) if place != PLACES[0] else ():
            yield linear_attn_variant(decay, place[0], *SHAPES[0], place[1], reverse)


def linear_attn_variant(decay, dtype, K, V, arch, reverse):
    """reverse is also packed, fp32 out."""
    given = decay.split()
    diagonal = "gk" in given or "gv" in given
    kernel = linear_attn._diagonal_kernel if diagonal else linear_attn._scalar_kernel
    types = dict.fromkeys("qkvo", f"*{dtype}") | {"final_state": "*fp32", "state": "*fp32"}
    types |= {"scale": SCALE} | dict.fromkeys(("T", "H", "SEGMENT", "SEGMENTS"), "i32")
    types |= dict.fromkeys(given, "*fp32")
    if reverse:
        types |= {"cu_seqlens": "*i64", "o": "*fp32"}
    dot = tiles.dot_of_sums(DTYPES[dtype]) if reverse else DTYPES[dtype]
    meta = linear_attn.tiles(K, V, len({"gk", "gv"} & {*given}), dot, arch >= 90)
    constants = dict(K=K, V=V, REVERSE=reverse, SHARE=1, LIMIT=60.0, **meta, **tiles.DOTS[dot])
    name = f"linear_attn, {decay}{', reverse' if reverse else ''}, {dtype}, {K}x{V}"
    return Variant(name, kernel, types, constants, arch)


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
    cases = [("bf16", 16, False), ("bf16", 24, True), ("bf16", 128, True)]
    for dtype, N, packed in [*cases, ("fp16", 16, False), ("fp32", 128, True)]:
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


def chunk_variants():
    """Every form in bf16 on Hopper; elsewhere what there is of most decays.

    Only tiles of bf16 know architectures; sm_80 stands for the one with less shared memory.
    """
    yield from by_chunks("bf16", *SHAPES[0], 90, full=True)
    yield from by_chunks("bf16", *SHAPES[0], 80)
    yield from by_chunks("bf16", *SHAPES[2], 80)
    yield from by_chunks("fp16", *SHAPES[2], 80)
    yield from by_chunks("fp32", *SHAPES[0], 80)


def by_chunks(dtype, K, V, arch, full=False):
    yield from states_variants(dtype, K, V, arch, full)
    for op in BY_CHUNKS:
        yield from inside_variants(op, dtype, K, V, arch, full)
    for op in ("delta_rule", "dplr"):
        yield from walk_variants(op, dtype, K, V, arch, full)


BY_CHUNKS = {  # an op's modules: walks, gradients
    "linear_attn": (None, linear_attn_backward),
    "delta_rule": (delta, delta_backward),
    "dplr": (dplr, dplr_backward),
}


def chunk_types(op, dtype, decay):
    """Of every argument that a kernel by chunks may have; decays a channel are of a pack."""
    kept = "*bf16" if dtype == "bf16" else "*fp32"
    types = typed("q k v a b u x y x2 y2 o beta do_ dr dq dk dv da db", f"*{dtype}")
    types |= typed("X Y P R W S D G states", kept) | {"scale": SCALE}
    types |= typed(f"{decay} d{decay} state final dbeta ends moved starts", "*fp32")
    types |= typed("T H N CHUNKS ROWS SEGMENT SEGMENTS", "i32")
    if decay == "g":
        types |= typed("into rest", "*fp32")
    else:
        types |= typed("q_in b_end k_end", kept if op == "dplr" else f"*{dtype}")
        types |= typed("total decays total_k", "*fp32")
        types |= typed("cu_seqlens offsets sequences places", "*i64")
    return types


def typed(names, of):
    return dict.fromkeys(names.split(), of)


def without(types, names):
    return {name: of for name, of in types.items() if name not in names.split()}


def chunk_tiles(op, K, V, dot, arch):
    """Of the walks of an op, and of what it does with all chunks at once."""
    if op == "linear_attn":
        meta = linear_attn_backward.tiles(K, V, dot, arch >= 90)
        return meta, meta
    meta = BY_CHUNKS[op][0].tiles(K, V, dot, arch >= 90)
    return meta, {"C": meta["C"]} | tiles.key_tiles(K, V, dot)


def states_variants(dtype, K, V, arch, full):
    """With two writes, or of one in either direction and the first pass over segments."""
    dot = DTYPES[dtype]
    constants = {"K": K, "V": V, "BACK": False, "SHARE": 1, **states.tiles(dot), **tiles.DOTS[dot]}
    two = constants | {"C": dplr.tiles(K, V, dot, arch >= 90)["C"]}
    constants["C"] = delta.tiles(K, V, dot, arch >= 90)["C"]
    types, size = chunk_types("", dtype, "gk"), f"{dtype}, {K}x{V}"
    whole = without(types, "ends total total_k")
    forms = {"gk": (without(whole, "x2 y2"), constants), "gk, 2 writes": (whole, two)}
    if full:
        first = without(types, "x2 y2 states decays total state")
        scalar = without(chunk_types("", dtype, "g"), "x2 y2 ends")
        forms |= {"gk, first pass": (first, constants), "g": (scalar, constants)}
        forms["g, back"] = scalar, constants | {"BACK": True}
        join = {"K": K, "V": V, "BK": 64, "BV": 32, "num_warps": 4}
        yield Variant(f"join, {size}", walk._join_kernel, types, join, arch)
    for form, (given, meta) in forms.items():
        yield Variant(f"states, {form}, {size}", states._states_kernel, given, meta, arch)


def inside_variants(op, dtype, K, V, arch, full):
    """What is done with all chunks at once; decays too strong to be factored in a launch apart."""
    dot, (forward, backward) = DTYPES[dtype], BY_CHUNKS[op]
    walks, keys = chunk_tiles(op, K, V, dot, arch)
    width = max(16, triton.next_power_of_2(K))
    common = {"K": K, "LIMIT": tiles.LIMITS[dot], **tiles.DOTS[dot]}
    for decay in ("g", "gk") if full and op != "dplr" else ("gk",):
        types, size = chunk_types(op, dtype, decay), f"{decay}, {dtype}, {K}x{V}"
        if forward is not None:
            of_op = {"delta_rule": delta.inside_tiles(K, walks["C"]), "dplr": dplr.INSIDE[dot]}
            meta = common | of_op[op] | {"C": walks["C"], "WRITE": decay == "gk"}
            yield Variant(f"{op} inside, {size}", forward._inside_kernel, types, meta, arch)
        kernels = ("keys", "values") if op == "linear_attn" else ("keys",)
        kinds = ("", "strong, ") if full and decay == "gk" else ("",)
        for kernel, strong in product(kernels, kinds):
            meta = common | keys | {"V": V, "STRONG": strong != "", "ALL": width}
            if kernel == "values":
                meta = linear_attn_backward.value_tiles(meta, decay == "gk")
            function = getattr(backward, f"_{kernel}_kernel")
            yield Variant(f"{op} {kernel}, {strong}{size}", function, types, meta, arch)


def shared_heads_variants():
    """Gradients where heads share q and k, of decays and packed."""
    for dtype, arch, shape in (("bf16", 90, 0), ("bf16", 80, 2), ("fp16", 80, 2), ("fp32", 80, 0)):
        (K, V), dot = SHAPES[shape], DTYPES[dtype]
        types = chunk_types("", dtype, "g") | typed("cu_seqlens sequences places", "*i64")
        types |= typed("do_", f"*{dtype}") | typed("dq dk", "*fp32") | typed("PARTS EACH", "i32")
        constants = {"K": K, "V": V, "SHARE": 16, "PER": shared_heads.PER, **tiles.DOTS[dot]}
        constants |= linear_attn_backward.tiles(K, V, dot, arch >= 90)
        for kernel, more in (("keys", shared_heads.KEYS), ("values", {})):
            function = getattr(shared_heads, f"_{kernel}_kernel")
            name = f"shared heads {kernel}, {dtype}, {K}x{V}"
            yield Variant(name, function, types, constants | more, arch)


def walk_variants(op, dtype, K, V, arch, full):
    """The walk of an op in either direction, and the first one, which finds how states move."""
    dot = DTYPES[dtype]
    meta = {"K": K, "V": V, **chunk_tiles(op, K, V, dot, arch)[0], **tiles.DOTS[dot]}
    wide = delta.wide_tiles(meta, V) if op == "delta_rule" else meta
    absent = {"": "ends moved"} | ({"first, ": "state u o dr dv states"} if full else {})
    for decay in ("g", "gk") if full and op == "delta_rule" else ("gk",):
        types = chunk_types(op, dtype, decay)
        walks = {"forward": (types, wide), "backward": (types, wide)}
        if decay == "g":
            walks["forward"] = without(types, "W"), meta
        for (form, names), (kernel, (given, constants)) in product(absent.items(), walks.items()):
            name = f"{op} {kernel}, {form}{decay}, {dtype}, {K}x{V}"
            function = getattr(BY_CHUNKS[op][0], f"_{kernel}_kernel")
            yield Variant(name, function, without(given, names), constants, arch)


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


def step_variants():
    """Both forms of a write, and a state of more rows than registers hold."""
    types = dict.fromkeys("qkvabo", "*bf16") | {"scale": SCALE}
    types |= dict.fromkeys(("state", "after", "gk"), "*fp32")
    for form, missing, K in (("linear", "ab", 2145), ("delta", "b", 128), ("dplr", "", 256)):
        constants = {"K": K, "V": 128, "GK": K, "GV": 1, "SHARE": 1, **step.tiles(K, 128)}
        given = {n: t for n, t in types.items() if n not in missing}
        yield Variant(f"step, {form}, {K}", step._kernel, given, constants)


def quadratic_attn_variants():
    """All that a GPU is given, packed in segments with a mask; on Hopper also the first passes."""
    types = typed("q k v o do_ dv", "*bf16") | typed("c0 c1 c2 eps", SCALE) | {"mask": "*u8"}
    types |= typed("state z rows final dq dk", "*fp32") | {"cu_seqlens": "*i64"}
    types |= typed("T H SEGMENT SEGMENTS TOKENS", "i32")
    forward, backward = quadratic_attn, quadratic_attn_backward
    first = {
        "forward": (forward._forward_kernel, "state o z final"),
        "keys": (backward._keys_kernel, "state dk dv final"),
    }
    walks = first | {"queries": (backward._queries_kernel, "")}
    for arch, (name, (kernel, absent)) in product((80, 90), walks.items()):
        constants = {"K": 16, "V": 128, "F": 153, **tiles.DOTS["bf16"]}
        constants |= forward.tiles(arch >= 90)
        yield Variant(f"quadratic_attn {name}", kernel, types, constants, arch)
        if name in first and arch == 90:
            given = without(types, absent) | {"ends": "*fp32"}
            yield Variant(f"quadratic_attn {name}, first", kernel, given, constants, arch)
    constants = {"V": 128, "BV": 128, "C": 32, "num_warps": 4}
    yield Variant("quadratic_attn shares", backward._shares_kernel, types, constants)


def running_softmax_variants():
    """Whole, and packed in segments with their first pass, of odd channels."""
    whole = dict.fromkeys(("x", "rate", "state", "weight", "g", "final"), "*fp32")
    whole |= dict.fromkeys(("T", "D", "SEGMENT", "SEGMENTS"), "i32")
    cut = whole | {"cu_seqlens": "*i64", "falls": "*fp64", "ends": "*fp64"}
    first = {n: t for n, t in cut.items() if n not in ("weight", "g", "final")}
    constants = {"LOWEST": -1e30, **running_softmax.TILE, "num_warps": 4}
    for form, types in {"whole": whole, "cut": cut, "first pass": first}.items():
        even = ("D",) if form == "whole" else ()
        yield Variant(
            f"running_softmax, {form}", running_softmax._kernel, types, constants, even=even
        )


VARIANTS = (
    linear_attn_variants,
    conv_variants,
    scan_variants,
    selective_scan_variants,
    chunk_variants,
    shared_heads_variants,
    quadratic_attn_variants,
    running_softmax_variants,
    step_variants,
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
        compiled = triton.compile(src, target=GPUTarget("cuda", variant.arch, 32), options=options)
        shared = compiled.metadata.shared
        row = {"name": variant.name, "arch": variant.arch, "shared": shared, **needs(compiled)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
