"""The bench of speed: what it refuses to time, its floors, and the page made of its figures."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from bench.timing import check, curves, page, processes
from bench.timing.draw import Draw, Size, leaves
from bench.timing.floor import least_bytes, milliseconds_of, work
from bench.timing.measure import timed
from bench.timing.results import PUBLISHED, peers
from bench.timing.rows import rows

SIZE = Size(2, 40, 4, 16)
ROWS = rows(SIZE.heads, SIZE.dim)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch):
    """Runs a script of the bench with its arguments, in this process."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / "tests" / "bench" / script), run_name="__main__")

    return run


def drawn(name: str) -> list[torch.Tensor]:
    return leaves(ROWS[name].draw(Draw(SIZE, "cpu", torch.bfloat16)))


@pytest.mark.parametrize("name", ROWS)
def test_right_rows_are_timed(name, monkeypatch):
    monkeypatch.setattr(check, "TOKENS", 30)
    row = ROWS[name]
    error, equal = check.worst(row.ours, row.loop, drawn(name), SIZE)
    assert error < check.BOUND and equal


@pytest.mark.parametrize("name", ["gla", "mamba", "conv", "mamba2"])
@pytest.mark.parametrize("wrong", range(2))
def test_wrong_values_and_gradients_are_noticed(name, wrong):
    """An output that is off, and a gradient alone."""

    def off(*tensors):
        o = ROWS[name].ours(*tensors)[0]
        first = tensors[0].sum(dtype=o.dtype)
        return (1.05 * o if wrong else o + 0.5 * (first - first.detach()),)

    assert not check.worst(off, ROWS[name].loop, drawn(name), SIZE)[0] < check.BOUND


def test_floors():
    """q, k, v and o of one size, by the equation: 4 and 11 of them; k v^T and q S."""
    tensors = drawn("linear_attn")
    one = 2 * SIZE.batch * SIZE.time * SIZE.heads * SIZE.dim
    assert least_bytes(tensors, tensors[0]) == (4 * one, 11 * one)
    found = work(ROWS["linear_attn"].ours, tensors)
    assert found == {"bytes": 4 * one, "bytes both": 11 * one, "flops": 2 * one * SIZE.dim}
    assert milliseconds_of(3 * 10**9, 3.0) == 1.0


@pytest.mark.parametrize(
    ("times", "at"),
    [
        ({1: 2.0, 2: 2.0, 4: 2.0}, 2.0),
        ({1: 0.5, 2: 0.5}, 1.0),  # from the first on
        ({1: 3.0, 2: 6.0}, None),
        ({1: 0.5, 2: 4.0, 4: 2.0}, 2 * 2**0.5),  # twice: the last
    ],
)
def test_crossing(times, at):
    found = curves.crossing(times, {1: 1.0, 2: 2.0, 4: 4.0, 8: 1.0})
    assert found == at or abs(found - at) < 1e-9


def row(op: str, batch: int, time: int, ms: float, **more: object) -> dict[str, object]:
    names = ("forward", "both", "forward kernels", "both kernels", "MiB", "floor", "floor both")
    figures = dict.fromkeys(names, ms)
    row = {"op": op, "kind": "ours", "B": batch, "T": time, "D": 128, "error": 1e-3, "flops": 1}
    return row | figures | {"matmul": 800.0} | more


def test_page_of_figures(tmp_path, command):
    """One file's rows replace another's; what no file has stays; errors stand in their cells."""
    header = {"device": "GPU", "commit": "c0ffee", "date": "2026-01-01", "command": "speed.py",
              "versions": {"torch": "2.11"}, "copy TB/s": 3.0, "matmul TFLOP/s": 800.0}  # fmt: skip
    first = [row("gla", 8, 2048, 3.0), row("softmax", 8, 2048, 2.0), row("kda", 8, 2048, 1.0)]
    second = [
        row("gla", 8, 2048, 0.817),
        row("gla", 4, 4096, 0.8),
        row("softmax", 4, 4096, 4.0),
        row("kda", 8, 2048, 1.0, **{"both kernels": "RuntimeError"}),
        {"op": "abc", "kind": "ours", "B": 8, "T": 2048, "D": 128, "wrong": "3.0e-01: not timed"},
    ]
    for name, rows_ in (("a", first), ("b", second)):
        (tmp_path / name).write_text(json.dumps({"header": header, "speed": rows_}))
    target = tmp_path / "performance.md"
    names = re.findall("<!-- (?!end)(.*) -->", (ROOT / "docs" / "performance.md").read_text())
    target.write_text("".join(f"<!-- {n} -->\nNot measured\n<!-- end -->\n" for n in names))
    files = [str(tmp_path / "a"), str(tmp_path / "b")]
    command("report.py", *files, "--page", str(target), "--plots", str(tmp_path / "img"))
    text = target.read_text()
    assert "| gla | 8 x 2048 | 1.0e-03 | 0.817 | 0.817 | 1.0 |" in text
    assert "| 1.0, 4.3, 1958.4 |" in text and "| RuntimeError |  |  |  | 1 |" in text
    assert "| abc | 8 x 2048 | 3.0e-01: not timed |" in text and "commit c0ffee" in text
    assert "| gla | 0.817 | 0.800 | 2048 or less |" in text
    assert text.count("Not measured") == 3  # first calls, one token, CPU
    pictures = {path.name for path in (tmp_path / "img").iterdir()}
    assert pictures == {"over_floor.svg", "against_time.svg"}


def test_page_without_a_place():
    with pytest.raises(ValueError, match="page: expected <!-- speed -->"):
        page.filled("no markers", {"speed": "text"})


def test_published_times_have_rows():
    where, published = peers(PUBLISHED)
    assert "H100" in where and {op for op, *_ in published} <= set(ROWS)


def test_kernel_caches_are_joined(tmp_path):
    """Triton finds the files of a group by their whole paths."""
    cache, shared = tmp_path / "own", tmp_path / "shared"
    (cache / "HASH").mkdir(parents=True)
    paths = {"k.cubin": str(cache / "HASH" / "k.cubin")}
    (cache / "HASH" / "k.cubin").write_text("code")
    (cache / "HASH" / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    processes.join(cache, shared)
    group = json.loads((shared / "HASH" / "__grp__k.json").read_text())
    assert Path(group["child_paths"]["k.cubin"]).read_text() == "code"
    assert Path(group["child_paths"]["k.cubin"]).is_relative_to(shared)


def test_a_kernel_that_is_there_is_not_written_over(tmp_path):
    """A process may have it loaded."""
    for name, text in (("own", "new"), ("shared", "loaded")):
        (tmp_path / name / "HASH").mkdir(parents=True)
        (tmp_path / name / "HASH" / "launcher.so").write_text(text)
    loaded = tmp_path / "shared" / "HASH" / "launcher.so"
    before = loaded.stat().st_ino
    processes.join(tmp_path / "own", tmp_path / "shared")
    assert (loaded.read_text(), loaded.stat().st_ino) == ("loaded", before)


def test_table_of_a_cpu(tmp_path, command):
    size = ("--shape", "1,20", "--heads", "1", "--dim", "4")
    command("speed.py", "--device", "cpu", "--op", "hgrn", *size, "--json", str(tmp_path / "found"))
    (found,) = json.loads((tmp_path / "found").read_text())["cpu"]
    assert found["error"] < 1e-4 and found["ms"] > 0 and found["loop ms"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["simple_gla", "hgrn"])
def test_row_of_a_gpu(name):
    """Every time is there: no graph is forbidden."""
    found = timed(name, "ours", Size(1, 200, 2, 64), 3.0)
    assert "wrong" not in found and curves.has_kernels(found)
