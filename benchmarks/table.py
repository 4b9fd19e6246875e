"""Print the README's benchmark table from the committed results: `python benchmarks/table.py`."""

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


def main() -> None:
    """Print the table and what it was measured on."""
    results = [load("cpu_2_ranks.json"), load("cpu_4_ranks.json")]
    machine, settings, imported = results[0]["machine"], results[0]["settings"], load("import_time.json")
    print(f"| | {' | '.join(str(r['ranks']) + ' ranks' for r in results)} |")
    print("| --- |" + " --- |" * len(results))
    for row in rows(results):
        print(f"| {' | '.join(row)} |")
    print()
    print(
        f"Medians on {machine['cores']} cores of an {machine['cpu']} ({machine['architecture']}), {machine['mpi']}, "
        f"torch {machine['torch']}: {settings['tokens']} tokens a rank, hidden {settings['hidden']}, bf16, top-"
        f"{settings['top_k']} of {settings['experts']}, one thread a rank; low-latency calls with "
        f"{settings['low_latency_tokens']} tokens. `import hpc_moe` adds {imported['median_s']:.2f} s to importing "
        "torch and mpi4py."
    )


if __name__ == "__main__":
    main()
