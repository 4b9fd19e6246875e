"""How the CUDA backend is chosen at build time (tools/cuda_build.py), and what the extension here was built as."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest
from cuda_build import BuildError, NoCudaError

from hpc_moe import _C

ALL_CODES = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


def tool(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def nvcc(folder: Path, version: str = "13.0", codes: str = ALL_CODES) -> str:
    """A stand-in for nvcc in this folder: it answers the two questions that are asked of it."""
    answers = f'case $1 in --version) echo "release {version}, V{version}.1";; --list-gpu-code) echo "{codes}";; esac'
    return tool(folder / "nvcc", answers)


@pytest.fixture(autouse=True)
def only_the_tests_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No nvcc, GPU or NVSHMEM but those that a test makes."""
    monkeypatch.setattr(cuda_build, "DEFAULT_CUDA_BIN", str(tmp_path / "usr"))
    monkeypatch.setattr(cuda_build, "package_folders", lambda: [str(tmp_path / "packages")])


# --- which architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", ()),
        ("90", ("90",)),
        ("80;90;100", ("80", "90", "100")),
        ("100,80", ("80", "100")),
        ("sm_90 sm_80", ("80", "90")),
        ("9.0, 10.0;", ("90", "100")),
        ("90;90", ("90",)),
    ],
)
def test_architectures_are_read_in_every_way_of_writing_them(text: str, archs: tuple[str, ...]) -> None:
    assert cuda_build.parse_archs(text) == archs


@pytest.mark.parametrize(
    ("text", "hint"),
    [("86", "code for 80 runs on 86"), ("sm_90a", "80;90"), ("12.0", "80;90"), ("fast", "80;90"), ("9", "80;90")],
)
def test_other_architectures_are_an_error_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(BuildError) as caught:
        cuda_build.parse_archs(text)
    assert repr(text) in caught.value.problem and hint in caught.value.remedy


@pytest.mark.parametrize(
    ("capability", "arch"),
    [("8.0", "80"), ("8.9", "80"), ("9.0", "90"), ("10.3", "100"), ("7.5", None), ("12.0", None)],
)
def test_the_architecture_of_a_gpu(capability: str, arch: str | None) -> None:
    assert cuda_build.arch_of(capability) == arch


def test_the_default_is_what_the_gpus_are() -> None:
    assert cuda_build.default_archs(["9.0"] * 4) == (("90",), [])
    assert cuda_build.default_archs(["10.0", "8.6"]) == (("80", "100"), [])
    assert cuda_build.default_archs([]) == (("80", "90", "100"), [])
    archs, notes = cuda_build.default_archs(["7.5"])
    assert archs == ("80", "90", "100") and "7.5" in notes[0]


@pytest.mark.parametrize(
    ("script", "capabilities"),
    [("echo 9.0; echo 9.0", ["9.0", "9.0"]), ("echo No devices were found", []), ("echo 9.0; exit 9", []), ("", [])],
)
def test_gpus_are_those_that_nvidia_smi_tells(script: str, capabilities: list[str], tmp_path: Path) -> None:
    tool(tmp_path / "nvidia-smi", script)
    assert cuda_build.gpu_capabilities({"PATH": str(tmp_path)}) == capabilities
    assert cuda_build.gpu_capabilities({"PATH": "/nowhere"}) == []


# --- which nvcc ------------------------------------------------------------------------------------------------------


def test_nvcc_is_looked_for_in_order(tmp_path: Path) -> None:
    environ = {"CUDACXX": str(tmp_path / "own" / "nvcc"), "CUDA_HOME": str(tmp_path / "home")}
    environ["PATH"] = str(tmp_path / "path")
    nvcc(tmp_path / "usr")
    assert cuda_build.find_nvcc(environ | {"CUDACXX": ""}) == str(tmp_path / "usr" / "nvcc")
    nvcc(tmp_path / "path")
    assert cuda_build.find_nvcc(environ | {"CUDACXX": ""}) == str(tmp_path / "path" / "nvcc")
    nvcc(tmp_path / "home" / "bin")
    assert cuda_build.find_nvcc(environ | {"CUDACXX": ""}) == str(tmp_path / "home" / "bin" / "nvcc")
    nvcc(tmp_path / "own")
    assert cuda_build.find_nvcc(environ) == str(tmp_path / "own" / "nvcc")
    assert cuda_build.find_nvcc(environ | {"CUDACXX": "nvcc"}) == str(tmp_path / "path" / "nvcc")


def test_a_wrong_cudacxx_is_an_error_even_where_cuda_is_no_must(tmp_path: Path) -> None:
    nvcc(tmp_path)
    with pytest.raises(BuildError, match="CUDACXX=/nowhere/nvcc is not an executable"):
        cuda_build.plan({"CUDACXX": "/nowhere/nvcc", "PATH": str(tmp_path)})


# --- the plan --------------------------------------------------------------------------------------------------------


def test_cuda_is_built_where_there_is_nvcc(tmp_path: Path) -> None:
    path = nvcc(tmp_path)
    plan = cuda_build.plan({"PATH": str(tmp_path)})
    assert plan == cuda_build.Plan(("80", "90", "100"), path)
    assert plan.cmake_args()[0] == "-DHPC_MOE_CUDA_ARCHS=80;90;100"
    assert "CUDA backend for sm_80, sm_90, sm_100" in str(plan) and "NVSHMEM: not found" in str(plan)


