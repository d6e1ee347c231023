"""Every kernel variant compiles for sm_80 and sm_90 and fits them; no GPU is needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What a block may have: on sm_86 and sm_89, for which sm_80 stands, and on sm_90.
SHARED = {80: 99 * 1024, 90: 227 * 1024}

pytestmark = pytest.mark.slow


SPILLS = ("fp32, 256x256", "gk gv, bf16, 256x256", "gk gv, fp16, 256x256")  # slow, known to be
BY_CHUNKS = (
    "states", "join", "linear_attn keys", "linear_attn values", "shared heads",
    "delta_rule", "dplr",
)  # fmt: skip
LARGEST = {  # what is known to spill of those, in bytes of a thread's stack
    "bf16, 128x128": 528,
    "bf16, 256x256": 14656,
    "fp16, 256x256": 10696,
    "fp32, 128x128": 3552,
}


def most_stack(name: str) -> float:
    """Bytes a thread that a variant may spill."""
    if name.startswith(("step", "ternary")):
        return 0
    if name.endswith(SPILLS) or "strong" in name:  # strong decays are rare, and slow anyhow
        return float("inf")
    if name.startswith(BY_CHUNKS):
        return LARGEST[", ".join(name.split(", ")[-2:])]
    return 256 if "fp32" in name else 1024


def missing_tool() -> str | None:
    from triton import knobs

    for tool in ("ptxas", "cuobjdump"):
        if not shutil.which(getattr(knobs.nvidia, tool).path):
            return tool
    return None


def test_every_variant_compiles_and_fits(tmp_path):
    if tool := missing_tool():
        pytest.skip(f"this triton comes without {tool}")
    script = Path(__file__).with_name("compile_kernels.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["arch"] for row in found} == {80, 90}
    for row in found:
        assert row["shared"] <= SHARED[row["arch"]], row
        assert row["stack"] <= most_stack(row["name"]), row


READ = {
    "q", "k", "v", "gk", "gv", "beta", "a", "b", "x", "A", "B", "C", "dt", "rate", "bias", "state",
    "do_", "dy", "dh", "dfinal", "S", "D", "G", "mask",
}  # fmt: skip


def test_compilers_take_no_input_for_written():
    """Bounds of packs they do, which the ops copy for them (``define``)."""
    script = Path(__file__).with_name("written_by_kernels.py")
    env = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) > 25
    for row in found:
        assert row["written"] and not READ & set(row["written"]), row
