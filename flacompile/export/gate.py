"""No package without proof: its logits are compared with the model's own, at many B and T.

At every length the prompt goes in by one call and, after it, as many tokens again as one chunk has
by another; two tokens are then decoded. The model reads all of it at once, without a cache.

    |package - exact| <= 2 |model - exact| + eps        in bf16 and fp16, as shares of |exact|

where exact is what the same weights give in fp32: rounding grows with depth, in any order of
evaluation, and what a package may differ by is measured by what the model does itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flacompile.export.programs import CHUNK, NAMES, SPAN
from flacompile.layers.bitattn import BitLinear

LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, SPAN + 1)  # where values are compared
LOW = (torch.bfloat16, torch.float16)
TOLERANCE = 1e-4  # of a model in fp32
ROUNDED = 2e-2  # there, an activation whose eight bits an ulp turns the other way
CEILING = 0.5  # beyond it no rounding is an excuse: of zeros the error is 1


class Reference(NamedTuple):
    """Ids [B, T], at which numbers of tokens logits are compared, and the exact [B, n, V]."""

    ids: Tensor
    ends: list[int]
    logits: Tensor
    allowed: float


@torch.no_grad()
def references(model: nn.Module, lengths: Sequence[int], room: int | None) -> list[Reference]:
    """What the model says, for prompts of these lengths as far as there is room for them.

    In fp32 at least: weights of bf16 and fp16 are copied to it as long as this runs.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    low = {name: x for name, x in tensors if x.dtype in LOW}
    exact = {name: x.to(torch.float32) for name, x in low.items()}
    found: list[tuple[Tensor, list[int], Tensor]] = []
    own = 0.0
    for ids, ends in _prompts(model, lengths, room):
        at = torch.tensor(ends, device=ids.device) - 1
        inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": at}
        logits = functional_call(model, exact, (), inputs).logits
        if low:
            rounded = model(**inputs).logits
            own = max(own, *map(_relative_error, rounded.unbind(1), logits.unbind(1)))
        found.append((ids, ends, logits))
    allowed = ROUNDED if _rounds(model) else TOLERANCE
    if low:
        eps = max(torch.finfo(x.dtype).eps for x in low.values())
        allowed = min(2 * own + eps, CEILING)
    return [Reference(*case, allowed) for case in found]


def _prompts(
    model: nn.Module, lengths: Sequence[int], room: int | None
) -> Iterator[tuple[Tensor, list[int]]]:
    """Ids [B, T] with B of 1 to 3, and after how many of the tokens there are logits."""
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    for i, time in enumerate(lengths):
        ends = [time, time + CHUNK // 2 + 1, time + CHUNK // 2 + 2]
        if room is not None and ends[-1] > room:
            ends = [time, time + 1] if time < room else []
        if ends:
            ids = torch.randint(config.vocab_size, (1 + i % 3, ends[-1]), generator=generator)
            yield ids.to(device), ends


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
        ValueError: an error beyond what is allowed, at the first.
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
                    f"package: expected the model's values within {case.allowed:.3g}, got a "
                    f"relative error of {error:.3g} in {name} at batch {len(case.ids)}, tokens "
                    f"{start} to {end}; nothing was written"
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
