"""Tasks of EleutherAI's lm-evaluation-harness, through its own Python API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Sequence[Any], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """The harness's metrics by task.

    Args:
        model: a transformers language model.
        tokenizer: its tokenizer.
        tasks: names, or whatever else ``lm_eval.simple_evaluate`` takes.
        limit: examples of a task; None is all.

    Raises:
        ValueError: lm-eval is not installed, or there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("tokenizer: expected one to run tasks, got None")
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(
            f"tasks: expected lm-eval to run {list(tasks)}, got {error}; "
            "pip install 'flacompile[eval]'"
        ) from error
    wrapped: Any = HFLM(pretrained=model, tokenizer=tokenizer)  # type: ignore[arg-type]
    results: Any = simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    return {
        task: {name: value for name, value in found.items() if isinstance(value, int | float)}
        for task, found in results["results"].items()
    }
