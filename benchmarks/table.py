"""Print the README's benchmark tables from the committed results: `python benchmarks/table.py`.

The table of the GPUs has a column for each results/gpu_*.json; without any it is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    loaded: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return loaded


def mebibytes(num_bytes: int) -> str:
    """Rounded, with the unit."""
    return f"{num_bytes / 2**20:.0f} MiB"


def rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What is measured, then a column for each result."""

    def times(label: str, name: str) -> tuple[str, ...]:
        return (label, *(f"{r['normal']['times'][name]['median_ms']:.2f} ms" for r in results))

    def low_latency(name: str) -> tuple[str, ...]:
        return (f"low-latency {name}", *(f"{1e3 * r['low_latency'][name]['median_ms']:.0f} us" for r in results))

    def memory(label: str, side: str) -> tuple[str, ...]:
        peaks = (r["normal"]["peak_memory_bytes"][side] for r in results)
        return (
            label,
            *(f"{mebibytes(p['resident'])} ({mebibytes(p['shared'])} shared)" for p in peaks),
        )

    return [
        times("layout + dispatch + combine: hpc_moe", "hpc_moe"),
        times("the same by hand", "by_hand"),
        ("**times as fast**", *(f"**{r['normal']['speedup']:.1f}**" for r in results)),
        memory("peak memory of a rank: hpc_moe", "hpc_moe"),
        memory("peak memory of a rank: by hand", "by_hand"),
        times("layout alone", "layout"),
        times("cached dispatch alone", "cached dispatch"),
        times("combine alone", "combine"),
        *(low_latency(name) for name in results[0]["low_latency"] if name != "tokens"),
    ]


def print_table(header: list[str], body: list[tuple[str, ...]]) -> None:
    """As Markdown."""
    print(f"| | {' | '.join(header)} |")
    print("| --- |" + " --- |" * len(header))
    for row in body:
        print(f"| {' | '.join(row)} |")
    print()


def cpu_table() -> None:
    """Print the table of the CPU runtime and what it was measured on."""
    results = [load("cpu_2_ranks.json"), load("cpu_4_ranks.json")]
    machine, settings, imported = results[0]["machine"], results[0]["settings"], load("import_time.json")
    print_table([f"{r['ranks']} ranks" for r in results], rows(results))
    print(
        f"Medians on {machine['cores']} cores of an {machine['cpu']} ({machine['architecture']}), {machine['mpi']}, "
        f"torch {machine['torch']}: {settings['tokens']} tokens a rank, hidden {settings['hidden']}, bf16, top-"
        f"{settings['top_k']} of {settings['experts']}, one thread a rank; low-latency calls with "
        f"{settings['low_latency_tokens']} tokens. `import hpc_moe` adds {imported['median_s']:.2f} s to importing "
        "torch and mpi4py."
    )


# --- GPUs -------------------------------------------------------------------------------------------------------------

MAIN_SMS = 24


def find(result: dict[str, Any], name: str, num_sms: int | None = None) -> dict[str, Any] | None:
    """The main figures' record of this name (at the smallest buffer), or NCCL's; None where there is none."""
    found = [
        record
        for record in result["results"]
        if record["part"] in ("main", "quick", "nccl")
        and record["name"].startswith(name)
        and "median_us" in record
        and num_sms in (None, record.get("num_sms"))
    ]
    return min(found, key=lambda record: int(record.get("num_nvl_bytes", 0)), default=None)


def gpu_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What is measured, then a column for each result."""

    def times(label: str, name: str, num_sms: int | None = None) -> tuple[str, ...]:
        records = [find(result, name, num_sms) for result in results]
        return (label, *(f"{r['median_us']:.0f} us ({r['share_of_ceiling']:.1%})" if r else "–" for r in records))

    def ceiling(row_bytes: int) -> tuple[str, ...]:
        rates = [result["push_ceiling_gb_per_s"].get(str(row_bytes)) for result in results]
        return (f"push ceiling, rows of {row_bytes // 1024} KiB", *(f"{r:.0f} GB/s" if r else "–" for r in rates))

    calls = ("dispatch bf16, cached", "dispatch fp8, cached", "combine bf16")
    uncached = ("dispatch bf16, uncached", "dispatch fp8, uncached")
    return [
        *(times(f"**{name}**", name, MAIN_SMS) for name in calls),
        *(times(name, name, MAIN_SMS) for name in uncached),
        *(times(f"{name}, 16 SMs", name, 16) for name in calls),
        times("NCCL all-to-all of the same bf16 rows", "NCCL all-to-all, rows of 14336"),
        ceiling(14336),
        ceiling(7168),
    ]


def gpu_table(results: list[dict[str, Any]]) -> None:
    """Print the table of the GPUs and what it was measured on."""
    machine, settings = results[0]["machine"], results[0]["settings"]
    print_table([f"{r['ranks']} GPUs" for r in results], gpu_rows(results))
    buffers = []
    for result in results:
        record = find(result, "dispatch bf16, cached", MAIN_SMS)
        if record:
            size = mebibytes(record["num_nvl_bytes"])
            passes = "1 pass" if record["passes"] == 1 else f"{record['passes']:.3g} passes"
            buffers.append(f"{size} on {result['ranks']} ({passes} a dispatch)")
    gpus = " and ".join(sorted({result["machine"]["gpu"] for result in results}))
    print(
        f"Stream time on {gpus} (driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"{machine['mpi']}, NCCL {machine['nccl']}): medians of {settings['iterations']} calls of the slowest rank, "
        f"{settings['tokens']} tokens a rank, hidden 7168, top-8 of 256, {MAIN_SMS} SMs where no other number is "
        f"given; in brackets, the share of the push ceiling of the same run. `num_nvl_bytes`: {', '.join(buffers)}."
    )
    for result in results:
        for record in result["results"]:
            if "error" in record:
                print(f"FAILED on {result['ranks']} GPUs: {record['part']}: {record['name']}: {record['error']}")


def main() -> None:
    """Print the tables."""
    cpu_table()
    gpu_results = sorted(
        (load(path.name) for path in RESULTS.glob("gpu_*.json")), key=lambda result: int(result["ranks"])
    )
    if gpu_results:
        print()
        gpu_table(gpu_results)


if __name__ == "__main__":
    main()
