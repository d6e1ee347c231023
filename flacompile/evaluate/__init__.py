"""What a converted model keeps of its teacher, and what it costs: ``flacompile.evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flacompile.data import Corpus, DataOptions, Source, read
from flacompile.distill.metrics import Score, by_position, score, share_closed
from flacompile.distill.objectives import relative_error
from flacompile.evaluate.cost import STEPS, WARM, Speed, speed
from flacompile.evaluate.harness import run_tasks
from flacompile.evaluate.needle import Recall, needles, recall, row_length
from flacompile.ops.validate import expect
from flacompile.passes.capture import evaluating, record_calls, without_cache
from flacompile.passes.swap_attention import Call, SwappedAttention, swapped

__all__ = ["Evaluation", "Measures", "Recall", "Speed", "Suite", "evaluate"]

BUCKETS = 16  # of positions that nll is averaged over
PROMPT = 32  # tokens of text that a sample continues


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured. An empty tuple or a zero leaves a part out.

    Attributes:
        length: tokens of a row, T: that of the distillation.
        tokens: of the data that are read for scores.
        beyond: nll by position goes as far as so many times ``length``, where the model's
            ``max_position_embeddings`` and the data reach.
        distances: at which a needle is asked for; None is 16, 64, 256, ... as far as positions go.
        trials: needles at each distance.
        contexts: tokens before speed and size of the state are taken; None is ``length`` and where
            positions end.
        samples: continuations of held-out text, with a tokenizer.
        new_tokens: of each.
        tasks: of lm-eval, by name.
        task_limit: examples of a task; None is all.
    """

    length: int = 512
    tokens: int = 16_384
    beyond: int = 4
    distances: tuple[int, ...] | None = None
    trials: int = 32
    contexts: tuple[int, ...] | None = None
    samples: int = 3
    new_tokens: int = 48
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None


@dataclass(frozen=True)
class Measures:
    """What one model showed.

    Attributes:
        score: means over rows of ``length`` tokens.
        by_position: nll by the last position of the bucket, as far as ``beyond`` times ``length``.
        recall: by distance.
        speed: by tokens of context.
        samples: continuations of ``Evaluation.prompts``.
        tasks: metrics of lm-eval by task.
    """

    score: Score
    by_position: dict[int, float]
    recall: dict[int, Recall] = field(default_factory=dict)
    speed: dict[int, Speed] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """A model, and its teacher beside it where there is one.

    Attributes:
        model: what was evaluated.
        teacher: the same measures of the teacher.
        zero: nll of the teacher with the attentions that were converted silenced: the floor.
        layer_errors: relative squared error of each mixer on its attention's own input, by path.
        prompts: that the samples continue.
    """

    model: Measures
    teacher: Measures | None = None
    zero: Score | None = None
    layer_errors: dict[str, float] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)

    @property
    def share_closed(self) -> float | None:
        """(nll_zero - nll) / (nll_zero - nll_teacher); None without a teacher or converted layers.

        1 is the teacher, 0 the model that attends to nothing.
        """
        if self.teacher is None or self.zero is None:
            return None
        return share_closed(self.zero, self.teacher.score, self.model.score)


def evaluate(
    model: nn.Module,
    data: Source,
    suite: Suite | None = None,
    *,
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
) -> Evaluation:
    """Measures a language model on text it was not trained on, its teacher beside it.

    Loss and agreement with the teacher, the share of the distance from the zero floor that is
    closed, loss by position beyond the length of training, recall of a needle by its distance,
    tokens a second and bytes of state by context.

    Args:
        model: a transformers causal language model: what ``flacompile.convert`` or ``load``
            returned, or any other.
        data: what ``flacompile.data.read`` reads: text, JSON lines, parquet, tokens.
        suite: default ``Suite()``.
        teacher: the model it was converted from, on the same device; None compares with nothing.
        tokenizer: a transformers tokenizer, for text, samples and tasks.
        out: folder that receives eval.json, eval.md and eval.png; None writes nothing.

    Returns:
        All figures.

    Raises:
        ValueError: the data is too short for the suite, the teacher is not the model's, or a task
            is asked for and lm-eval not installed.
    """
    suite = suite or Suite()
    limit = max(suite.tokens, suite.beyond * suite.length)
    corpus = read(data, tokenizer, DataOptions(limit=limit))[:limit]
    expect(len(corpus) >= suite.length, "data", f"at least {suite.length} tokens", len(corpus))
    corpus = Corpus(corpus.tokens.long().to(next(model.parameters()).device))
    rows = corpus.rows(suite.tokens, suite.length)
    prompts = rows[: suite.samples if tokenizer is not None else 0, :PROMPT]
    zero, errors = None, {}
    if teacher is not None and (layers := swapped(model)):
        _check_teacher(layers, teacher)
        with _silenced(teacher, layers):
            zero = score(teacher, None, rows)
        errors = _layer_errors(layers, teacher, rows[:1])
    evaluation = Evaluation(
        _measure(model, teacher, corpus, suite, tokenizer, prompts),
        None if teacher is None else _measure(teacher, teacher, corpus, suite, tokenizer, prompts),
        zero,
        errors,
        [] if tokenizer is None else [tokenizer.decode(ids) for ids in prompts],
    )
    if out is not None:
        from flacompile.evaluate import page

        page.write(Path(out), evaluation, suite)
    return evaluation


