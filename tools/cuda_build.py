"""Decides how the CUDA backend is built: with which nvcc, for which GPUs, and against which NVSHMEM. setup.py asks it.

Environment variables:

    HPC_MOE_CUDA          0: only the CPU backend; 1: what CUDA lacks here is an error; unset: CUDA where it can be had
    HPC_MOE_CUDA_ARCHS    which of 80, 90 and 100 to compile for, e.g. "90" or "80;90" (also 80,90 or sm_90 or 9.0);
                          default: what this machine's GPUs are, all three where it has none
    CUDACXX               the nvcc; default: that of $CUDA_HOME/bin, of PATH, or of /usr/local/cuda/bin
    NVSHMEM_DIR           the folder of NVSHMEM's include and lib; default: the wheel nvidia-nvshmem-cu12 or -cu13

By itself it prints what would be built: `python tools/cuda_build.py`. It imports the standard library only, and
compiles nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHS = ("80", "90", "100")
"""The GPU architectures that the kernels are written for. Code for 80 runs on all of 8.x, and so on."""

# Bulk copies (sm_90) came with the PTX of 12.0. What cannot compile for an architecture does not list it.
OLDEST_CUDA = (12, 0)
FIRST_CUDA_OF_ARCH = {"100": "12.8"}

DEFAULT_CUDA_BIN = "/usr/local/cuda/bin"


class BuildError(Exception):
    """What is wrong, and what to do about it.

    Attributes:
        problem: what was found.
        remedy: what to do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n  Remedy: {remedy}")
        self.problem = problem
        self.remedy = remedy


class NoCudaError(BuildError):
    """CUDA cannot be had here. Not an error where nobody insisted on it."""


@dataclass(frozen=True)
class Plan:
    """What to build.

    Attributes:
        archs: of `ARCHS`, in their order; none: the CPU backend only.
        nvcc: path of the compiler.
        nvshmem: the folder of NVSHMEM's include and lib, empty without one; `hpc_moe._nvshmem` is built against it.
        why_no_cuda: where `archs` is empty, the reason.
        notes: what was left out, for the user to know.
    """

    archs: tuple[str, ...] = ()
    nvcc: str = ""
    nvshmem: str = ""
    why_no_cuda: str = ""
    notes: tuple[str, ...] = ()

    def cmake_args(self) -> list[str]:
        """The plan as arguments of CMake."""
        if not self.archs:
            return []
        return [
            f"-DHPC_MOE_CUDA_ARCHS={';'.join(self.archs)}",
            f"-DHPC_MOE_NVSHMEM_DIR={self.nvshmem}",
            f"-DCMAKE_CUDA_COMPILER={self.nvcc}",
        ]

    def __str__(self) -> str:
        if not self.archs:
            return f"CPU backend only, without CUDA: {self.why_no_cuda}"
        lines = [f"CPU backend, and CUDA backend for {names(self.archs)} by {self.nvcc}"]
        missing = "not found, so without hpc_moe._nvshmem (install nvidia-nvshmem-cu13 or -cu12, or set NVSHMEM_DIR)"
        lines += ["NVSHMEM: " + (f"hpc_moe._nvshmem, with {self.nvshmem}" if self.nvshmem else missing)]
        return "\n".join([*lines, *self.notes])


def plan(environ: Mapping[str, str]) -> Plan:
    """What to build in this environment. Raises `BuildError` for a wrong variable, or if CUDA is a must and lacks."""
    wish = environ.get("HPC_MOE_CUDA", "").strip()
    if wish not in ("", "0", "1"):
        raise BuildError(f"HPC_MOE_CUDA={wish} is none of 0, 1 and unset.", "correct it.")
    if wish == "0":
        return Plan(why_no_cuda="HPC_MOE_CUDA=0")
    wanted = parse_archs(environ.get("HPC_MOE_CUDA_ARCHS", ""))
    try:
        return _plan_with_cuda(environ, wanted)
    except NoCudaError as error:
        if wish == "1":
            raise
        return Plan(why_no_cuda=f"{error.problem} Remedy: {error.remedy}")


def _plan_with_cuda(environ: Mapping[str, str], wanted: tuple[str, ...]) -> Plan:
    nvcc = find_nvcc(environ)
    version = nvcc_version(nvcc)
    shown = ".".join(map(str, version))
    if version < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        raise NoCudaError(f"{nvcc} is of CUDA {shown}.", f"use CUDA {oldest} or newer (CUDACXX=/path/to/nvcc).")
    notes: list[str] = []
    if not wanted:
        wanted, notes = default_archs(gpu_capabilities(environ))
    able = set(re.findall(r"sm_(\d+)", _output([nvcc, "--list-gpu-code"])))
    archs = tuple(arch for arch in wanted if arch in able)
    for arch in wanted:
        if arch not in able:
            first = FIRST_CUDA_OF_ARCH.get(arch)
            needs = f"; it needs CUDA {first} or newer" if first else ""
            notes.append(f"left out sm_{arch}: nvcc of CUDA {shown} does not know it{needs}.")
    if not archs:
        remedy = f"use another CUDA (CUDACXX=/path/to/nvcc), or choose other architectures of {names(ARCHS)}"
        raise NoCudaError(
            f"nvcc of CUDA {shown} cannot compile for {names(wanted)}.", f"{remedy} (HPC_MOE_CUDA_ARCHS)."
        )
    return Plan(archs, nvcc, find_nvshmem(environ, package_folders()), notes=tuple(notes))


