"""What compilers take for written by each kernel, without a GPU: one JSON line a kernel.

``torch.compile`` copies what it takes for written, and an op cannot save for its backward an input
that is. A process of its own, as ``compile_kernels``:

    TRITON_INTERPRET=0 python tests/written_by_kernels.py
"""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import torch
import triton
from compile_kernels import VARIANTS
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from triton.backends.compiler import GPUTarget

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
    "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8,
}  # fmt: skip


class NoDriver:
    """Stands for a GPU that the analysis asks for its architecture."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def value(kind: str) -> Any:
    """An argument of a Triton type."""
    if kind.startswith("*"):
        return torch.empty(1, dtype=DTYPES[kind[1:]])
    return 64 if kind.startswith("i") else 1.5


def main() -> None:
    triton.runtime.driver.set_active(NoDriver())
    written: dict[str, set[str]] = {}
    for variant in chain.from_iterable(variants() for variants in VARIANTS):
        names, types = variant.kernel.arg_names, variant.types
        given = {n: value(types[n]) if n in types else variant.constants.get(n) for n in names}
        tensors = {n: x for n, x in given.items() if isinstance(x, torch.Tensor)}
        constants = {n: x for n, x in given.items() if n not in tensors}
        table = kernel_side_table
        found = get_mutated_tensors(
            table.add_kernel(variant.kernel), table.add_constant_args(constants), tensors, {}
        )
        name = f"{variant.kernel.__module__.rsplit('.', 1)[1]}.{variant.kernel.__name__}"
        written.setdefault(name, set()).update(found)
    for name, found in written.items():
        print(json.dumps({"kernel": name, "written": sorted(found)}))


if __name__ == "__main__":
    main()
