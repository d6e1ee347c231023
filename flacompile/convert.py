"""Softmax attention out, a linear mixer in: ``flacompile.convert``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from flacompile import hf
from flacompile.calibrate import calibrate, relative_error
from flacompile.layers import MIXERS, Mixer
from flacompile.passes.capture import (
    default_ids,
    evaluating,
    record_calls,
    switch_to_sdpa,
    without_cache,
)
from flacompile.passes.find_attention import find_attention
from flacompile.passes.outline import forget_blocks, graph_of, outline_sites, restore_blocks
from flacompile.passes.sites import AttentionSite, Rejected, describe_site
from flacompile.passes.swap_attention import PlainConvention, swap_attention, swapped
from flacompile.passes.verify import rebuild

EXAMPLE = (4, 128)  # rows and tokens of random ids, where the user gives no example


@dataclasses.dataclass(frozen=True)
class Layer:
    """One converted attention.

    Attributes:
        path: its place in the module tree.
        found: what the pass found there.
        mixer: registry name of what stands there now.
        before: relative squared error of the new mixer's output, before calibration, against the
            attention it replaces.
        after: the same after it; equal to before where there was none.
    """

    path: str
    found: str
    mixer: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``convert`` did: layers converted, kept on request, left alone with the reason."""

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{x.path} -> {x.mixer}: relative error {x.before:.3f}"
            + (f", calibrated {x.after:.3f}" if x.after != x.before else "")
            for x in self.layers
        ]
        lines += [f"{path}: kept" for path in self.kept]
        lines += [f"{x.path}: left alone, {x.reason}" for x in self.rejected]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def convert(
    model: nn.Module | ExportedProgram,
    mixer: str | Mixer.Config = "gla",
    *,
    keep: float | Sequence[int] = (),
    init: Literal["neutral", "calibrated"] = "calibrated",
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> nn.Module:
    """Replaces every causal softmax attention that can be proved by a linear mixer, in place.

    Nothing is guessed. The model is captured on the example, every attention is traced back to
    its weights, and softmax attention rebuilt from them must give the model's own output; else
    the site is left alone and ``report(model)`` says why. The original attention stays beside the
    new mixer, frozen, as the teacher, until ``finalize``. Either all of it happens or nothing.

    Args:
        model: any module whose attention is ``scaled_dot_product_attention``; transformers models
            with eager attention are switched to it. A block that attends among other things is
            replaced by its graph, in which the attention is a module. A GraphModule or an
            ExportedProgram is left as it was, but for its attention's weights, which are frozen.
        mixer: a registry name, or a mixer's ``Config``; of a Config, the fields that differ from
            the class's defaults are used, the rest follows the attention found.
        keep: attentions that stay softmax: their indices in order, negative ones from the end, or
            a share of all, spread evenly.
        init: "neutral" copies q, k, v, o and opens the gates; "calibrated" then sets decay and
            scale of each head from the teacher's statistics, in closed form.
        example_inputs: arguments of one call of the model; by default random tokens for a
            transformers model, and a program's own example.
        calibration: batches of token ids [B, T] for "calibrated"; default the example.

    Returns:
        The same model. For a graph, a new GraphModule over the same weights: it holds for the
        sizes that the given graph held for, trains, compiles and can be exported again.

    Raises:
        ValueError: an unknown mixer, nothing that can be converted, a model already converted, or
            an argument out of range.
    """
    cls, changed = _mixer_class(mixer)
    if init not in ("neutral", "calibrated"):
        raise ValueError(f"init: expected 'neutral' or 'calibrated', got {init!r}")
    if isinstance(model, nn.Module) and swapped(model):
        raise ValueError("model: expected one that is not converted, got a converted one")
    args, kwargs = _call_of(example_inputs)
    if isinstance(model, ExportedProgram) and model.example_inputs and example_inputs is None:
        args, kwargs = model.example_inputs
    if isinstance(model, GraphModule | ExportedProgram):
        model = graph_of(model, args, kwargs)
    with _all_or_nothing(model):
        note = switch_to_sdpa(model)
        done = _convert(model, cls, changed, keep, init == "calibrated", args, kwargs, calibration)
        notes = (*([note] if note else []), *done.notes)
        model.flacompile_report = dataclasses.replace(done, notes=notes)  # type: ignore[assignment]
    return model


def _convert(
    model: nn.Module,
    cls: type[Mixer],
    changed: dict[str, Any],
    keep: float | Sequence[int],
    calibrated: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calibration: Iterable[Tensor] | None,
) -> Report:
    """``convert`` on arguments that were read; what it did so far stays if it raises."""
    findings = find_attention(model, args, kwargs)
    kept = _kept(keep, len(findings.sites))
    chosen = [site for i, site in enumerate(findings.sites) if i not in kept]
    kept_paths = tuple(findings.sites[i].path for i in sorted(kept))
    if not chosen:
        found = [f"  {path}: kept on request" for path in kept_paths]
        found += [f"  {x.path}: {x.reason}" for x in findings.rejected]
        raise ValueError(
            "model: expected at least one causal softmax attention to convert, got none\n"
            + ("\n".join(found) or "  no scaled_dot_product_attention in the captured graph")
        )
    chosen = outline_sites(model, chosen, args, kwargs)
    name = next(name for name, c in MIXERS.items() if c is cls)
    examples = _examples(model, chosen, _batches(model, args, kwargs, calibration))
    layers, mixers = [], []
    for site in chosen:
        new = build(cls, dataclasses.replace(cls.config_for(site), **changed), model, site)
        x, y = examples[site.path]
        before = after = relative_error(new, x, y)
        if calibrated:
            after = calibrate(new, rebuild(site, model, x), site.scale, x, y)
        mixers.append(new.train(model.training))
        layers.append(Layer(site.path, describe_site(site), name, before, after))
    for site, new in zip(chosen, mixers, strict=True):
        swap_attention(model, site, new, hf.convention_of(model, site))
    return Report(tuple(layers), kept_paths, findings.rejected, findings.notes)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the block raises, modules, gradients and attention implementation are as before it."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        yield
    except BaseException:
        for path, layer in swapped(model).items():
            model.set_submodule(path, layer.original, strict=True)  # type: ignore[arg-type]
        restore_blocks(model)
        for parameter, required in trained:
            parameter.requires_grad_(required)
        if implementation != getattr(getattr(model, "config", None), "_attn_implementation", None):
            model.set_attn_implementation(implementation)  # type: ignore[operator]
        raise


def report(model: nn.Module) -> Report:
    """What ``convert`` did to this model."""
    if not isinstance(getattr(model, "flacompile_report", None), Report):
        raise ValueError(f"model: expected a converted model, got {type(model).__name__}")
    return model.flacompile_report  # type: ignore[return-value]


def finalize(model: nn.Module) -> nn.Module:
    """Lets go of the teacher: afterwards only the mixers remain. Returns the same model."""
    for layer in swapped(model).values():
        layer.original, layer.route = None, "mixer"
    forget_blocks(model)
    return model


@torch.no_grad()
def build(cls: type[Mixer], config: Any, model: nn.Module, site: AttentionSite) -> Mixer:
    """A mixer with the site's weights, in their dtype and on their device."""
    weights = site.weights(model)
    mixer = cls(config).to(weights.q_weight)
    mixer.load_attention(weights)
    return mixer


def _mixer_class(mixer: str | Mixer.Config) -> tuple[type[Mixer], dict[str, Any]]:
    """The class, and the Config fields that the user set."""
    if isinstance(mixer, str):
        if mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(sorted(MIXERS))}, got {mixer!r}")
        return MIXERS[mixer], {}
    for cls in MIXERS.values():
        if type(mixer) is cls.Config:
            default = cls.Config()  # type: ignore[call-arg]
            fields = {f.name: getattr(mixer, f.name) for f in dataclasses.fields(mixer)}
            return cls, {k: v for k, v in fields.items() if v != getattr(default, k)}
    raise ValueError(f"mixer: expected a name or a mixer's Config, got {type(mixer).__name__}")


