"""What `import hpc_moe` adds to importing torch and mpi4py, each time in a fresh interpreter.

    python benchmarks/import_time.py --out benchmarks/results/import_time.json

Names are imported when first used; so `Buffer` is used, too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from common import write_results

PROGRAM = """
import time
import torch
from mpi4py import MPI
begin = time.perf_counter()
import hpc_moe
hpc_moe.Buffer
print(time.perf_counter() - begin)
"""


def main() -> None:
    """Parse the options, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    seconds = [
        float(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
        for _ in range(options.runs)
    ]
    result = {"median_s": statistics.median(seconds), "max_s": max(seconds), "runs": options.runs}
    print(f"import hpc_moe adds {result['median_s']:.3f} s (at most {result['max_s']:.3f} s in {options.runs} runs)")
    if options.out:
        write_results(options.out, {"benchmark": "import_time", **result})


if __name__ == "__main__":
    main()
