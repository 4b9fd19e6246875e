"""Ranks that fail while others wait: `PeerTimeoutError` names them in time, and what comes after is as documented.

Each test starts `tests/programs/faults.py` under mpirun itself: a rank that is stopped or killed must not be one of
pytest's.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import pytest
from support import ON_CUDA, cpu_runtime_only, needs_nodes

pytestmark = pytest.mark.launcher

PROGRAM = Path(__file__).parent / "programs" / "faults.py"
RANKS, VICTIM, TIMEOUT = 3, 1, 3.0
SURVIVORS = [0, 2]
LATE = TIMEOUT + 5.0  # seconds: the machine may be busy

Seen = dict[int, dict[str, Any]]
Run = Callable[..., Seen]


@pytest.fixture
def run(
    mpirun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """`run(scenario, value)`: what each rank wrote."""

    def start(scenario: str, value: str = "silent", killed: bool = False) -> Seen:
        if killed:
            if launch.find_launcher().kind != "openmpi":
                pytest.skip("only Open MPI's launcher is known to let a job go on without a dead rank")
            monkeypatch.setenv("MPIEXEC_FLAGS", "--oversubscribe --bind-to none --continuous")
        done = mpirun(RANKS, PROGRAM, scenario, tmp_path, value, limit=60)
        files = {rank: tmp_path / f"{rank}.json" for rank in range(RANKS)}
        missing = [rank for rank in SURVIVORS if not files[rank].exists()]
        assert not missing, f"rank(s) {missing} saw nothing; exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}

    return start


def check_lost(seen: Seen, operations: dict[str, str]) -> None:
    """Every survivor's view of each call: the error, later calls, and destruction."""
    for rank in SURVIVORS:
        assert sorted(seen[rank]) == sorted(operations)
        for name, operation in operations.items():
            results = seen[rank][name]
            call = results["call"]
            assert call["error"] == "PeerTimeoutError", call
            assert call["peers"] == [VICTIM] and call["rank"] == rank and call["operation"] == operation, call
            for part in (operation, f"rank {rank}", f"rank {VICTIM}", f"{TIMEOUT:g} s"):
                assert part in call["text"]
            assert TIMEOUT * 0.9 <= call["seconds"] < LATE
            for later in results["later"].values():
                assert later["error"] == "UnavailableError" and later["seconds"] < 1, later
            assert results["destroy"]["error"] == "" and results["destroy"]["seconds"] < LATE
            assert results["again"]["error"] == "" and results["again"]["seconds"] < 1


@pytest.mark.parametrize("ranks_per_node", ["", pytest.param("1", marks=needs_nodes)])
def test_a_rank_that_never_calls_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, ranks_per_node: str) -> None:
    if ranks_per_node:
        monkeypatch.setenv("RANKS_PER_NODE", ranks_per_node)
    operations = {"dispatch": "dispatch", "cached_dispatch": "dispatch", "combine": "combine"}
    if not ON_CUDA:
        operations |= {
            "low_latency_dispatch": "low_latency_dispatch",
            "low_latency_combine": "low_latency_combine",
            "recv_hook": "low_latency_dispatch",
            "clean_low_latency_buffer": "clean_low_latency_buffer",
        }
    check_lost(run("lost_in_calls", "silent:" + ",".join(operations)), operations)


@pytest.mark.parametrize("call", ["dispatch", pytest.param("low_latency_combine", marks=cpu_runtime_only)])
def test_a_stopped_rank_is_named(run: Run, call: str) -> None:
    check_lost(run("lost_in_calls", f"stopped:{call}"), {call: call})


@pytest.mark.parametrize("call", ["combine", pytest.param("low_latency_dispatch", marks=cpu_runtime_only)])
def test_a_dead_rank_is_named(run: Run, call: str) -> None:
    check_lost(run("lost_in_calls", f"killed:{call}", killed=True), {call: call})


@pytest.mark.parametrize("how", ["silent", "stopped"])
def test_a_lost_rank_is_masked_and_comes_back(run: Run, how: str) -> None:
    seen = run("shrink", how)
    everyone = [float(16 * rank + token) for rank in range(RANKS) for token in range(4)]
    without = [value for value in everyone if not 16 * VICTIM <= value < 16 * (VICTIM + 1)]
    for rank in SURVIVORS:
        first, second = seen[rank]["first"], seen[rank]["second"]
        assert TIMEOUT * 0.9 <= first["seconds"] < LATE
        assert second["seconds"] < TIMEOUT
        for exchange in (first, second):
            assert exchange["mask"] == [0, 1, 0]
            assert exchange["rows"] == [4, 0, 4]
            assert exchange["values"] == without
            assert exchange["times"] == [RANKS - 1]
        assert seen[rank]["normal"]["error"] == "UnavailableError"
    for rank in range(RANKS):
        assert seen[rank]["clean"]["error"] == "", seen[rank]["clean"]
        for exchange in (seen[rank]["before"], seen[rank]["after"]):
            assert exchange["mask"] == [0, 0, 0]
            assert exchange["rows"] == [4, 4, 4]
            assert exchange["values"] == everyone
            assert exchange["times"] == [RANKS]
        assert seen[rank]["destroy"]["error"] == "" and seen[rank]["destroy"]["seconds"] < LATE


def test_a_rank_that_never_constructs(run: Run) -> None:
    seen = run("absent_in_construction")
    for rank in SURVIVORS:
        construct = seen[rank]["construct"]
        assert construct["error"] in ("BootstrapError", "PeerTimeoutError"), construct
        assert TIMEOUT * 0.9 <= construct["seconds"] < LATE


def test_a_rank_that_never_destroys(run: Run) -> None:
    seen = run("absent_in_destroy")
    for rank in SURVIVORS:
        assert seen[rank]["destroy"]["error"] == "" and seen[rank]["destroy"]["seconds"] < LATE
        assert seen[rank]["again"]["error"] == "" and seen[rank]["again"]["seconds"] < 1
        assert len(seen[rank]["warnings"]) == 1


def test_a_buffer_that_is_dropped_warns_and_waits_for_nobody(run: Run) -> None:
    seen = run("dropped")
    assert sorted(seen) == list(range(RANKS))
    for results in seen.values():
        assert results["destroyed"] == []
        assert len(results["dropped"]) == 1 and "destroy" in results["dropped"][0]
        assert results["seconds"] < 1
        assert results["works"]
