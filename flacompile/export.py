"""A converted model as one package that runs without Python: ``flacompile.export``.

The package holds two AOTInductor models. ``prefill``: ids [B, T] -> logits of the last token
[B, vocabulary] and the states, B and T dynamic. ``decode``: one token [B, 1] and the states ->
logits and the next states. The states are plain tensors in a fixed order and do not grow.

A number of chunks that is one in the example is specialised inside an op's body, where export does
not look, and the package would be silently wrong elsewhere. So the example has more than two of the
largest spans that the CPU form folds, and every package is compared with the model, by value and at
lengths on both sides of each span, before it gets its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.package import load_package, package_aoti
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from flacompile import __version__, hf
from flacompile.files import write_atomically
from flacompile.ops.chunked import CHUNK
from flacompile.ops.prefix import FANOUT
from flacompile.passes.decompose import decompose
from flacompile.passes.swap_attention import routed, swapped

SPAN = CHUNK * FANOUT  # tokens that one fold of the CPU form covers
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, SPAN + 1)  # where the gate compares values
TOLERANCE = 1e-4  # relative, fp32
STAGES = ("trace", "prefill", "decode", "gate")


class Prefill(nn.Module):
    """ids [B, T] -> (logits [B, vocabulary], every tensor of the states)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        logits, states = hf.run_with_states(self.model, ids, position, None)
        return logits, *pytree.tree_leaves(states)


class Decode(nn.Module):
    """(token [B, 1], every tensor of the states) -> (logits [B, vocabulary], the next ones)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        mixers: list[Any] = [layer.mixer for layer in swapped(model).values()]
        empty = [mixer.init_state(1) for mixer in mixers]
        self.layout = pytree.tree_structure(empty)

    def forward(self, token: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = pytree.tree_unflatten(list(leaves), self.layout)
        position = states[0].position[:, None]
        logits, states = hf.run_with_states(self.model, token, position, states)
        return logits, *pytree.tree_leaves(states)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    progress: Callable[[str], object] = lambda stage: None,
) -> dict[str, Any]:
    """Writes ``path``, a ``.pt2`` package with ``prefill`` and ``decode``.

    Args:
        model: a converted transformers causal language model, every attention converted.
        path: the package; an existing file is replaced only by a package that passed its gate.
        lengths: values of T at which prefill and the decode after it are compared with the model;
            those beyond the model's positions are left out.
        progress: called with a word at the start of each of the STAGES.

    Returns:
        The largest relative errors of the gate; shapes at B = 1 and dtypes of the states, and the
        index of the one that counts tokens; the most tokens of a sequence (``context``, None for
        any number); vocabulary, device, versions. All but the errors are also the metadata.

    Raises:
        ValueError: not a converted model, softmax layers were kept, or the gate failed.
    """
    path = Path(path)
    _check(model, path)
    model.eval()
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    lengths = [t for t in lengths if limit is None or t < limit]
    with torch.no_grad(), routed(model, "mixer"), hf.unpadded(model):
        progress("trace")
        programs = _trace(model)
        states = programs["decode"].example_inputs[0][1]  # type: ignore[index]
        device = next(model.parameters()).device.type
        facts: dict[str, Any] = {
            "state_shapes": [[1, *x.shape[1:]] for x in states],
            "state_dtypes": [str(x.dtype).removeprefix("torch.") for x in states],
            "position": _position(states),
            "context": _context(model),
            "vocabulary": config.vocab_size,
            "device": device,
            "torch": torch.__version__,
            "flacompile": __version__,
        }
        options = {
            "aot_inductor.package": True,
            "aot_inductor.metadata": {name: json.dumps(value) for name, value in facts.items()},
        }
        files: dict[str, Any] = {}
        for name, program in programs.items():
            progress(name)
            args, kwargs = program.example_inputs  # type: ignore[misc]
            files[name] = torch._inductor.aot_compile(
                program.module(), args, kwargs, options=options
            )

        def write(temporary: Path) -> None:
            progress("gate")
            package = temporary.with_suffix(".pt2")  # the packager insists on the suffix
            try:
                package_aoti(str(package), files)
                facts["errors"] = _gate(model, package, lengths)
                package.rename(temporary)
            finally:
                package.unlink(missing_ok=True)

        write_atomically(path, write)
    return facts


def _trace(model: nn.Module) -> dict[str, ExportedProgram]:
    """Both programs, any B and T, with our ops opened. Every example is contiguous."""
    device = next(model.parameters()).device
    ids = torch.ones(2, SPAN * 3 - 70, dtype=torch.long, device=device)
    states = tuple(x.contiguous() for x in Prefill(model)(ids[:, :3])[1:])
    batch = {0: Dim.DYNAMIC}
    prefill = torch.export.export(
        Prefill(model), (ids,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    )
    decode = torch.export.export(
        Decode(model),
        (ids[:, :1].contiguous(), states),
        dynamic_shapes=(batch, tuple(batch for _ in states)),
    )
    return {"prefill": decompose(prefill), "decode": decompose(decode)}


def _position(states: Sequence[Tensor]) -> int:
    """The first state that is [B] int64: the number of tokens seen."""
    return next(i for i, x in enumerate(states) if x.dtype == torch.int64 and x.ndim == 1)


def _context(model: nn.Module) -> int | None:
    """The length of a table of learned positions: nothing else bounds a sequence."""
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    learned = any(isinstance(m, nn.Embedding) and m is not tokens for m in model.modules())
    config: Any = model.config
    return config.max_position_embeddings if learned else None


def _check(model: nn.Module, path: Path) -> None:
    layers = swapped(model)
    if not layers:
        raise ValueError(
            f"model: expected one that flacompile.convert converted, got {type(model).__name__}"
        )
    config: Any = model.config
    kept = config.num_hidden_layers - len(layers)
    if kept:
        raise ValueError(
            f"model: expected every attention converted, got {kept} softmax layers kept; their "
            "caches grow and are not exported yet"
        )
    growing = [p for p, x in layers.items() if not x.mixer.keeps_size]
    if growing:
        raise ValueError(
            f"model: expected mixers whose states keep their size, got "
            f"{type(layers[growing[0]].mixer).__name__} in {growing[0]}"
        )
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name}")


def _gate(model: nn.Module, package: Path, lengths: Sequence[int]) -> dict[str, float]:
    """Compares the package with the model by value; raises ValueError at the first difference."""
    prefill = load_package(str(package), model_name="prefill")
    decode = load_package(str(package), model_name="decode")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    errors = {"prefill": 0.0, "decode": 0.0}
    config: Any = model.config
    for batch, time in [(1 + i % 2, t) for i, t in enumerate(lengths)]:
        ids = torch.randint(config.vocab_size, (batch, time + 1), generator=generator).to(device)
        want = Prefill(model)(ids[:, :-1].contiguous())
        got = prefill(ids[:, :-1].contiguous())
        token = ids[:, -1:].contiguous()
        pairs = {
            "prefill": (got, want),
            "decode": (decode(token, tuple(got[1:])), Decode(model)(token, want[1:])),
        }
        for name, (a, b) in pairs.items():
            error = _relative_error(a, b)
            errors[name] = max(errors[name], error)
            if not error <= TOLERANCE:
                raise ValueError(
                    f"package: expected the model's values within {TOLERANCE}, got a relative "
                    f"error of {error:.3g} in {name} at batch {batch}, {time} tokens; nothing "
                    "was written"
                )
    return errors


def _relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest over all tensors."""
    pairs = [(a.float(), b.float()) for a, b in zip(got, want, strict=True)]
    return max(((a - b).norm() / (b.norm() + 1e-12)).item() for a, b in pairs)
