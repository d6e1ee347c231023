"""What a distillation writes as it goes: its checkpoint, whole or not there, and its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from flacompile.files import write_atomically

PARTS = {"progress", "tokens", "recipe", "model", "optimizer"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values as a torch file."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load(path: Path) -> dict[str, Any]:
    """Reads what ``save`` wrote.

    Raises:
        ValueError: the file is not a checkpoint of this package; it is left as it is.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports a broken file by half a dozen types
        raise ValueError(
            f"checkpoint: expected a file written by flacompile.distill, got {path}, which does "
            f"not load ({type(error).__name__}: {str(error)[:200]}); move it away to start anew"
        ) from error
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ValueError(
            f"checkpoint: expected a file written by flacompile.distill, got {path}; move it away "
            "to start anew"
        )
    return state


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Adds one line to a JSON-lines log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; a line cut off by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Puts the records in the place of the log."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
