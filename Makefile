# The commands of hpc_moe. Each sets up what it needs (.venv, pinned dependencies, an MPI, the extension) the first time,
# and rebuilds the extension when its sources have changed.
#
#   make demo       train the example language model on 4 MPI ranks
#   make example    the shortest complete use, on 4 MPI ranks
#   make test       the whole test suite, under mpirun with 1, 2, 3 and 4 ranks
#   make lint       ruff, mypy and clang-format
#   make sanitize   the extension's tests with AddressSanitizer and UndefinedBehaviorSanitizer
#   make bench      the benchmarks of the CPU runtime on 2 and 4 ranks, JSON in build/benchmarks
#   make gpu-test   the MPI tests on CUDA, under mpirun with 1 rank to as many as there are GPUs
#   make gpu-bench  the benchmarks of the CUDA runtime on 2, 4 and 8 GPUs, as many as there are, JSON in build/benchmarks
#   make gpu-stress the stress test: kernels that pause at random, on all GPUs
#   make venv       only the set-up, without the extension      make build   the set-up and the extension
#   make clean      what was built                              make distclean   .venv too
#
# Variables:
#   PYTHON=python3.12            the Python (3.10 or newer) that .venv is made of
#   MPIEXEC=/path/to/mpirun      your MPI's launcher (Open MPI, MPICH, srun); default: Open MPI from PyPI, into .venv
#   MPIEXEC_FLAGS="..."          flags for it, in place of those tools/launch.py chooses
#   TORCH="torch==2.13.0+cpu"    what to install as torch; PIP_ARGS="..." further arguments for pip install
#   RANKS="0 2" TESTS="..."      parts of the suite (0: the plain process), and files or other pytest arguments
#   DEMO_ARGS="..." BENCH_ARGS="..." STRESS_ARGS="..."   arguments for the example, the benchmarks and the stress test
#   WERROR=1                     compiler warnings are errors, and so are register spills in CUDA kernels
#   HPC_MOE_CUDA=0               no CUDA backend (1: a missing nvcc is an error; unset: CUDA where nvcc is found)
#   HPC_MOE_CUDA_ARCHS="80;90"   the GPU architectures to compile for, of 80;90;100 (default: this machine's GPUs, else all)
#   GPU_PYTHON=/path/to/python3  for the gpu- targets: a Python of yours that has torch with CUDA, mpi4py and what
#                                requirements/dev.txt names for builds and tests; default: .venv
#   GPU_RANKS="2 4"              for gpu-test: other numbers of ranks; more than there are GPUs share them

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
TORCH    ?= $(shell cat requirements/torch.txt)
PIP_ARGS ?=
RANKS    ?= 0 1 2 3 4
TESTS    ?= tests
WERROR   ?=
export MPIEXEC MPIEXEC_FLAGS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CMAKE_ARGS       := $(if $(WERROR),-DHPC_MOE_WERROR=ON)
EXTENSION_SOURCE := CMakeLists.txt setup.py tools/cuda_build.py pyproject.toml hpc_moe/_version.py $(shell find csrc -type f)
BUILD_ENV         = PATH="$(CURDIR)/$(BIN):$$PATH" HPC_MOE_PYTHON_INCLUDE="$${HPC_MOE_PYTHON_INCLUDE:-$$( \
	ls -d $(CURDIR)/$(VENV)/python-headers/usr/include/python3.* 2>/dev/null)}"
