"""The stress test's own logic, without a GPU: that it lists all breakings, and that correct calls pass it."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "stress.py"
KERNELS = Path(__file__).parents[1] / "csrc" / "cuda"


def listed() -> list[str]:
    return [mutation.name for mutation in runpy.run_path(str(PROGRAM))["MUTATIONS"]]


def test_every_mutation_is_listed() -> None:
    text = (KERNELS / "device" / "stress.cuh").read_text()
    enum = re.search(r"enum class Mutation : int32_t {(.*?)};", text, re.DOTALL)
    assert enum is not None
    assert re.findall(r"^ *(k\w+),", enum[1], re.MULTILINE) == ["kNone", *listed()]


def test_every_mutation_breaks_something() -> None:
    sources = "".join(path.read_text() for path in KERNELS.rglob("*.cu*"))
    broken = re.findall(r"breaks\(\S+, Mutation::(k\w+)\)", sources)
    assert sorted(set(broken)) == sorted(listed())


@pytest.mark.launcher
@pytest.mark.parametrize("ranks", [2, 3])
def test_correct_calls_pass(mpirun: Callable[..., subprocess.CompletedProcess[str]], ranks: int) -> None:
    done = mpirun(ranks, PROGRAM, "--device", "cpu", "--calls", "120")
    assert done.returncode == 0 and "nothing wrong" in done.stdout, done.stdout + done.stderr
