"""Training text that is on every machine: the sources of Python's standard library, as bytes.

The order of the training windows depends on the seed and the step only, never on the number of ranks.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from moe_lm.waiting import wait

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "pydoc_data"}
_HELD_OUT_EVERY = 20  # one file in so many is held out


@dataclass(frozen=True)
class Text:
    """`train` and `held_out`: `[num_bytes] uint8`, whole files one after the other."""

    train: np.ndarray
    held_out: np.ndarray


def read_stdlib(comm: MPI.Intracomm, max_bytes: int, seed: int) -> Text:
    """Read the text on rank 0 and send it to all. Collective.

    Files are taken in an order drawn from the seed, until `max_bytes` are reached.

    Raises:
        RuntimeError: on every rank, if rank 0 finds no sources; or rank 0 did not come.
    """
    parts = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
    if comm.Get_rank() == 0:
        parts = _read_files(Path(sysconfig.get_paths()["stdlib"]), max_bytes, seed)
    sizes = np.array([part.size for part in parts], dtype=np.int64)
    wait(comm.Ibcast(sizes, 0), "the text of rank 0")
    if not sizes.all():
        raise RuntimeError(f"found too few Python sources under {sysconfig.get_paths()['stdlib']}")
    if comm.Get_rank() != 0:
        parts = [np.empty(size, np.uint8) for size in sizes]
    for part in parts:
        wait(comm.Ibcast(part, 0), "the text of rank 0")
    return Text(*parts)


def _read_files(folder: Path, max_bytes: int, seed: int) -> list[np.ndarray]:
    paths = sorted(
        path for path in folder.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts)
    )
    chunks: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    for number, index in enumerate(np.random.default_rng([seed, 1]).permutation(len(paths))):
        content = paths[index].read_bytes()
        chunks[number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1].append(content)
        size += len(content)
        if size >= max_bytes:
            break
    return [np.frombuffer(b"".join(chunk), np.uint8) for chunk in chunks]


def training_windows(text: Text, step: int, batch: int, context: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step: input bytes and the bytes that follow, both `[batch, context] int64`."""
    return _windows(text.train, np.random.default_rng([seed, 2, step]), batch, context)


def held_out_windows(text: Text, batch: int, context: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out windows, the same ones every time; shapes as `training_windows`."""
    return _windows(text.held_out, np.random.default_rng([seed, 3]), batch, context)


def _windows(
    data: np.ndarray, random: np.random.Generator, batch: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    begins = random.integers(0, data.size - context, size=batch)
    windows = torch.from_numpy(np.stack([data[begin : begin + context + 1] for begin in begins]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def own_rows(tensor: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """This rank's block of rows; the first ranks have one more where it does not divide."""
    return tensor.tensor_split(num_ranks)[rank]