CXX_FILES        := $(shell find csrc benchmarks tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
LAUNCH           := $(BIN)/python tools/launch.py

# With GPUs: .venv, or the Python that the user gives, for which the extension is built in place as well.
GPU_PYTHON ?=
GPU_RANKS  ?=
GPU_BIN     = $(or $(GPU_PYTHON),$(BIN)/python)
GPU_BUILD   = $(if $(GPU_PYTHON),,$(BUILD_ENV)) HPC_MOE_CUDA=1
GPU_ENV     = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
STRESS_DIR := build/stress
STRESS_ENV  = PYTHONPATH="$(CURDIR)/$(STRESS_DIR)/lib$${PYTHONPATH:+:$$PYTHONPATH}"

# What the sanitizers run: the tests that go through the extension, without those that start processes themselves.
SANITIZE_RANKS ?= 1 2
SANITIZE_TESTS ?= tests --ignore-glob='*test_nn*'
SANITIZE_DIR   := build/sanitize
SANITIZE_ENV    = PYTHONPATH=$(CURDIR)/$(SANITIZE_DIR)/lib PYTHONSAFEPATH=1 HPC_MOE_TEST_STEP_LIMIT=200 \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libstdc++.so)"

.PHONY: help demo example test lint format sanitize bench gpu-build gpu-test gpu-bench gpu-stress venv build clean distclean FORCE
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# ---- set-up

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on PATH: install python3 (3.10 or newer) or give PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is older than 3.10: give a newer one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "making $(VENV) failed: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: $(BIN)/python requirements/torch.txt requirements/dev.txt
	$(BIN)/pip install -q $(PIP_ARGS) "$(TORCH)"
	$(BIN)/pip install -q $(PIP_ARGS) -r requirements/dev.txt
	@touch $@

$(VENV)/.mpi: $(BIN)/python requirements/mpi.txt
	$(BIN)/pip install -q $(PIP_ARGS) -r requirements/mpi.txt
	@touch $@

venv: $(VENV)/.installed $(if $(MPIEXEC),,$(VENV)/.mpi)

# Debian and Ubuntu keep the Python headers in a package of their own. Where it is missing, its files are put into .venv.
$(VENV)/.headers: $(BIN)/python
	@tools/fetch_python_headers.sh $(VENV)
	@touch $@

# The extension is built in place (an editable install). A missing one, or another choice of CUDA, builds it again.
CUDA_CHOICE := HPC_MOE_CUDA=$(HPC_MOE_CUDA) HPC_MOE_CUDA_ARCHS=$(HPC_MOE_CUDA_ARCHS) CUDACXX=$(CUDACXX) \
	CUDA_HOME=$(CUDA_HOME) CUDAHOSTCXX=$(CUDAHOSTCXX) NVSHMEM_DIR=$(NVSHMEM_DIR)
CUDA_BUILT  := $(shell cat $(VENV)/.extension 2>/dev/null)
$(VENV)/.extension: $(VENV)/.installed $(VENV)/.headers $(EXTENSION_SOURCE) \
		$(if $(wildcard hpc_moe/_C*.so),,FORCE) $(if $(subst <$(CUDA_CHOICE)>,,<$(CUDA_BUILT)>),FORCE)
	@echo "building the extension (editable install)"
	@$(BUILD_ENV) $(BIN)/python tools/cuda_build.py
	@$(BUILD_ENV) HPC_MOE_CMAKE_ARGS="$(CMAKE_ARGS)" \
		$(BIN)/pip install -q --no-build-isolation --no-deps --editable .
	@echo '$(CUDA_CHOICE)' >$@

build: venv $(VENV)/.extension

# ---- what it is for

demo: build
	$(LAUNCH) -n 4 --limit 1200 -- $(BIN)/python examples/train_moe_lm.py $(DEMO_ARGS)

example: build
	$(LAUNCH) -n 4 --limit 120 -- $(BIN)/python examples/dispatch_combine.py

test: build
	@$(BIN)/python tools/run_tests.py --summary build/tests.txt --ranks $(RANKS) -- $(TESTS)

bench: build
	@mkdir -p build/benchmarks
	$(BIN)/python benchmarks/import_time.py --out build/benchmarks/import_time.json
	for ranks in 2 4; do OMP_NUM_THREADS=1 $(LAUNCH) -n $$ranks --limit 600 -- $(BIN)/python benchmarks/cpu.py \
		--out build/benchmarks/cpu_$${ranks}_ranks.json $(BENCH_ARGS) || exit 1; done

