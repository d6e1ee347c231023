"""Errors of every kernel variant against float64: output, state and each gradient.

    python tests/bench/errors.py [--device cuda] [--json errors.json]

One row a variant, dtype and shape; relative norms ||x - x64|| / ||x64||, where x64 is the float64
token loop on the same rounded inputs. On a CPU the same table is of the CPU form.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from flacompile.ops import linear_attn, spec

NAMES = ("o", "state", "dq", "dk", "dv", "dgk", "dgv", "dstate")
DECAYS = ((None, None), ("head", None), ("channel", None), (None, "channel"), ("channel",) * 2)
SHAPES = ((2, 100, 2, 64, 64), (1, 1000, 2, 128, 128), (1, 512, 2, 40, 96), (1, 300, 1, 256, 64))


def draw(shape: tuple[int, ...], kinds: tuple[str | None, ...], dtype: torch.dtype, device: str):
    """q, k, v, gk, gv and state of one case, the same for every device."""
    batch, time, heads, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def decay(kind: str | None, dim: int) -> Tensor | None:
        size = (batch, time, heads) if kind == "head" else (batch, time, heads, dim)
        return None if kind is None else (-0.1 * normal(*size).abs()).float().to(device)

    q, k, v = (
        normal(batch, time, heads, dim).to(dtype).to(device)
        for dim in (key_dim, key_dim, value_dim)
    )
    state = normal(batch, heads, key_dim, value_dim).float().to(device)
    return [q, k, v, decay(kinds[0], key_dim), decay(kinds[1], value_dim), state]


def results(function, args: list[Tensor | None], weights: list[Tensor] | None):
    """Outputs and gradients of a random weighting of them; the weights, too."""
    args = [x if x is None else x.detach().requires_grad_() for x in args]
    outputs = function(*args[:5], state=args[5])
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator).to(x.device) for x in outputs]
    loss = sum((x.to(w.dtype) * w).sum() for x, w in zip(outputs, weights, strict=True))
    given = [x for x in args if x is not None]
    found = iter(torch.autograd.grad(loss, given))
    gradients = [None if x is None else next(found) for x in args]
    return [*outputs, *gradients], weights


def row(shape: tuple[int, ...], kinds: tuple[str | None, ...], dtype: torch.dtype, device: str):
    """Relative errors by name; NaN counts as infinite."""
    args = draw(shape, kinds, dtype, device)
    got, weights = results(linear_attn, args, None)
    weights = [w.to(x.dtype).double() for w, x in zip(weights, got, strict=False)]
    want, _ = results(spec.linear_attn, [x if x is None else x.double() for x in args], weights)
    errors = {}
    for name, a, b in zip(NAMES, got, want, strict=True):
        if a is not None:
            error = ((a.double() - b).norm() / b.norm()).item()
            errors[name] = error if error == error else float("inf")
    return errors


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--json", type=Path, help="also write the rows here")
    options = options.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"linear_attn on {where}, torch {torch.__version__}\n")
    print("| decay k, v | dtype | B T H K V | " + " | ".join(NAMES) + " |\n" + "|---" * 11 + "|")
    rows = []
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for kinds, dtype, shape in itertools.product(DECAYS, dtypes, SHAPES):
        errors = row(shape, kinds, dtype, options.device)
        label = f"{kinds[0] or '-'}, {kinds[1] or '-'} | {str(dtype)[6:]} | {shape}"
        cells = (f"{errors[n]:.1e}" if n in errors else "" for n in NAMES)
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
        rows.append({"decays": kinds, "dtype": str(dtype), "shape": shape, "errors": errors})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