def test_the_machines_gpus_decide_unless_the_user_does(tmp_path: Path) -> None:
    nvcc(tmp_path)
    tool(tmp_path / "nvidia-smi", "echo 9.0")
    assert cuda_build.plan({"PATH": str(tmp_path)}).archs == ("90",)
    assert cuda_build.plan({"PATH": str(tmp_path), "HPC_MOE_CUDA_ARCHS": "80;100"}).archs == ("80", "100")


def test_without_nvcc_it_is_the_cpu_backend_and_says_so() -> None:
    plan = cuda_build.plan({"PATH": "/nowhere"})
    assert plan.archs == () and plan.cmake_args() == []
    assert str(plan).startswith("CPU backend only, without CUDA: nvcc was found neither")
    assert "set CUDA_HOME" in str(plan)


def test_without_nvcc_it_is_an_error_where_cuda_is_a_must() -> None:
    with pytest.raises(NoCudaError, match="nvcc was found neither") as caught:
        cuda_build.plan({"PATH": "/nowhere", "HPC_MOE_CUDA": "1"})
    assert "CUDA_HOME" in caught.value.remedy


def test_cuda_can_be_switched_off(tmp_path: Path) -> None:
    nvcc(tmp_path)
    plan = cuda_build.plan({"PATH": str(tmp_path), "HPC_MOE_CUDA": "0", "CUDACXX": "/nowhere"})
    assert plan.archs == () and "HPC_MOE_CUDA=0" in str(plan)
    with pytest.raises(BuildError, match="HPC_MOE_CUDA=yes"):
        cuda_build.plan({"HPC_MOE_CUDA": "yes"})


def test_an_architecture_that_nvcc_does_not_know_is_left_out(tmp_path: Path) -> None:
    nvcc(tmp_path, "12.4", "sm_80 sm_90")
    environ = {"PATH": str(tmp_path)}
    plan = cuda_build.plan(environ)
    assert plan.archs == ("80", "90")
    assert "left out sm_100" in str(plan) and "CUDA 12.8 or newer" in str(plan)
    environ["HPC_MOE_CUDA_ARCHS"] = "100"
    assert "cannot compile for sm_100" in str(cuda_build.plan(environ))
    with pytest.raises(NoCudaError, match="cannot compile for sm_100"):
        cuda_build.plan(environ | {"HPC_MOE_CUDA": "1"})


@pytest.mark.parametrize(("script", "reason"), [("echo release 11.8,", "of CUDA 11.8"), ("exit 1", "a version")])
def test_an_unusable_nvcc_means_the_cpu_backend(script: str, reason: str, tmp_path: Path) -> None:
    tool(tmp_path / "nvcc", script)
    plan = cuda_build.plan({"PATH": str(tmp_path)})
    assert plan.archs == () and reason in plan.why_no_cuda
    with pytest.raises(NoCudaError):
        cuda_build.plan({"PATH": str(tmp_path), "HPC_MOE_CUDA": "1"})


def test_nvshmem_is_that_of_nvshmem_dir_or_of_the_wheel(tmp_path: Path) -> None:
    nvcc(tmp_path)
    environ = {"PATH": str(tmp_path)}
    assert "without hpc_moe._nvshmem" in str(cuda_build.plan(environ))
    for folder in ("packages/nvidia/nvshmem", "own"):
        (tmp_path / folder / "include").mkdir(parents=True)
        (tmp_path / folder / "include" / "nvshmem.h").touch()
    assert cuda_build.plan(environ).nvshmem == str(tmp_path / "packages" / "nvidia" / "nvshmem")
    own = cuda_build.plan(environ | {"NVSHMEM_DIR": str(tmp_path / "own")})
    assert own.nvshmem == str(tmp_path / "own")
    assert f"hpc_moe._nvshmem, with {own.nvshmem}" in str(own)
    assert f"-DHPC_MOE_NVSHMEM_DIR={own.nvshmem}" in own.cmake_args()
    with pytest.raises(BuildError, match=r"NVSHMEM_DIR=/nowhere has no include/nvshmem\.h"):
        cuda_build.plan(environ | {"NVSHMEM_DIR": "/nowhere"})


def test_it_prints_the_plan() -> None:
    line = [sys.executable, cuda_build.__file__]
    done = subprocess.run(line, env={"HPC_MOE_CUDA": "0"}, capture_output=True, text=True, check=True)
    assert done.stdout == "CPU backend only, without CUDA: HPC_MOE_CUDA=0\n"
    done = subprocess.run(line, env={"HPC_MOE_CUDA": "2"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Remedy" in done.stderr


# --- the extension here ----------------------------------------------------------------------------------------------


def test_the_extension_says_what_it_was_built_for() -> None:
    archs = [arch for arch in _C.cuda_archs.split(";") if arch]
    assert set(archs) <= set(cuda_build.ARCHS)
    assert hasattr(_C, "CudaRuntime") == bool(archs)
    assert archs or not _C.nvshmem_build_version


def test_the_extension_links_to_neither_driver_nor_torch_nor_mpi() -> None:
    done = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True)
    for library in ("libcuda", "libnvshmem", "libtorch", "libc10", "libmpi"):
        assert library not in done.stdout