def _call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as args and kwargs; none is left to the pass."""
    if example is None:
        return (), {}
    if isinstance(example, dict):
        return (), example
    return ((example,) if isinstance(example, Tensor) else tuple(example)), {}


def _batches(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calibration: Iterable[Tensor] | None,
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of the model whose attentions are looked at."""
    if calibration is None:
        given = bool(args or kwargs)
        return [(args if given else (default_ids(model, *_example_shape(model)),), kwargs)]
    batches = list(calibration)
    lengths = [ids.shape[-1] for ids in batches]
    if not batches:
        raise ValueError("calibration: expected at least one batch of token ids, got none")
    if len(set(lengths)) > 1:
        raise ValueError(f"calibration: expected batches of one length, got {lengths}")
    return [((ids,), {}) for ids in batches]


def _example_shape(model: nn.Module) -> tuple[int, int]:
    batch, time = EXAMPLE
    return batch, min(time, getattr(model.config, "max_position_embeddings", None) or time)


def _examples(
    model: nn.Module,
    sites: Sequence[AttentionSite],
    batches: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output [B, T, D] of every attention over all batches."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {site.path: [] for site in sites}
    with evaluating(model):
        for args, kwargs in batches:
            calls = record_calls(model, set(seen), args, without_cache(model, kwargs))
            for site in sites:
                convention, call = PlainConvention.of(site), calls[site.path]
                x = convention.read(call.args, call.kwargs).x
                seen[site.path].append((x, convention.output(call.result)))
    return {
        path: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        for path, pairs in seen.items()
    }


def _kept(keep: float | Sequence[int], count: int) -> set[int]:
    """Indices of the attentions to keep."""
    if isinstance(keep, (int, float)):
        if not 0 <= keep < 1:
            raise ValueError(f"keep: expected indices or a share in [0, 1), got {keep}")
        number = round(keep * count)
        return {int((i + 0.5) * count / number) for i in range(number)}
    wrong = [i for i in keep if not -count <= i < count]
    if wrong:
        raise ValueError(f"keep: expected indices of {count} attentions, got {wrong}")
    return {i % count for i in keep}
