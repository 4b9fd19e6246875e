"""`hpc_moe doctor`: its findings one by one, its text and JSON, alone and under mpirun, and that it never hangs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_moe import nvshmem_env
from hpc_moe._version import __version__
from hpc_moe.cli import doctor, main

GIB = 2**30


def healthy(rank: int = 0, size: int = 1, **changes: Any) -> doctor.Facts:
    """The facts of a rank on which nothing is wrong."""
    plan = nvshmem_env.plan(environ={}, fabric=nvshmem_env.Fabric())
    facts: doctor.Facts = {
        "rank": rank,
        "size": size,
        "launcher_size": size,
        "host": "n01",
        "machine": "boot-1",
        "root": False,
        "root_allowed": False,
        "cores": list(range(8)),
        "cpu_limit": None,
        "omp_num_threads": "",
        "shm_free": 8 * GIB,
        "versions": {
            "hpc_moe": "1",
            "python": "3.11.7",
            "torch": "2.9",
            "numpy": "2.4",
            "mpi4py": "4.1",
            "mpi": "Open MPI v5",
        },
        "mpi_error": "",
        "cpu": True,
        "cpu_error": "",
        "cuda": False,
        "cuda_archs": [],
        "gpu_driver": [],
        "gpus": [],
        "nvshmem_built": "",
        "nvshmem_installed": "",
        "nvshmem": {
            "fabric": {},
            "settings": [],
            "warnings": [],
            "encoded": plan.encode().hex(),
            "table": nvshmem_env.render(plan, 90),
            "error": "",
        },
    }
    return {**copy.deepcopy(facts), **changes}


def gpus(*capabilities: str) -> list[doctor.Facts]:
    return [
        {"index": str(i), "uuid": f"GPU-{i}", "capability": capability, "name": "NVIDIA H200"}
        for i, capability in enumerate(capabilities)
    ]


def with_cuda(rank: int = 0, size: int = 1, **changes: Any) -> doctor.Facts:
    """A rank whose build has the CUDA backend, on a machine with four GPUs."""
    cuda = {"cuda": True, "cuda_archs": ["80", "90"], "gpu_driver": ["NVRM version: ..."], "gpus": gpus(*["9.0"] * 4)}
    return healthy(rank, size, **{**cuda, **changes})


def only_finding(*ranks: doctor.Facts, missing: tuple[int, ...] = ()) -> doctor.Finding:
    findings = doctor.find_problems(ranks, missing)
    assert len(findings) == 1, findings
    assert findings[0].remedy
    return findings[0]


# --- findings --------------------------------------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert doctor.find_problems([healthy()]) == []
    assert doctor.find_problems([healthy(rank, 4) for rank in range(4)]) == []


@pytest.mark.parametrize("package", ["torch", "numpy", "mpi4py"])
def test_a_missing_package_is_a_problem(package: str) -> None:
    facts = healthy()
    facts["versions"][package] = ""
    found = only_finding(facts)
    assert found.severity == "problem" and package in found.what


def test_an_mpi_that_does_not_load_is_a_problem() -> None:
    found = only_finding(healthy(mpi_error="cannot load MPI library"))
    assert found.severity == "problem" and "cannot load MPI library" in found.what and "MPI4PY_LIBMPI" in found.remedy


def test_an_unbuilt_extension_is_a_problem() -> None:
    found = only_finding(healthy(cpu=False, cpu_error="No module named 'hpc_moe._C'"))
    assert found.severity == "problem" and "_C" in found.what and "pip install" in found.remedy


def test_a_launcher_of_another_mpi_is_a_problem() -> None:
    found = only_finding(healthy(launcher_size=4))
    assert found.severity == "problem" and "started 4 processes" in found.what and "--mpi=pmix" in found.remedy


def test_a_small_shared_memory_is_a_problem() -> None:
    found = only_finding(*[healthy(rank, 2, shm_free=64 * 2**20) for rank in range(2)])
    assert found.severity == "problem" and "/dev/shm of n01 has 64 MiB" in found.what and "--shm-size" in found.remedy


def test_root_without_permission_is_a_note_and_only_outside_of_mpirun() -> None:
    assert only_finding(healthy(root=True, launcher_size=0)).severity == "note"
    assert doctor.find_problems([healthy(root=True, launcher_size=0, root_allowed=True)]) == []
    assert doctor.find_problems([healthy(root=True, launcher_size=1)]) == []


def test_a_limit_on_cpu_time_is_a_note() -> None:
    found = only_finding(healthy(cpu_limit=1.5))
    assert found.severity == "note" and "1.5 cores" in found.what and "8 cores" in found.what
    assert doctor.find_problems([healthy(cpu_limit=8.0)]) == []


def test_more_ranks_than_cores_is_a_note() -> None:
    found = only_finding(*[healthy(rank, 4, cores=[0, 1]) for rank in range(4)])
    assert found.severity == "note" and "4 ranks share 2 cores" in found.what


def test_more_threads_than_cores_is_a_note() -> None:
    found = only_finding(*[healthy(rank, 2, omp_num_threads="8") for rank in range(2)])
    assert found.severity == "note" and "16 OpenMP threads" in found.what and "OMP_NUM_THREADS=4" in found.remedy


def test_ranks_bound_to_their_own_cores_are_fine() -> None:
    ranks = [healthy(rank, 2, cores=[2 * rank, 2 * rank + 1], omp_num_threads="2") for rank in range(2)]
    assert doctor.find_problems(ranks) == []


def test_different_versions_are_a_problem() -> None:
    ranks = [healthy(rank, 4) for rank in range(4)]
    ranks[3]["versions"]["torch"] = "2.8"
    found = only_finding(*ranks)
    assert found.severity == "problem" and "2.9 on rank 0-2, 2.8 on rank 3" in found.what


def test_different_nvshmem_environments_are_a_problem() -> None:
    ranks = [healthy(rank, 2) for rank in range(2)]
    other = nvshmem_env.plan(environ={"NVSHMEM_QP_DEPTH": "2048"}, fabric=nvshmem_env.Fabric())
    ranks[1]["nvshmem"]["encoded"] = other.encode().hex()
    found = only_finding(*ranks)
    assert found.severity == "problem" and "NVSHMEM_QP_DEPTH" in found.what


def test_a_malformed_nvshmem_variable_is_a_problem() -> None:
    facts = healthy()
    facts["nvshmem"].update(error="NVSHMEM_QP_DEPTH must be an integer; got 'x'", encoded="", table="")
    assert "NVSHMEM_QP_DEPTH" in only_finding(facts).what
    assert "NVSHMEM_QP_DEPTH" in doctor.render(doctor.build_report([facts]), "")


def test_uneven_nodes_are_a_problem() -> None:
    ranks = [healthy(rank, 3, machine=f"boot-{rank // 2}", host=f"n0{rank // 2}") for rank in range(3)]
    found = only_finding(*ranks)
    assert found.severity == "problem" and "2 on n00, 1 on n01" in found.what


def test_a_missing_rank_is_a_problem() -> None:
    found = only_finding(healthy(0, 3), healthy(1, 3), missing=(2,))
    assert found.severity == "problem" and "rank 2" in found.what


@pytest.mark.parametrize("facts", [{"gpu_driver": ["NVRM version: ..."]}, {"gpus": gpus("9.0")}])
def test_a_gpu_without_its_backend_is_a_note(facts: dict[str, Any]) -> None:
    found = only_finding(healthy(**facts))
    assert found.severity == "note" and "only the CPU backend" in found.what and "HPC_MOE_CUDA=1" in found.remedy


def test_nothing_is_wrong_with_gpus_and_their_backend() -> None:
    assert doctor.find_problems([with_cuda(rank, 4) for rank in range(4)]) == []
    assert doctor.find_problems([with_cuda(gpus=gpus("8.6", "8.9"))]) == []
    assert doctor.find_problems([with_cuda(gpus=[])]) == []  # a login node


@pytest.mark.parametrize(("capability", "remedy"), [("10.3", "HPC_MOE_CUDA_ARCHS=100"), ("7.5", 'device="cpu"')])
def test_a_gpu_that_was_not_built_for_is_a_problem(capability: str, remedy: str) -> None:
    found = only_finding(with_cuda(gpus=gpus("9.0", capability)))
    assert found.severity == "problem" and f"capability {capability}" in found.what and "sm_80, sm_90" in found.what
    assert remedy in found.remedy


def test_a_torch_without_cuda_is_a_problem_where_there_are_gpus() -> None:
    facts = with_cuda()
    facts["versions"]["torch"] = "2.13.0+cpu"
    found = only_finding(facts)
    assert found.severity == "problem" and "2.13.0+cpu is a build for CPUs" in found.what
    assert doctor.find_problems([{**facts, "gpus": []}]) == []


def test_fewer_gpus_than_ranks_are_a_note() -> None:
    found = only_finding(*[with_cuda(rank, 5) for rank in range(5)])
    assert found.severity == "note" and "5 ranks on n01 have 4 GPUs" in found.what
    bound = [with_cuda(rank, 4, gpus=gpus(*["9.0"] * 4)[rank : rank + 1]) for rank in range(4)]
    assert doctor.find_problems(bound) == []  # each sees its own only


def test_gpus_are_listed_once_for_each_host() -> None:
    ranks = [with_cuda(rank, 4, machine=f"boot-{rank // 2}", host=f"n{rank // 2}") for rank in range(4)]
    ranks[3]["nvshmem_built"] = "2.0.0"  # rank 0's counts
    ranks[0].update(nvshmem_built="3.4.5", nvshmem_installed="3.6.0")
    report = doctor.build_report(ranks)
    assert {host: len(some) for host, some in report["gpus"].items()} == {"n0": 4, "n1": 4}
    text = doctor.render(report, "table")
    assert "n1  4 x NVIDIA H200 (compute capability 9.0)" in text and "yes, for sm_80, sm_90" in text
    assert "built with 3.4.5, installed here 3.6.0" in text


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (
            "echo '0, GPU-1, 9.0, NVIDIA H200'; echo '1, GPU-2, 9.0, NVIDIA H200, odd'",
            ["NVIDIA H200", "NVIDIA H200, odd"],
        ),
        ("echo 'No devices were found'; exit 6", []),
        ("echo 'No devices were found'", []),
        (":", []),
    ],
)
def test_what_nvidia_smi_says(script: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [gpu["name"] for gpu in doctor._gpus()] == found
    monkeypatch.setenv("PATH", "")
    assert doctor._gpus() == []


# --- the report ------------------------------------------------------------------------------------------------------


def test_nodes_are_numbered_by_their_lowest_rank() -> None:
    ranks = [healthy(rank, 4, machine=f"boot-{1 - rank % 2}") for rank in range(4)]
    report = doctor.build_report(ranks)
    assert [(one["node"], one["local_rank"]) for one in report["ranks"]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert report["num_nodes"] == 2


def test_threads_are_a_share_of_the_cores_unless_set() -> None:
    shared = doctor.build_report([healthy(rank, 4) for rank in range(4)])
    assert [one["threads"] for one in shared["ranks"]] == [2] * 4
    wish = doctor.build_report([healthy(rank, 4, omp_num_threads="3,2") for rank in range(4)])
    assert [one["threads"] for one in wish["ranks"]] == [3] * 4


@pytest.mark.parametrize("width", [60, 100, 140])
def test_the_text_fits_and_has_colour_only_when_asked(width: int) -> None:
    report = doctor.build_report([healthy(rank, 4, cores=[0, 1], shm_free=2**20) for rank in range(4)])
    plain = doctor.render(report, "table", width=width)
    assert "\033" not in plain
    assert max(map(len, plain.splitlines())) <= max(width, 82)
    painted = doctor.render(report, "table", colour=True, width=width)
    assert "\033[31mproblem:\033[0m" in painted
    for code in ("0", "1", "31", "32", "33"):
        painted = painted.replace(f"\033[{code}m", "")
    assert painted == plain


def test_the_text_says_that_nothing_is_wrong() -> None:
    assert "nothing is wrong" in doctor.render(doctor.build_report([healthy()]), "table")


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([1, 3, 4], "1,3-4")])
def test_ranges_of_cores(numbers: list[int], text: str) -> None:
    assert doctor._ranges(numbers) == text


# --- control groups --------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"own": "0::/job/step\n", "job/cpu.max": "max 100000\n"}, None),
        ({"own": "0::/job/step\n", "job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4.0),
        ({"own": "0::/job/step\n", "job/cpu.max": "400000 100000\n", "job/step/cpu.max": "150000 100000\n"}, 1.5),
        ({"own": "0::/\n", "cpu.max": "200000 100000\n"}, 2.0),
        ({"own": "2:cpu,cpuacct:/a\n", "cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ({"own": "2:cpu,cpuacct:/a\n", "cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ({"own": "3:cpuset:/a\n", "cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, files: dict[str, str], limit: float | None) -> None:
    write(tmp_path, files)
    assert doctor._cpu_limit(str(tmp_path), str(tmp_path / "own")) == limit


# --- the command -----------------------------------------------------------------------------------------------------


def doctor_alone(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, with no MPI launcher above it."""
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMPI_COMM", "PMIX", "PMI_", "SLURM"))
    }
    env = {key: value for key, value in env.items() if not key.startswith("NVSHMEM_")}
    line = [sys.executable, "-m", "hpc_moe.cli", "doctor", *arguments]
    return subprocess.run(line, env={**env, **environment}, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.launcher
def test_alone_it_reports_this_machine() -> None:
    done = doctor_alone()
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (f"hpc_moe  {__version__}", "1 rank on 1 node", "cpu      yes", "NVSHMEM_MAX_TEAMS", "Findings"):
        assert part in done.stdout
    assert "\033" not in done.stdout


@pytest.mark.launcher
def test_json_shows_the_plan_for_the_given_arguments() -> None:
    done = doctor_alone(
        *("--json", "--low-latency-mode", "--no-nvlink-for-low-latency-mode", "--num-qps-per-rank", "5"),
        "--allow-mnnvl",
        NVSHMEM_QP_DEPTH="4096",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    values = {setting["name"]: (setting["value"], setting["source"]) for setting in report["nvshmem"]["settings"]}
    assert values["NVSHMEM_DISABLE_P2P"] == ("1", "library")
    assert values["NVSHMEM_IBGDA_NUM_RC_PER_PE"] == ("5", "library")
    assert values["NVSHMEM_DISABLE_MNNVL"] == ("0", "library")
    assert values["NVSHMEM_QP_DEPTH"] == ("4096", "user")
    assert report["usable"] is True and report["versions"]["hpc_moe"] == __version__


@pytest.mark.launcher
def test_a_problem_gives_exit_status_1() -> None:
    done = doctor_alone(NVSHMEM_QP_DEPTH="deep")
    assert done.returncode == 1
    assert "NVSHMEM_QP_DEPTH must be an integer; got 'deep'" in " ".join(done.stdout.split())


@pytest.mark.launcher
def test_a_launcher_of_another_mpi_prints_once() -> None:
    first, second = (doctor_alone(PMI_SIZE="2", PMI_RANK=rank) for rank in "01")
    assert first.returncode == second.returncode == 1
    assert "MPI sees 1" in " ".join(first.stdout.split())
    assert second.stdout == ""


@pytest.mark.launcher
def test_under_mpirun_rank_0_reports_all_ranks(mpirun: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = mpirun(3, "-m", "hpc_moe.cli", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [one["rank"] for one in report["ranks"]] == [0, 1, 2]
    assert (report["num_ranks"], report["num_nodes"], report["missing_ranks"]) == (3, 1, [])


SLEEPER = """
import sys, time
from mpi4py import MPI
from hpc_moe.cli import main
if MPI.COMM_WORLD.rank == {rank}:
    time.sleep(60)
sys.exit(main(["doctor", "--json", "--timeout", "1"]))
"""


@pytest.mark.launcher
def test_a_rank_that_never_answers_is_named(
    tmp_path: Path, mpirun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "program.py").write_text(SLEEPER.format(rank=1))
    done = mpirun(3, tmp_path / "program.py", limit=50)
    assert done.returncode not in (0, 124)
    report = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert report["missing_ranks"] == [1] and not report["usable"]
    assert "rank 1" in report["findings"][0]["what"]


@pytest.mark.launcher
def test_ranks_do_not_wait_for_rank_0_for_ever(
    tmp_path: Path, mpirun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "program.py").write_text(SLEEPER.format(rank=0))
    done = mpirun(2, tmp_path / "program.py", limit=50)
    assert done.returncode not in (0, 124)
    assert "rank 1 got no answer from rank 0" in done.stderr


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in ((["--help"], "doctor"), (["doctor", "--help"], "--json"), (["--version"], __version__)):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        assert part in capsys.readouterr().out


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
