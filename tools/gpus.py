"""Prints how many GPUs the tests and benchmarks can use; or says what is missing, and ends with status 1.

For the Makefile's gpu- targets. `--at-least N` asks for so many.
"""

from __future__ import annotations

import argparse
import importlib
import sys


def count(at_least: int) -> int:
    """The number of GPUs that torch sees. Ends the process where they cannot be used, or are fewer than `at_least`."""
    try:
        import torch
    except ImportError as error:
        raise _missing(f"torch cannot be imported ({error})", "name a Python that has it: GPU_PYTHON=...") from error
    if torch.version.cuda is None:
        remedy = "install a CUDA build of torch there, or name a Python that has one: GPU_PYTHON=/path/to/python3"
        raise _missing(f"its torch {torch.__version__} is a build for CPUs", remedy)
    gpus = torch.cuda.device_count()
    if gpus < at_least:
        seen = f"torch {torch.__version__} sees {gpus or 'no'} GPU{'s' * (gpus != 1)}, and {at_least} are needed"
        raise _missing(seen, "run it in a job with GPUs; look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    try:
        extension = importlib.import_module("hpc_moe._C")
    except ImportError as error:
        raise _missing(f"hpc_moe._C cannot be imported ({error})", "build it: make gpu-build") from error
    if not hasattr(extension, "CudaRuntime"):
        remedy = "make gpu-build HPC_MOE_CUDA=1, which says what its build lacks"
        raise _missing("hpc_moe is built without CUDA", remedy)
    return gpus


def _missing(what: str, remedy: str) -> SystemExit:
    return SystemExit(f"{sys.executable}: {what}.\n  Remedy: {remedy}.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Print how many GPUs can be used.")
    parser.add_argument("--at-least", type=int, default=1, metavar="N", help="the fewest that will do (default: 1)")
    print(count(parser.parse_args().at_least))


if __name__ == "__main__":
    main()
