"""What several files of tests share.

Kernels run compiled where there is a CUDA device, and in the Triton interpreter elsewhere.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Read when MKL starts: else its sums depend on where in memory a tensor lies, on some processors.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any import of them


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and its kin give NaN, so that an output nobody wrote is seen."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def cpp(tmp_path_factory):
    """The folder of the programs of ``runner/``: ``generate`` and ``check``."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    assert cmake, "the tests of runner/ need cmake, which the extra test brings"
    build = tmp_path_factory.mktemp("runner")
    flags = ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O0", "-DCMAKE_UNITY_BUILD=ON"]
    flags += [f"-DCMAKE_PREFIX_PATH={torch.__path__[0]}"]
    for command in (
        [cmake, "-S", str(Path(__file__).parents[1] / "runner"), "-B", str(build), *flags],
        [cmake, "--build", str(build)],
    ):
        subprocess.run(command, capture_output=True, text=True, check=True)
    return build


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A ``packages.Exported``; tests that share it are of the group "export"."""
    from packages import exported

    return exported(tmp_path_factory.mktemp("package"))


@pytest.fixture
def package(exported):
    return exported.path
