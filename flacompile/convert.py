"""Softmax attention out, a linear mixer in: ``flacompile.convert``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from flacompile import hf
from flacompile.calibrate import calibrate
from flacompile.keep import BATCHES, Keep, keep_best, read_keep
from flacompile.layers import MIXERS, HybridAttention, Mixer
from flacompile.layers.base import RecurrentMixer
from flacompile.ops.validate import expect
from flacompile.passes.capture import default_ids, switch_to_sdpa
from flacompile.passes.find_attention import find_attention
from flacompile.passes.outline import forget_blocks, graph_of, outline_sites, restore_blocks
from flacompile.passes.sites import AttentionSite, Rejected, describe_site
from flacompile.passes.swap_attention import restore_attention, swap_attention, swapped

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

EXAMPLE = (4, 128)  # rows and tokens of random ids, where the user gives no example


@dataclasses.dataclass(frozen=True)
class Layer:
    """One converted attention.

    Attributes:
        path: its place in the module tree.
        found: what the pass found there.
        mixer: registry name of what stands there now.
        window: number of tokens of the softmax beside it, or None.
        before: relative squared error of the new mixer's output, before calibration, against the
            attention it replaces.
        after: the same after it; equal to before where there was none.
    """

    path: str
    found: str
    mixer: str
    before: float
    after: float
    window: int | None = None

    def __str__(self) -> str:
        text = f"{self.path} -> {self.mixer}"
        text += f" and softmax over {self.window} tokens" if self.window else ""
        text += f": relative error {self.before:.3f}"
        return text + (f", calibrated {self.after:.3f}" if self.after != self.before else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``convert`` did.

    Attributes:
        layers: converted.
        kept: paths that were kept on request.
        rejected: left alone, with the reason.
        notes: what else there is to know.
        gains: by path, what this attention is worth. Where keep is "auto": nats of KL to the
            original model that restoring it alone gained, or relative error where the model returns
            no logits; where it is "recall": nats a token of a needle that converting it alone lost.
    """

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]
    gains: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(layer) for layer in self.layers]
        lines += [
            f"{path}: kept" + (f", a gain of {self.gains[path]:.4f}" if self.gains else "")
            for path in self.kept
        ]
        lines += [f"{x.path}: left alone, {x.reason}" for x in self.rejected]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def convert(
    model: nn.Module | ExportedProgram,
    mixer: str | Mixer.Config = "gla",
    *,
    keep: Keep = (),
    window: int | None = None,
    init: Literal["neutral", "calibrated"] = "calibrated",
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    quantize: AOBaseConfig | None = None,
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
        keep: attentions that stay softmax: their indices in order, negative ones from the end; a
            share of all, spread evenly; or a method: "auto", those that bring the model nearest to
            the original on the first batches of ``calibration`` when one alone is softmax again;
            "recall", those without which alone the model recalls a needle worst; "uniform", evenly
            spread. "auto" keeps a quarter, "auto:0.5" a share, "auto:3" a number.
        window: a number of tokens; every linear mixer then stands beside a softmax over that many
            last tokens, and each head learns its share of the two.
        init: "neutral" copies q, k, v, o and opens the gates; "calibrated" then sets decay and
            scale of each head from the teacher's statistics, in closed form.
        example_inputs: arguments of one call of the model; by default random tokens for a
            transformers model, and a program's own example.
        calibration: batches for "calibrated", most often token ids [B, T], else what
            ``example_inputs`` may be; taken one at a time, once. Default the example.
        quantize: what becomes of the new mixers' projections, as in ``flacompile.quantize_``:
            ``BitNet()`` to distil through the rounding, or a config of torchao. None: nothing.

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
    if window is not None:
        expect(window >= 1, "window", "a number of tokens, at least 1", window)
        linear = issubclass(cls, RecurrentMixer)
        expect(linear, "window", "None where mixer is no linear one", f"{window} and {mixer!r}")
    if isinstance(model, nn.Module):
        _check_not_converted(model)
    args, kwargs = _call_of(example_inputs)
    if isinstance(model, ExportedProgram) and model.example_inputs and example_inputs is None:
        args, kwargs = model.example_inputs
    if isinstance(model, GraphModule | ExportedProgram):
        model = graph_of(model, args, kwargs)
    attention = hf.attention_of(model)
    with _all_or_nothing(model):
        note = switch_to_sdpa(model)
        done = _convert(
            model, cls, changed, keep, window, init == "calibrated", args, kwargs, calibration
        )
        if quantize is not None:
            from flacompile.quantize import quantize_mixers_

            quantize_mixers_(model, quantize)
        low_bit = f"the mixers' projections are those of {quantize}" if quantize else None
        notes = (*filter(None, (note, low_bit)), *done.notes)
        hf.adopt(model, attention)
        model.flacompile_report = dataclasses.replace(done, notes=notes)  # type: ignore[assignment]
    return model


def _check_not_converted(model: nn.Module) -> None:
    done = list(swapped(model))
    if done:
        raise ValueError(
            f"model: expected one that is not converted, got one with {len(done)} attentions "
            f"converted ({', '.join(done[:3])}); flacompile.unconvert puts them back first"
        )


def _convert(
    model: nn.Module,
    cls: type[Mixer],
    changed: dict[str, Any],
    keep: Keep,
    window: int | None,
    calibrated: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calibration: Iterable[Any] | None,
) -> Report:
    """``convert`` on arguments that were read; what it did so far stays if it raises."""
    findings = find_attention(model, args, kwargs)
    kept, choice = read_keep(keep, len(findings.sites))
    chosen = [site for i, site in enumerate(findings.sites) if i not in kept]
    kept_paths = tuple(findings.sites[i].path for i in sorted(kept))
    if not chosen:
        found = [f"  {path}: kept on request" for path in kept_paths]
        found += [f"  {x.path}: {x.reason}" for x in findings.rejected]
        raise ValueError(
            "model: expected at least one causal softmax attention to convert, got none\n"
            + (
                "\n".join(found)
                or "  no attention in the captured graph; write it with "
                "scaled_dot_product_attention, or load the model with attn_implementation='sdpa'"
            )
        )
    chosen = outline_sites(model, chosen, args, kwargs)
    name = next(name for name, c in MIXERS.items() if c is cls)
    mixers = {}
    for site in chosen:
        config = cls.config_for(site)
        width, own = changed.get("hidden_size", config.hidden_size), config.hidden_size
        expect(width == own, "hidden_size", f"that of {site.path}, {own}, or none", width)
        config = dataclasses.replace(config, **changed)
        if window is not None:
            config = HybridAttention.around(config, site, window)
        mixers[site.path] = build(config.mixer, config, model, site)
    conventions = {site.path: hf.convention_of(model, site) for site in chosen}
    parts = {x.path: (x, mixers[x.path], conventions[x.path]) for x in chosen}
    calls = _calls(model, args, kwargs, calibration)
    first = list(itertools.islice(calls, BATCHES)) if choice else []
    errors = calibrate(model, parts, itertools.chain(first, calls), adjust=calibrated)
    for site in chosen:
        new = mixers[site.path].train(model.training)
        swap_attention(model, site, new, conventions[site.path])
    gains = keep_best(model, first, choice) if choice else {}
    converted = [site for site in chosen if site.path in swapped(model)]
    kept_paths += tuple(path for path in gains if path not in swapped(model))
    layers = [Layer(x.path, describe_site(x), name, *errors[x.path], window) for x in converted]
    notes = findings.notes
    if any(site.window for site in converted) and issubclass(cls, RecurrentMixer):
        notes += (f"{name} sees all of the past, also where the attention had a sliding window",)
    return Report(tuple(layers), kept_paths, findings.rejected, notes, gains)


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the block raises, modules, gradients and attention implementation are as before it."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        yield
    except BaseException:
        for path in swapped(model):
            restore_attention(model, path)
        restore_blocks(model)
        for parameter, required in trained:
            parameter.requires_grad_(required)
        if implementation != getattr(getattr(model, "config", None), "_attn_implementation", None):
            model.set_attn_implementation(implementation)  # type: ignore[operator]
        raise


def report(model: nn.Module) -> Report:
    """What ``convert`` did to this model."""
    if not isinstance(getattr(model, "flacompile_report", None), Report):
        raise ValueError(
            f"model: expected a converted model, got {type(model).__name__}; convert it first"
        )
    return model.flacompile_report  # type: ignore[return-value]


def keep_layers(
    model: nn.Module, keep: Keep, *, calibration: Iterable[Any] | None = None
) -> nn.Module:
    """Puts back, in place, those attentions of a converted model that are to stay softmax.

    ``convert(keep=...)`` does so before any training. After the mixers have been aligned their
    gains tell more of what a distilled model will lack, and a model that was aligned once serves
    any choice. What is left is trained on as it is.

    Args:
        model: converted, the originals beside the mixers.
        keep: as of ``convert``, of the attentions that are converted.
        calibration: as of ``convert``; the first batches are taken.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not converted, or ``finalize`` let go of the originals; ``keep`` is
            out of range, or all that is left.
    """
    layers = _with_originals(model)
    kept, choice = read_keep(keep, len(layers))
    expect(len(kept) < len(layers), "keep", f"fewer than all {len(layers)} attentions", keep)
    for path in (layers[i] for i in kept):
        restore_attention(model, path)
    gains: Mapping[str, float] = report(model).gains
    if choice:
        first = itertools.islice(_calls(model, (), {}, calibration), BATCHES)
        gains = keep_best(model, list(first), choice)
    left, done = swapped(model), report(model)
    hf.note_mixers(model)
    model.flacompile_report = dataclasses.replace(  # type: ignore[assignment]
        done,
        layers=tuple(layer for layer in done.layers if layer.path in left),
        kept=(*done.kept, *(path for path in layers if path not in left)),
        gains=gains,
    )
    return model


def _with_originals(model: nn.Module) -> list[str]:
    """Paths of the converted attentions; raises ValueError unless each has its original."""
    layers = swapped(model)
    gone = [path for path, layer in layers.items() if layer.original is None]
    if gone or not layers:
        got = f"{gone[0]} without its original, as finalize and load leave it" if gone else "none"
        raise ValueError(f"model: expected converted attentions beside their originals, got {got}")
    return list(layers)


def unconvert(model: nn.Module) -> nn.Module:
    """Puts the original attentions back, bit for bit, in place of the mixers.

    Class, config, module tree and what is trained are as before ``convert``. Weights outside the
    attentions are as they are now: training may have changed them.

    Raises:
        ValueError: the model is not converted, or ``finalize`` let go of the originals.
    """
    layers = _with_originals(model)
    for path in layers:
        restore_attention(model, path)
    restore_blocks(model)
    hf.release(model)
    del model.flacompile_report
    return model


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
    got = getattr(type(mixer), "__qualname__", type(mixer).__name__)
    raise ValueError(
        f"mixer: expected a name or a mixer's Config, got {got}; "
        "a mixer of your own needs a line in flacompile.layers.MIXERS"
    )


def _call_of(example: Any, name: str = "example_inputs") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as args and kwargs; none is left to the pass."""
    if example is None:
        return (), {}
    if isinstance(example, dict):
        return (), example
    if not isinstance(example, (Tensor, tuple, list)):
        kind = type(example).__name__
        raise ValueError(f"{name}: expected a tensor, a tuple or a dict of a call, got {kind}")
    return ((example,) if isinstance(example, Tensor) else tuple(example)), {}


def _calls(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calibration: Iterable[Any] | None,
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of the model whose attentions are looked at, one at a time, on its device."""
    device = next(model.parameters()).device
    if isinstance(calibration, Tensor):
        raise ValueError("calibration: expected batches, such as a list of tensors, got one tensor")
    if calibration is not None:
        for batch in calibration:
            yield tree_map_only(Tensor, lambda x: x.to(device), _call_of(batch, "calibration"))
    elif args or kwargs:
        yield args, kwargs
    else:
        batch, time = EXAMPLE
        time = min(time, getattr(model.config, "max_position_embeddings", None) or time)
        yield (default_ids(model, batch, time),), kwargs
