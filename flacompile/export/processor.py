"""What the code of a package asks of a processor, beyond what it is compiled for everywhere.

By itself Inductor compiles for the very processor at hand. A package would then end a process of
one that lacks any of its instructions; so it gets those alone that Inductor's own code is written
for, and names them, for a runner to refuse them by.
"""

from __future__ import annotations

from typing import Any

import torch


def compile_options() -> dict[str, Any]:
    """Inductor's, for code that runs where there are ``instructions()``. It may fuse a x + b."""
    from torch._inductor import config

    fused: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    return fused | ({"cpp.march": ""} if hasattr(config.cpp, "march") else {})


def instructions() -> list[str]:
    """The sets of instructions of that code, by the names of ``torch.cpu.get_capabilities``."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    here = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    if "cpp.march" not in compile_options():  # before torch 2.13: compiled for all that is here
        return sorted(here)
    flags = {flag.removeprefix("-m").replace("-", "") for flag in _flags(pick_vec_isa())}
    return sorted(name for name in here if name.replace("_", "") in flags)


def _flags(isa: Any) -> list[str]:
    return isa.build_arch_flags().split() if isa else []
