"""No package without proof: its logits are compared with the model's own, at many B and T.

At every length the prompt goes in by one call and, after it, as many tokens again as one chunk has
by another; two tokens are then decoded. The model reads all of it at once, without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flacompile.export.programs import CHUNK, NAMES, SPAN
from flacompile.layers.bitattn import BitLinear

LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, SPAN + 1)  # where values are compared
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
ROUNDED = 2e-2  # an activation whose eight bits an ulp turns the other way


class Reference(NamedTuple):
    """Ids [B, T], at which numbers of tokens logits are compared, and the model's [B, n, V]."""

    ids: Tensor
    ends: list[int]
    logits: Tensor
    allowed: float


@torch.no_grad()
def references(model: nn.Module, lengths: Sequence[int], room: int | None) -> list[Reference]:
    """What the model says, for prompts of these lengths as far as there is room for them."""
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, time in enumerate(lengths):
        ends = [time, time + CHUNK // 2 + 1, time + CHUNK // 2 + 2]
        if room is not None and ends[-1] > room:
            ends = [time, time + 1] if time < room else []
        if not ends:
            continue
        ids = torch.randint(config.vocab_size, (1 + i % 3, ends[-1]), generator=generator)
        ids, at = ids.to(device), torch.tensor(ends, device=device) - 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=at).logits
        allowed = max(TOLERANCE[logits.dtype], ROUNDED if _rounds(model) else 0.0)
        found.append(Reference(ids, ends, logits, allowed))
    return found


def _rounds(model: nn.Module) -> bool:
    """Whether a layer rounds what it reads, as those with low-bit weights do."""
    return any(
        isinstance(module, BitLinear)
        or any(is_traceable_wrapper_subclass(p) for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def compare(
    programs: Mapping[str, Any], begin: Any, cases: Sequence[Reference]
) -> dict[str, float]:
    """The largest relative error of each program.

    Args:
        programs: ``prefill`` and ``decode``, called with ids and a tuple of states.
        begin: number of sequences -> states before the first token.
        cases: what they are compared with.

    Raises:
        ValueError: an error beyond the tolerance, at the first.
    """
    errors = dict.fromkeys(programs, 0.0)
    for case in cases:
        start, states = 0, begin(len(case.ids))
        for i, end in enumerate(case.ends):
            name = "decode" if i and end - start == 1 else "prefill"
            logits, *states = programs[name](case.ids[:, start:end].contiguous(), tuple(states))
            error = _relative_error(logits, case.logits[:, i])
            errors[name] = max(errors[name], error)
            if not error <= case.allowed:
                raise ValueError(
                    f"package: expected the model's values within {case.allowed}, got a relative "
                    f"error of {error:.3g} in {name} at batch {len(case.ids)}, tokens {start} to "
                    f"{end}; nothing was written"
                )
            start = end
    return errors


def load_programs(package: Path, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Both programs of a package by name, over these weights where it has none inside."""
    from torch._inductor.package import load_package

    programs = {name: load_package(str(package), name) for name in NAMES}
    for program in programs.values():
        if weights is not None:
            own = {key: weights[key] for key in program.get_constant_fqns()}
            program.load_constants(own, check_full_update=True, user_managed=True)
    return programs


def _relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / (want.norm() + 1e-12)).item()