def _measure(
    model: nn.Module,
    teacher: nn.Module | None,
    corpus: Corpus,
    suite: Suite,
    tokenizer: Any,
    prompts: Tensor,
) -> Measures:
    """All measures of one model."""
    end, distances, contexts = _lengths(model, len(corpus), suite)
    rows = corpus.rows(suite.tokens, suite.length)
    return Measures(
        score(model, teacher, rows),
        _buckets(model, corpus.rows(suite.tokens, end)),
        {d: recall(model, needles(corpus.tokens, d, suite.trials)) for d in distances},
        {n: speed(model, n) for n in contexts},
        _samples(model, tokenizer, prompts, suite.new_tokens) if len(prompts) else [],
        run_tasks(model, tokenizer, suite.tasks, suite.task_limit) if suite.tasks else {},
    )


def _lengths(
    model: nn.Module, count: int, suite: Suite
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Tokens of the longest row, distances and contexts, for a model and so many tokens."""
    known = getattr(model.config, "max_position_embeddings", None) or count
    end = min(suite.beyond * suite.length, known, count)
    distances, contexts = suite.distances, suite.contexts
    if distances is None:
        distances = tuple(d for d in (4**i for i in range(2, 12)) if row_length(d) <= end)
    if contexts is None:
        contexts = tuple(sorted({min(n, known - STEPS - WARM) for n in (suite.length, end)}))
    for name, ends in {
        "distances": [row_length(d) for d in distances],
        "contexts": [n + STEPS + WARM for n in contexts],
    }.items():
        longest = max(ends, default=0)
        expect(longest <= known, name, f"rows of at most {known} tokens", longest)
    return end, distances, contexts


def _buckets(model: nn.Module, rows: Tensor) -> dict[int, float]:
    """Mean nll by the last position of BUCKETS equal parts of the row."""
    nll = by_position(model, None, rows)[0]
    ends = torch.arange(1, len(nll) + 1).tensor_split(BUCKETS)
    means = nll.tensor_split(BUCKETS)
    return {int(e[-1]): float(m.mean()) for e, m in zip(ends, means, strict=True) if len(e)}


def _samples(model: Any, tokenizer: Any, prompts: Tensor, new_tokens: int) -> list[str]:
    """Greedy continuations, one row at a time, without their prompts."""
    found = []
    with evaluating(model):
        for ids in prompts[:, None]:
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            found.append(tokenizer.decode(output[0, ids.shape[1] :]))
    return found


def _check_teacher(layers: dict[str, SwappedAttention], teacher: nn.Module) -> None:
    modules = dict(teacher.named_modules())
    gone = next((path for path in layers if path not in modules), None)
    kind = type(teacher).__name__
    expect(gone is None, "teacher", f"the model that was converted, with {gone}", kind)


@contextmanager
def _silenced(teacher: nn.Module, layers: dict[str, SwappedAttention]) -> Iterator[None]:
    """Inside the block the teacher's attentions at these paths add nothing."""

    def hook_for(layer: SwappedAttention) -> Any:
        """The hook on the original of this layer."""

        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            """The result with zeros for y, and the rest of it as its callers expect."""
            nothing = torch.zeros_like(layer.convention.output(result))
            return layer.convention.write(Call(nothing), nothing, None)

        return hook

    handles = [
        teacher.get_submodule(path).register_forward_hook(hook_for(layer))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_errors(
    layers: dict[str, SwappedAttention], teacher: nn.Module, ids: Tensor
) -> dict[str, float]:
    """Each mixer on the input of the attention it replaced, in a pass of the teacher."""
    errors = {}
    with evaluating(teacher):
        calls = record_calls(teacher, set(layers), (ids,), without_cache(teacher, {}))
        for path, layer in layers.items():
            x = layer.convention.read(calls[path].args, calls[path].kwargs).x
            y = layer.convention.output(calls[path].result)
            errors[path] = relative_error(layer.mixer(x)[0], y).item()
    return errors
