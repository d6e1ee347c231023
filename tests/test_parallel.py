"""Tensor and context parallelism: two processes against one."""

from __future__ import annotations

import parallel_checks
import pytest


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return parallel_checks.run(tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("name", parallel_checks.CHECKS)
def test_two_processes(name, failures):
    assert not failures[name], failures[name]
