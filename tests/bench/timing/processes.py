"""First calls in processes of their own: what a user waits for, and the caches of the timing.

Each process starts with an empty kernel cache. The first forward and backward, at the first shape,
is the cold start; the other shapes follow. What they compiled is then put into the cache that the
timing reads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[1] / "speed.py")]
LARGE = 2**19  # tokens of all processes together: their tensors share a GPU


def alone(arguments: Sequence[str], cache: Path, timeout: float) -> dict[str, Any]:
    """What ``speed.py`` with the arguments prints last, as JSON; or its error's last line."""
    folders = {"TRITON_CACHE_DIR": cache / "triton", "TORCHINDUCTOR_CACHE_DIR": cache / "inductor"}
    environment = os.environ | {name: str(path) for name, path in folders.items()}
    try:
        run = subprocess.run(
            [*COMMAND, *arguments], env=environment, timeout=timeout,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {timeout:.0f} s"}
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["no message"])[-1][:160]}
    return json.loads(run.stdout.splitlines()[-1])


def join(cache: Path, shared: Path) -> None:
    """Copies what a kernel cache has and another lacks; a group of Triton's names files in full.

    What is there stays: a library written over while a process has it loaded ends that process.
    """
    for path in (path for path in cache.rglob("*") if path.is_file()):
        target = shared / path.relative_to(cache)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        shutil.copy2(path, part)
        if path.name.startswith("__grp__"):
            part.write_text(path.read_text().replace(str(cache), str(shared)))
        part.rename(target)


def first_calls(
    names: Sequence[str], arguments: Sequence[str], tokens: int, timeout: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of every row's first calls, as they end; fills this process's caches."""
    import triton
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    begin = time.monotonic()
    jobs = max(1, min(len(os.sched_getaffinity(0)), LARGE // tokens))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def call(name: str) -> dict[str, Any]:
            left = timeout + begin - time.monotonic()
            cache = Path(folder) / name.replace(" ", "-")
            return alone(["--first-call", name, *arguments], cache, max(left, 1.0))

        calls = {pool.submit(call, name): name for name in names}
        for done in as_completed(calls):
            name = calls[done]
            cache = Path(folder) / name.replace(" ", "-")
            join(cache / "triton", Path(triton.knobs.cache.dir))
            join(cache / "inductor", Path(cache_dir()))
            yield name, done.result()
