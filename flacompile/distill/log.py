"""What people watch: a bar, JSON lines, and events for TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from flacompile.distill.processes import rank
from flacompile.files import write_atomically

RECENT = 20  # steps that the speed is of


class Log:
    """Tells of the steps of one stage as they are done, in the first of several processes.

    Args:
        path: the JSON lines, one a step, added to.
        stage: its name.
        step: steps that are done.
        total: steps that there will be.
        tokens: of one step.
        events: folder for TensorBoard, or None.
    """

    def __init__(
        self, path: Path, stage: str, step: int, total: int, tokens: int, events: Path | None
    ) -> None:
        from tqdm.auto import tqdm

        self.path, self.stage, self.tokens = path, stage, tokens
        self.speaks = rank() == 0
        self.bar = tqdm(total=total, initial=step, desc=stage, unit="step", disable=not self.speaks)
        self.events: Any = None
        if events and self.speaks:  # those after ``step``, of a run that was killed, are void
            self.events = summary_writer()(events / stage, purge_step=step + 1)
        self.times = deque([time.perf_counter()], maxlen=RECENT + 1)
        self.began = self.ready = self.times[0]

    @property
    def elapsed(self) -> float:
        """Seconds since this process began the stage."""
        return self.times[-1] - self.began

    @property
    def trained(self) -> float:
        """Seconds of the steps after the first, in which much is compiled."""
        return self.times[-1] - self.ready

    @property
    def seconds_per_step(self) -> float:
        """Lately; the first step, in which much is compiled, counts only while it is alone."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)

    def step(self, step: int, total: int, figures: dict[str, float], device: torch.device) -> None:
        """One more step is done, of a total that may have changed; ``figures`` has its loss."""
        if len(self.times) == 2 and self.times[0] == self.began:
            self.times.popleft()
        self.times.append(time.perf_counter())
        if self.ready == self.began:
            self.ready = self.times[-1]
        record = figures | {
            "tokens_per_s": round(self.tokens / self.seconds_per_step, 1),
            "memory_gib": round(memory(device), 3),
            "seconds": round(self.elapsed, 3),
            "eta_s": round((total - step) * self.seconds_per_step, 1),
        }
        if not self.speaks:
            return
        append_json(self.path, {"stage": self.stage, "step": step} | record)
        self.bar.total = total
        self.bar.set_postfix(
            loss=f"{record['loss']:.4f}",
            tokens_per_s=f"{record['tokens_per_s']:.0f}",
            GiB=f"{record['memory_gib']:.1f}",
            refresh=False,
        )
        self.bar.update()
        if self.events is not None:
            for name, value in record.items():
                self.events.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the bar and the events; the file is whole after every step."""
        self.bar.close()
        if self.events is not None:
            self.events.close()


def summary_writer() -> Any:
    """TensorBoard's, a class.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard: expected the package tensorboard, got an environment without it; install "
            "flacompile[tensorboard]"
        ) from error
    return SummaryWriter


def memory(device: torch.device) -> float:
    """The most that was in use so far, GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


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
