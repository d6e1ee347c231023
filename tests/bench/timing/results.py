"""The figures of one run and where they were taken, written to a file as they come."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PUBLISHED = Path(__file__).resolve().parents[1] / "peer_h100.json"
PACKAGES = ("torch", "triton", "flash-linear-attention", "mamba-ssm")

Key = tuple[str, int, int, int]


def key(row: dict[str, Any]) -> Key:
    """What a row and the peer's have in common."""
    return row["op"], row["B"], row["T"], row["D"]


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a peer's
            continue
    return found


def commit() -> str:
    """Of this checkout; empty where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Results:
    """Parts by name, ``header`` first: where and how; the others are lists of rows."""

    def __init__(self, device: str, path: Path | None, of: str | None) -> None:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        self.path = path
        self.parts: dict[str, Any] = {
            "header": {
                "device": name,
                "commit": of or commit(),
                "date": datetime.date.today().isoformat(),
                "versions": versions(),
                "command": shlex.join(["python", *sys.argv]),
            }
        }

    @property
    def header(self) -> dict[str, Any]:
        return self.parts["header"]

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Appends a row and writes all."""
        self.parts.setdefault(part, []).append(row)
        if self.path is not None:
            self.path.write_text(json.dumps(self.parts, indent=1) + "\n")


def peers(path: Path) -> tuple[str, dict[Key, dict[str, Any]]]:
    """Where the peer's published figures are from, and its rows by key."""
    found = json.loads(path.read_text())
    where = "{device}, {date}, {versions}".format(**found)
    return where, {key(row): row for row in found["rows"]}