# ---- with GPUs

gpu-build: $(if $(GPU_PYTHON),,build)
	$(if $(GPU_PYTHON),$(GPU_BUILD) HPC_MOE_CMAKE_ARGS="$(CMAKE_ARGS)" $(GPU_PYTHON) setup.py -q build_ext --inplace)

gpu-test: gpu-build
	@gpus=$$($(GPU_ENV) $(GPU_BIN) tools/gpus.py) || exit 1; \
	HPC_MOE_TEST_DEVICE=cuda $(GPU_ENV) $(GPU_BIN) tools/run_tests.py --summary build/gpu-tests.txt --limit 1200 \
		--ranks $(or $(GPU_RANKS),$$(seq $$gpus)) -- $(TESTS)

gpu-bench: gpu-build
	@mkdir -p build/benchmarks; gpus=$$($(GPU_ENV) $(GPU_BIN) tools/gpus.py --at-least 2) || exit 1; \
	for ranks in 2 4 8; do [ $$ranks -le $$gpus ] || break; \
		$(GPU_ENV) $(GPU_BIN) tools/launch.py -n $$ranks --limit 1200 -- $(GPU_BIN) benchmarks/gpu.py \
			--out build/benchmarks/gpu_$${ranks}_ranks.json $(BENCH_ARGS) || exit 1; \
		$(GPU_ENV) $(GPU_BIN) tools/launch.py -n $$ranks --limit 600 -- $(GPU_BIN) benchmarks/gpu_low_latency.py \
			--out build/benchmarks/gpu_low_latency_$${ranks}_ranks.json $(filter --quick,$(BENCH_ARGS)) || exit 1; done

gpu-stress: $(if $(GPU_PYTHON),,venv $(VENV)/.headers)
	@rm -rf $(STRESS_DIR)/lib
	$(GPU_BUILD) HPC_MOE_CMAKE_ARGS="$(CMAKE_ARGS) -DHPC_MOE_STRESS=ON" \
		$(GPU_BIN) setup.py -q build --build-base $(STRESS_DIR) --build-lib $(STRESS_DIR)/lib
	@$(STRESS_ENV) $(GPU_BIN) tools/gpus.py >/dev/null
	$(STRESS_ENV) $(GPU_BIN) tests/programs/stress.py --all-mutations $(STRESS_ARGS)

# ---- checks

lint: build
	@status=0; run() { echo "$$@"; "$$@" || status=1; }; \
	run $(BIN)/ruff check; run $(BIN)/ruff format --check; run $(BIN)/mypy; \
	run $(BIN)/clang-format --dry-run --Werror $(CXX_FILES); exit $$status

format: venv
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: build
	@rm -rf $(SANITIZE_DIR)/lib
	$(BUILD_ENV) HPC_MOE_CUDA=0 HPC_MOE_CMAKE_ARGS="$(CMAKE_ARGS) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHPC_MOE_SANITIZE=address,undefined" \
		$(BIN)/python setup.py -q build --build-base $(SANITIZE_DIR) --build-lib $(SANITIZE_DIR)/lib
	$(SANITIZE_ENV) $(BIN)/python -c 'import hpc_moe._C as c; assert "$(SANITIZE_DIR)" in c.__file__, c.__file__'
	@set -e; for ranks in $(SANITIZE_RANKS); do echo "===== sanitizers, $$ranks rank(s) ====="; \
		OMP_NUM_THREADS=2 $(LAUNCH) -n $$ranks --limit 600 -- env $(SANITIZE_ENV) \
			$(BIN)/pytest -q -p no:cacheprovider --color=no --capture=sys --timeout=300 --with-mpi -m "mpi and not launcher" $(SANITIZE_TESTS); \
	done

clean:
	rm -rf build dist hpc_moe.egg-info hpc_moe/_C*.so hpc_moe/_nvshmem*.so $(VENV)/.extension .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hpc_moe tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
