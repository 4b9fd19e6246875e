"""Print the README's benchmark tables from the committed results: `python benchmarks/table.py`.

The tables of the GPUs have a column for each results/gpu_*_ranks.json, and for low-latency calls for each
results/gpu_low_latency_*_ranks.json; without any they are left out.
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
    print_failures(results)


def print_failures(results: list[dict[str, Any]]) -> None:
    """What these tables cannot show."""
    for result in results:
        for record in result["results"]:
            if "error" in record:
                print(f"FAILED on {result['ranks']} GPUs: {record['part']}: {record['name']}: {record['error']}")


# --- low-latency calls on GPUs ----------------------------------------------------------------------------------------


def find_low_latency(result: dict[str, Any], part: str, name: str, tokens: int) -> dict[str, Any] | None:
    """The record of this name; None where there is none, or not of this part and so many tokens (as many as M)."""
    for record in result["results"]:
        if (record["part"], record["name"], record.get("tokens")) == (part, name, tokens) and "error" not in record:
            return dict(record)
    return None


def low_latency_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What is measured, then a column for each result."""

    def show(label: str, part: str, name: str, tokens: int = 128, key: str = "median_us") -> tuple[str, ...]:
        records = [find_low_latency(result, part, name, tokens) for result in results]
        return (label, *(f"{record[key]:.1f} us" if record and key in record else "–" for record in records))

    both, per_expert = "dispatch + combine", "row per expert"
    in_graph = f"graph of {next((r['graph_calls'] for r in results[0]['results'] if 'graph_calls' in r), 20)}"
    return [
        *(show(f"**{name}**", "main", name) for name in ("dispatch", "combine", both)),
        *(show(f"{name}, in a graph", "main", f"{name}, {in_graph}") for name in ("dispatch", "combine", both)),
        show(f"{both}, a graph of one", "main", f"{both}, graph of 1"),
        show(f"{both}, launches included, in a loop", "main", f"{both}, launches included, in a loop"),
        show(f"{both}, launches included, after a pause", "main", f"{both}, launches included"),
        show(f"combine, {per_expert}", "main", f"combine, {per_expert}"),
        show(f"{both}, {per_expert}, in a graph", "main", f"{both}, {per_expert}, {in_graph}"),
        show("dispatch bf16", "formats", "dispatch, bf16"),
        show("combine, logarithmic format", "formats", "combine, logfmt"),
        *(show(f"{name}, 1 token, in a graph", "tokens", f"{name}, {in_graph}", 1) for name in ("dispatch", "combine")),
        *(
            show(f"{both}, {count} tokens, in a graph", "tokens", f"{both}, {in_graph}", count)
            for count in (8, 32, 512)
        ),
        show("dispatch, of the CPU", "host", "dispatch, CPU", key="host_us"),
        show("combine, of the CPU", "host", "combine, CPU", key="host_us"),
        ("ranks that a token goes to", *(f"{ranks_per_token(result)}" for result in results)),
    ]


def ranks_per_token(result: dict[str, Any]) -> str:
    """With what it is compared with."""
    record = find_low_latency(result, "main", "rows of a token", 128)
    return f"{record['ranks_per_token']:.2f} (of {record['experts_per_token']} experts)" if record else "–"


def low_latency_table(results: list[dict[str, Any]]) -> None:
    """Print the table of low-latency calls on GPUs and what it was measured on."""
    machine, settings = results[0]["machine"], results[0]["settings"]
    print_table([f"{r['ranks']} GPUs" for r in results], low_latency_rows(results))
    buffers = []
    for result in results:
        record = find_low_latency(result, "main", "dispatch", 128)
        if record:
            buffers.append(f"{mebibytes(record['num_rdma_bytes'])} on {result['ranks']}")
    gpus = " and ".join(sorted({result["machine"]["gpu"] for result in results}))
    print(
        f"Stream time on {gpus} (driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}, "
        f"{machine['mpi']}): medians of {settings['iterations']} calls of the slowest rank, 128 tokens a rank where no "
        "other number is given (M is the same), hidden 7168, top-8 of 256, fp8 dispatch and bf16 combine, weights "
        'given at dispatch but for "row per expert"; in a graph, the time of one of the calls captured. '
        f"`num_rdma_bytes`: {', '.join(buffers)}."
    )
    print_failures(results)


def load_all(pattern: str) -> list[dict[str, Any]]:
    """The committed results of these names, by number of ranks."""
    return sorted((load(path.name) for path in RESULTS.glob(pattern)), key=lambda result: int(result["ranks"]))


def main() -> None:
    """Print the tables."""
    cpu_table()
    for pattern, table in (("gpu_[0-9]*_ranks.json", gpu_table), ("gpu_low_latency_*_ranks.json", low_latency_table)):
        results = load_all(pattern)
        if results:
            print()
            table(results)


if __name__ == "__main__":
    main()
