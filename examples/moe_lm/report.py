"""What a run leaves behind: a JSON with machine, versions, settings and curves. `picture.py` draws them."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import hpc_moe
from moe_lm.settings import Settings
from moe_lm.training import History, StepRecord
from moe_lm.waiting import wait


def describe_machine(comm: MPI.Intracomm) -> dict[str, Any]:
    """Machine and versions. Collective."""
    name = np.zeros(MPI.MAX_PROCESSOR_NAME, np.uint8)
    name[: len(MPI.Get_processor_name())] = np.frombuffer(MPI.Get_processor_name().encode(), np.uint8)
    names = np.empty((comm.Get_size(), name.size), np.uint8)
    wait(comm.Iallgather(name, names), "the host names of all ranks")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": comm.Get_size(),
        "hosts": sorted({row.tobytes().rstrip(b"\0").decode() for row in names}),
        "cpu": _cpu_name(),
        "cores_of_rank_0": len(os.sched_getaffinity(0)),
        "threads_per_rank": torch.get_num_threads(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "mpi": MPI.Get_library_version().split(",")[0].strip(),
        "hpc_moe": hpc_moe.__version__,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_json(
    path: Path,
    machine: dict[str, Any],
    settings: Settings,
    history: History,
    single: History | None,
    sample: str,
) -> None:
    """Write all of it. Curves are lists, one value per step."""
    content: dict[str, Any] = {
        "machine": machine,
        "settings": asdict(settings),
        "summary": summary(history, settings, single),
        "sample": sample,
        "curves": _curves(history.records),
        "evaluations": {
            "step": [s for s, _ in history.evaluations],
            "bits_per_byte": [b for _, b in history.evaluations],
        },
        "expert_load": {"steps_per_column": history.load_bin, "columns_layers_experts": history.expert_load},
    }
    if single is not None:
        content["single_process_curves"] = _curves(single.records)
    spread = json.dumps(content, indent=1)
    path.write_text(re.sub(r"\n {2,}\]", " ]", re.sub(r"\n {3,}", " ", spread)) + "\n")  # a list to a line


def _curves(records: list[StepRecord]) -> dict[str, list[float]]:
    digits = 6
    return {key: [round(getattr(record, key), digits) for record in records] for key in StepRecord.__dataclass_fields__}


def summary(history: History, settings: Settings, single: History | None) -> dict[str, float]:
    """The figures worth quoting."""
    records = history.records
    seconds = sum(record.seconds for record in records)
    figures = {
        "first_bits_per_byte": records[0].bits,
        "last_bits_per_byte": float(np.mean([record.bits for record in records[-20:]])),
        "held_out_bits_per_byte": history.evaluations[-1][1],
        "seconds": seconds,
        "tokens_per_second": len(records) * settings.batch * settings.context / seconds,
        "dispatch_share": sum(record.dispatch_seconds for record in records) / seconds,
        "combine_share": sum(record.combine_seconds for record in records) / seconds,
        "synchronize_share": sum(record.synchronize_seconds for record in records) / seconds,
        "busiest_over_mean_load": float(np.mean([record.busiest_over_mean for record in records[-20:]])),
    }
    if single is not None:
        figures["largest_difference_to_single_process"] = max(differences(history, single))
        figures["mean_difference_to_single_process"] = float(np.mean(differences(history, single)))
    return figures


def differences(history: History, single: History) -> list[float]:
    """Absolute differences of the two runs' losses in bits per byte, for each step that both have."""
    expected = {record.step: record.bits for record in single.records}
    return [abs(record.bits - expected[record.step]) for record in history.records if record.step in expected]
