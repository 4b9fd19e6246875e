"""Builds the extensions `hpc_moe._C` and `hpc_moe._nvshmem` with CMake. Everything else is in pyproject.toml.

Needs a C++17 compiler with OpenMP, the Python headers, CMake and Ninja or make; neither torch nor MPI. What is missing
is named together with its remedy before CMake starts. Where there is nvcc, the CUDA backend is built, too:
tools/cuda_build.py decides that, and says which variables steer it. Further environment variables:

    CXX                      the C++ compiler, also for nvcc unless CUDAHOSTCXX names another
    HPC_MOE_CMAKE_ARGS       further arguments for CMake, e.g. "-DHPC_MOE_WERROR=ON"
    HPC_MOE_BUILD_JOBS       compile jobs at a time (default: the cores available)
    HPC_MOE_PYTHON_INCLUDE   the folder of Python.h, where it is not this Python's own
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_build  # noqa: E402  (an isolated build does not see this folder by itself)


def fail(problem: str, remedy: str) -> SystemExit:
    """The error that ends the build: what is wrong, and what to do about it."""
    return SystemExit(f"\nhpc_moe cannot be built: {problem}\n  Remedy: {remedy}\n")


def find_cxx() -> str:
    """The C++ compiler: `$CXX`, else the first of c++, g++, clang++ on PATH."""
    if os.environ.get("CXX"):
        wanted = shlex.split(os.environ["CXX"])[0]
        if shutil.which(wanted) is None:
            raise fail(f"CXX={wanted} is not an executable on PATH.", "correct CXX, or unset it to use g++.")
        return os.environ["CXX"]
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise fail(
        "no C++ compiler (c++, g++, clang++) is on PATH.",
        "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (RHEL), or load the site's compiler module.",
    )


def python_include() -> Path:
    """The folder of Python.h: `$HPC_MOE_PYTHON_INCLUDE`, else this Python's own."""
    include = Path(os.environ.get("HPC_MOE_PYTHON_INCLUDE") or sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        raise fail(
            f"the Python headers are missing ({include / 'Python.h'} does not exist).",
            "apt-get install python3-dev (Debian, Ubuntu), dnf install python3-devel (RHEL), or use a Python that "
            "brings them (conda, pyenv, the site's Python module).",
        )
    return include


def find_cmake() -> str:
    """CMake from PATH or beside this Python, and one that starts."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise fail("cmake is not on PATH.", "pip install cmake (3.18 or newer), or load the site's cmake module.")
    try:
        subprocess.run([cmake, "--version"], check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise fail(f"{cmake} does not start ({error}).", "pip install --force-reinstall cmake.") from error
    return cmake


def generator_args() -> list[str]:
    """Ninja where it is to be had, else make."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja:
        return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if shutil.which("make"):
        return ["-G", "Unix Makefiles"]
    raise fail("neither ninja nor make is on PATH.", "pip install ninja.")


def pybind11_dir() -> str:
    """Where pybind11's CMake files are."""
    try:
        import pybind11
    except ImportError as error:
        raise fail("pybind11 cannot be imported.", "pip install pybind11 (2.11 or newer).") from error
    return str(pybind11.get_cmake_dir())


def plan_cuda() -> cuda_build.Plan:
    """Whether and how the CUDA backend is built."""
    try:
        return cuda_build.plan(os.environ)
    except cuda_build.BuildError as error:
        raise fail(error.problem, error.remedy) from error


class CMakeBuild(build_ext):
    """Configures and builds with CMake; the build folder is kept, so that a second build compiles what changed."""

    def finalize_options(self) -> None:
        """Decide what to build."""
        self.cuda = plan_cuda()
        names = ["hpc_moe._C"] + ["hpc_moe._nvshmem"] * bool(self.cuda.nvshmem)
        self.distribution.ext_modules = [Extension(name, sources=[]) for name in names]
        super().finalize_options()

    def build_extensions(self) -> None:
        """Build all that CMake builds, then put each extension in its place."""
        self._build()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Copy `ext` to where setuptools looks for it."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.rpartition(".")[2]
        built = list(self._folder().glob(f"{name}.*so"))
        if len(built) != 1:
            raise fail(
                f"CMake left {len(built)} files {name}.*so in {self._folder()}.",
                "remove the build folder and try again.",
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built[0], output)

    def _folder(self) -> Path:
        return Path(self.build_temp).resolve() / "cmake"

    def _build(self) -> None:
        folder = self._folder()
        cxx = find_cxx()
        include = python_include()
        flags = [*shlex.split(cxx)[1:], os.environ.get("CXXFLAGS", "")]
        if os.environ.get("HPC_MOE_PYTHON_INCLUDE"):
            flags.append(f"-I{include.parent}")  # Debian's Python.h includes a file by its path from there
        configure = [
            find_cmake(), "-S", str(ROOT), "-B", str(folder),
            *generator_args(),
            f"-DCMAKE_CXX_COMPILER={shlex.split(cxx)[0]}",
            f"-DCMAKE_CXX_FLAGS={' '.join(flags).strip()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_INCLUDE_DIR={include}",
            f"-Dpybind11_DIR={pybind11_dir()}",
            f"-DHPC_MOE_VERSION={self.distribution.get_version()}",
            *self.cuda.cmake_args(),
            *shlex.split(os.environ.get("HPC_MOE_CMAKE_ARGS", "")),
        ]  # fmt: skip
        self._forget_other_configuration(folder, configure)
        jobs = os.environ.get("HPC_MOE_BUILD_JOBS") or str(len(os.sched_getaffinity(0)))
        self._run(configure)
        print(self.cuda, flush=True)
        (folder / "configured-as.txt").write_text("\n".join(configure))
        self._run([configure[0], "--build", str(folder), "--parallel", jobs])

    @staticmethod
    def _forget_other_configuration(folder: Path, configure: list[str]) -> None:
        """Start afresh where the folder was configured with other tools (pip's build isolation moves them about)."""
        record = folder / "configured-as.txt"
        if folder.is_dir() and not (record.is_file() and record.read_text() == "\n".join(configure)):
            shutil.rmtree(folder)

    @staticmethod
    def _run(command: list[str]) -> None:
        print("+", shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise fail(
                f"{command[0]} ended with status {error.returncode}.",
                "see its messages above; with pip, add -v to see them. Where it is about CUDA: HPC_MOE_CUDA=0 builds "
                "without, CUDACXX names another nvcc, CUDAHOSTCXX another C++ compiler for it.",
            ) from error


if sys.version_info < (3, 10):
    raise fail(f"this is Python {sys.version.split()[0]}.", "use Python 3.10 or newer (PYTHON=python3.11 make ...).")
if int(setuptools.__version__.split(".")[0]) < 77:
    raise fail(f"this is setuptools {setuptools.__version__}.", "pip install 'setuptools>=77'.")
if not sys.platform.startswith("linux"):
    raise fail(f"hpc_moe runs on Linux, and this is {sys.platform}.", "use Linux (a container or WSL will do).")

setup(ext_modules=[Extension("hpc_moe._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
