"""The low-latency kernels (csrc/cuda/low_latency_*.cu), on the CPU.

tests/emulation/ has what a GPU would: its thread model, its memory, the puts of NVSHMEM. The program made of that and
the kernels draws rounds of a dispatch and its combine at random, on ranks that are threads, and checks what comes out.
Compiled in three ways: with stores to peers only, with puts, and as a stress build, whose kernels pause at random and
can break a rule on purpose.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_build
import pytest

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "emulation"
VARIANTS = {"stores": [], "puts": ["-DHPC_MOE_PUTS"], "stress": ["-DHPC_MOE_STRESS"]}
# The last flag is for shared memory that a kernel declares `extern`: it is thread_local here, and needs no code that
# sets it up.
FLAGS = ["-std=c++17", "-O1", "-fno-extern-tls-init"]
LIMIT_S = 60  # of a program

Build = Callable[[str], Path]


def run(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def build_variant(compiler: str, cuda_headers: Path, variant: str, folder: Path) -> Path:
    """The program of a variant. `folder` is there, and empty."""
    includes = [f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", f"-I{cuda_headers}"]
    line = [compiler, *FLAGS, *VARIANTS[variant], *includes, "-include", "device.h", "-c"]
    kernels = [ROOT / "csrc" / "cuda" / f"low_latency_{name}.cu" for name in ("dispatch", "combine", "reject", "masks")]
    sources = [*kernels, *sorted(EMULATION.glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    lines = [[*line, "-x", "c++", str(source), "-o", str(to)] for source, to in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, lines))
    run([compiler, *map(str, objects), "-pthread", "-o", str(folder / "run")])
    return folder / "run"


def find_cuda_headers() -> Path | None:
    """The folder of the headers that nvcc uses; nvcc itself may be a script, so it is asked."""
    try:
        nvcc = cuda_build.find_nvcc(os.environ)
    except cuda_build.BuildError:
        return None
    done = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False, timeout=60)
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    headers = Path(top[1]) / "include" if top else None
    return headers if headers and (headers / "cuda_runtime.h").is_file() else None


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The path of a variant's program, which is built when it is first asked for."""
    compiler, cuda_headers = shutil.which("g++"), find_cuda_headers()
    if compiler is None or cuda_headers is None:
        pytest.skip("no g++, or no headers of CUDA")
    return functools.cache(
        lambda variant: build_variant(compiler, cuda_headers, variant, tmp_path_factory.mktemp(variant))
    )


def execute(program: Path, **options: int) -> subprocess.CompletedProcess[str]:
    line = [str(program), *(f"{name}={value}" for name, value in options.items())]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT_S)


def expect_right(program: Path, **options: int) -> None:
    done = execute(program, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{options['rounds']} rounds are right\n")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_rounds(build: Build, ranks: int, seed: int) -> None:
    expect_right(build("stores"), ranks=ranks, rounds=30 if ranks < 8 else 8, seed=seed)


@pytest.mark.parametrize("ranks", [9, 17, 32])
def test_more_ranks_than_a_node_has(build: Build, ranks: int) -> None:
    expect_right(build("puts"), ranks=ranks, rounds=2, seed=ranks)


@pytest.mark.parametrize(("ranks", "seed"), [(2, 1), (3, 2), (4, 5)])
def test_ranks_that_are_lost_and_come_back(build: Build, ranks: int, seed: int) -> None:
    expect_right(build("stores"), ranks=ranks, rounds=8, seed=seed, deaths=1)


@pytest.mark.parametrize(
    ("ranks", "put_ranks"), [(2, 0b11), (3, 0b111), (3, 0b101), (4, 0b1111), (4, 0b0110), (12, 0x804)], ids=str
)
def test_puts(build: Build, ranks: int, put_ranks: int) -> None:
    expect_right(build("puts"), ranks=ranks, rounds=15 if ranks < 8 else 4, seed=ranks + put_ranks, put_ranks=put_ranks)


def test_puts_when_a_rank_is_lost(build: Build) -> None:
    expect_right(build("puts"), ranks=3, rounds=8, seed=1, put_ranks=0b111, deaths=1)


def test_what_no_fence_orders_is_noticed(build: Build) -> None:
    done = execute(build("puts"), ranks=2, rounds=100, seed=1, put_ranks=0b11, fences=0)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "wrong: " in done.stdout


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_pauses(build: Build, ranks: int) -> None:
    expect_right(build("stress"), ranks=ranks, rounds=10, seed=ranks, stress_seed=7)


@pytest.mark.parametrize("rule", ["kFlagBeforeRow", "kRowBeforeFlag", "kWordWithoutTag"])
def test_a_broken_rule_is_noticed(build: Build, rule: str) -> None:
    """The program stops after the first round that went wrong."""
    text = (ROOT / "csrc" / "cuda" / "device" / "stress.cuh").read_text()
    rules = re.findall(r"^    (k\w+),", text, re.MULTILINE)  # of `enum Mutation`, from 0 on
    done = execute(build("stress"), ranks=3, rounds=400, seed=3, stress_seed=7, mutation=rules.index(rule))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "wrong: " in done.stdout
