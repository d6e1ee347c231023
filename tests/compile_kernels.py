"""Compile every variant of the kernels ahead of time, without a GPU, and print what it needs.

One JSON line a variant: name, architecture, shared memory, registers and stack (spills) a thread.
A process of its own, because under TRITON_INTERPRET=1 `triton.jit` makes interpreted kernels:

    TRITON_INTERPRET=0 python tests/compile_kernels.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flacompile.ops.kernels import linear_attn

DECAYS = ("none", "g", "gk", "gv", "g gk", "g gv", "gk gv")
DTYPES = {"bf16": "tf32", "fp16": "tf32", "fp32": "ieee"}
SHAPES = ((128, 128), (64, 64), (256, 256), (16, 24))  # K, V


def variants():
    """Everything at the most common shape; at the others each kind of decay once a dtype."""
    for decay, dtype, reverse in product(DECAYS, DTYPES, (False, True)):
        yield decay, dtype, *SHAPES[0], reverse
    for (K, V), decay, dtype in product(SHAPES[1:], ("g", "gk gv"), DTYPES):
        yield decay, dtype, K, V, False


def source(decay, dtype, K, V, reverse):
    """The kernel with the types and constants of one launch; reverse is also packed, fp32 out."""
    given = decay.split()
    diagonal = "gk" in given or "gv" in given
    meta = linear_attn.tiles(K, V, diagonal, dtype == "fp32")
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
    kernel = linear_attn._diagonal_kernel if diagonal else linear_attn._scalar_kernel
    types = dict.fromkeys("qkvo", f"*{dtype}") | {"final_state": "*fp32", "state": "*fp32"}
    types |= {"scale": "fp32", "T": "i32", "H": "i32"} | dict.fromkeys(given, "*fp32")
    constants = dict(K=K, V=V, REVERSE=reverse, PRECISION=DTYPES[dtype], **meta)
    if reverse:
        types |= {"cu_seqlens": "*i64", "o": "*fp32"}
    types = {n: "constexpr" if n in constants else types.get(n) for n in kernel.arg_names}
    constants |= {n: None for n, kind in types.items() if kind is None}
    types = {n: kind or "constexpr" for n, kind in types.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    return ASTSource(kernel, types, constants, aligned), options


def needs(compiled):
    """Registers and stack bytes a thread, from the compiled binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


def main(architectures):
    for variant in variants():
        src, options = source(*variant)
        for arch in architectures:
            compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
            decay, dtype, K, V, reverse = variant
            print(json.dumps({
                "name": f"{decay}, {dtype}, {K}x{V}{', reverse' if reverse else ''}",
                "arch": arch, "shared": compiled.metadata.shared, **needs(compiled),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or [80, 90])