def names(archs: Iterable[str]) -> str:
    """`("80", "90")` as `"sm_80, sm_90"`."""
    return ", ".join(f"sm_{arch}" for arch in archs)


def parse_archs(text: str) -> tuple[str, ...]:
    """`"sm_90, 8.0"` as `("80", "90")`; none for an empty text."""
    found = set()
    for word in re.split(r"[;,\s]+", text.strip()):
        if word:
            arch = word.lower().removeprefix("sm_").replace(".", "")
            if arch not in ARCHS:
                same = arch_of(f"{arch[:-1]}.{arch[-1:]}") if arch.isdigit() else None
                hint = f"code for {same} runs on {word}, too" if same else 'e.g. HPC_MOE_CUDA_ARCHS="80;90"'
                raise BuildError(f"HPC_MOE_CUDA_ARCHS has {word!r}, not one of {', '.join(ARCHS)}.", f"{hint}.")
            found.add(arch)
    return tuple(arch for arch in ARCHS if arch in found)


def arch_of(capability: str) -> str | None:
    """The architecture whose code runs on GPUs of this compute capability: `"8.6"` gives `"80"`; None for others."""
    arch = capability.split(".")[0] + "0"
    return arch if arch in ARCHS else None


def default_archs(capabilities: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """The architectures of a machine with these GPUs (all where it has none), and notes on GPUs that have none."""
    found, notes = set(), []
    for capability in dict.fromkeys(capabilities):
        arch = arch_of(capability)
        if arch:
            found.add(arch)
        else:
            notes.append(f"a GPU here has compute capability {capability}, which the CUDA backend does not run on.")
    return tuple(arch for arch in ARCHS if arch in found) or ARCHS, notes


def gpu_capabilities(environ: Mapping[str, str]) -> list[str]:
    """The compute capability of each GPU of this machine, as nvidia-smi tells it; none without nvidia-smi."""
    smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    text = _output([smi, "--query-gpu=compute_cap", "--format=csv,noheader"]) if smi else ""
    return re.findall(r"^\s*(\d+\.\d+)\s*$", text, re.MULTILINE)


def find_nvcc(environ: Mapping[str, str]) -> str:
    """Path of the nvcc to use."""
    named = environ.get("CUDACXX", "").strip()
    if named:
        found = shutil.which(named, path=environ.get("PATH"))
        if found is None:
            raise BuildError(f"CUDACXX={named} is not an executable.", "correct CUDACXX, or unset it.")
        return found
    home = environ.get("CUDA_HOME", "").strip()
    for folder in ([f"{home}/bin"] if home else []) + [environ.get("PATH", os.defpath), DEFAULT_CUDA_BIN]:
        found = shutil.which("nvcc", path=folder)
        if found:
            return found
    raise NoCudaError(
        "nvcc was found neither through CUDACXX or CUDA_HOME, nor on PATH or in /usr/local/cuda/bin.",
        "load the site's CUDA module, or set CUDA_HOME to the folder of a CUDA toolkit.",
    )


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """The version of CUDA that it belongs to."""
    match = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
    if match is None:
        raise NoCudaError(f"{nvcc} --version does not tell a version.", "use a working nvcc (CUDACXX=/path/to/nvcc).")
    return int(match[1]), int(match[2])


def find_nvshmem(environ: Mapping[str, str], folders: Iterable[str]) -> str:
    """The folder of NVSHMEM's include and lib: `$NVSHMEM_DIR`, else a wheel's in one of `folders`, else empty."""
    named = environ.get("NVSHMEM_DIR", "").strip()
    if named:
        if not Path(named, "include", "nvshmem.h").is_file():
            raise BuildError(
                f"NVSHMEM_DIR={named} has no include/nvshmem.h.", "correct NVSHMEM_DIR, or unset it to use the wheel."
            )
        return named
    wheels = (Path(folder, "nvidia", "nvshmem") for folder in folders)
    return next((str(wheel) for wheel in wheels if (wheel / "include" / "nvshmem.h").is_file()), "")


def package_folders() -> list[str]:
    """Where this Python's packages lie, also when pip hides them from an isolated build."""
    paths = sysconfig.get_paths()
    return list(
        dict.fromkeys([*filter(None, sys.path), paths["purelib"], paths["platlib"], site.getusersitepackages()])
    )


def _output(command: list[str]) -> str:
    """What a command prints; nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    try:
        print(plan(os.environ))
    except BuildError as error:
        sys.exit(f"error: {error}")
