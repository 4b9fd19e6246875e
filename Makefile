# The commands of hpc_moe. Each sets up what it needs (.venv, pinned dependencies, an MPI, the extension) the first time,
# and rebuilds the extension when its sources have changed.
#
#   make demo       train the example language model on 4 MPI ranks
#   make example    the shortest complete use, on 4 MPI ranks
#   make test       the whole test suite, under mpirun with 1, 2, 3 and 4 ranks
#   make lint       ruff, mypy and clang-format
#   make sanitize   the extension's tests with AddressSanitizer and UndefinedBehaviorSanitizer
#   make bench      the benchmarks of the CPU runtime on 2 and 4 ranks, JSON in build/benchmarks
#   make venv       only the set-up, without the extension      make build   the set-up and the extension
#   make clean      what was built                              make distclean   .venv too
#
# Variables:
#   PYTHON=python3.12            the Python (3.10 or newer) that .venv is made of
#   MPIEXEC=/path/to/mpirun      your MPI's launcher (Open MPI, MPICH, srun); default: Open MPI from PyPI, into .venv
#   MPIEXEC_FLAGS="..."          flags for it, in place of those tools/launch.py chooses
#   TORCH="torch==2.13.0+cpu"    what to install as torch; PIP_ARGS="..." further arguments for pip install
#   RANKS="0 2" TESTS="..."      parts of the suite (0: the plain process), and files or other pytest arguments
#   DEMO_ARGS="..." BENCH_ARGS="..."   arguments for the example and the benchmarks
#   WERROR=1                     compiler warnings are errors

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
EXTENSION_SOURCE := CMakeLists.txt setup.py pyproject.toml hpc_moe/_version.py $(shell find csrc -type f)
BUILD_ENV         = PATH="$(CURDIR)/$(BIN):$$PATH" HPC_MOE_PYTHON_INCLUDE="$${HPC_MOE_PYTHON_INCLUDE:-$$( \
	ls -d $(CURDIR)/$(VENV)/python-headers/usr/include/python3.* 2>/dev/null)}"
CXX_FILES        := $(shell find csrc -name '*.cpp' -o -name '*.h')
LAUNCH           := $(BIN)/python tools/launch.py

# What the sanitizers run: the tests that go through the extension, without those that start processes themselves.
SANITIZE_RANKS ?= 1 2
SANITIZE_TESTS ?= tests --ignore-glob='*test_nn*'
SANITIZE_DIR   := build/sanitize
SANITIZE_ENV    = PYTHONPATH=$(CURDIR)/$(SANITIZE_DIR)/lib PYTHONSAFEPATH=1 HPC_MOE_TEST_STEP_LIMIT=200 \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libstdc++.so)"

.PHONY: help demo example test lint format sanitize bench venv build clean distclean FORCE
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

# The extension is built in place (an editable install). A missing one, or other flags, build it again.
$(VENV)/.extension: $(VENV)/.installed $(VENV)/.headers $(EXTENSION_SOURCE) $(if $(wildcard hpc_moe/_C*.so),,FORCE)
	@echo "building the extension (editable install)"
	@$(BUILD_ENV) HPC_MOE_CMAKE_ARGS="$(CMAKE_ARGS)" \
		$(BIN)/pip install -q --no-build-isolation --no-deps --editable .
	@touch $@

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
	$(BUILD_ENV) HPC_MOE_CMAKE_ARGS="$(CMAKE_ARGS) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DHPC_MOE_SANITIZE=address,undefined" \
		$(BIN)/python setup.py -q build --build-base $(SANITIZE_DIR) --build-lib $(SANITIZE_DIR)/lib
	$(SANITIZE_ENV) $(BIN)/python -c 'import hpc_moe._C as c; assert "$(SANITIZE_DIR)" in c.__file__, c.__file__'
	@set -e; for ranks in $(SANITIZE_RANKS); do echo "===== sanitizers, $$ranks rank(s) ====="; \
		OMP_NUM_THREADS=2 $(LAUNCH) -n $$ranks --limit 600 -- env $(SANITIZE_ENV) \
			$(BIN)/pytest -q -p no:cacheprovider --color=no --capture=sys --timeout=300 --with-mpi -m "mpi and not launcher" $(SANITIZE_TESTS); \
	done

clean:
	rm -rf build dist hpc_moe.egg-info hpc_moe/_C*.so $(VENV)/.extension .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hpc_moe tests tools examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
