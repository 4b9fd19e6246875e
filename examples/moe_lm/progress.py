"""Progress on rank 0: a bar that is redrawn on a terminal, a line now and then everywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import numpy as np

from moe_lm.training import StepRecord

_LINES_PER_RUN = 20  # where there is no terminal
_REDRAWS_PER_SECOND = 10
_SMOOTHING = 0.9  # of the loss shown


def terminal_width() -> int | None:
    """Columns of the terminal that shows this process's standard output; None if that is not a terminal.

    Open MPI gives its processes a pseudo-terminal wherever the output goes in the end, so that the parent process, the
    launcher, has to be asked too.
    """
    if not sys.stdout.isatty():
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(f"/proc/{os.getppid()}/fd/1", os.O_WRONLY | os.O_NOCTTY)
        try:
            return os.get_terminal_size(descriptor).columns or 80 if os.isatty(descriptor) else None
        finally:
            os.close(descriptor)
    return os.get_terminal_size().columns or 80


class Progress:
    """Shows the records of one training run.

    Args:
        first: steps done before.
        last: the step after which the run ends.
        batch_bytes: bytes of text per step.
        style: `"bar"`, `"lines"` or `"auto"`.
    """

    def __init__(self, first: int, last: int, batch_bytes: int, style: str) -> None:
        width = terminal_width()
        self.columns = (width or 100) if style == "bar" or (style == "auto" and width) else 0  # 0: lines
        self.first, self.last, self.batch_bytes = first, last, batch_bytes
        self.bits: float | None = None
        self.begin = time.monotonic()
        self.drawn = 0.0
        self.records: list[StepRecord] = []  # since the last time something was shown

    def show(self, record: StepRecord) -> None:
        """Take in the record of the step that has just ended."""
        self.records.append(record)
        self.bits = record.bits if self.bits is None else _SMOOTHING * self.bits + (1 - _SMOOTHING) * record.bits
        now = time.monotonic()
        is_last = record.step == self.last
        if self.columns:
            if is_last or now - self.drawn > 1 / _REDRAWS_PER_SECOND:
                self.drawn = now
                print("\r" + self._bar(record.step, now), end="\n" if is_last else "", flush=True)
                self.records = self.records[-20:]
        elif is_last or (record.step - self.first) % max(1, (self.last - self.first) // _LINES_PER_RUN) == 0:
            print(f"step {record.step:>5}/{self.last}  {self._figures(record.step, now)}", flush=True)
            self.records = []

    def _figures(self, step: int, now: float) -> str:
        seconds = sum(record.seconds for record in self.records)
        dispatch = sum(record.dispatch_seconds for record in self.records) / seconds
        combine = sum(record.combine_seconds for record in self.records) / seconds
        load = np.mean([record.busiest_over_mean for record in self.records])
        left = (now - self.begin) / (step - self.first) * (self.last - step)
        return (
            f"{self.bits:.3f} bits/byte  {len(self.records) * self.batch_bytes / seconds:6,.0f} tokens/s  "
            f"dispatch {dispatch:3.0%} combine {combine:3.0%}  load {load:.2f}  {left // 60:.0f}:{left % 60:02.0f} left"
        )

    def _bar(self, step: int, now: float) -> str:
        figures = self._figures(step, now)
        counter = f"{step}/{self.last}"
        room = max(5, min(40, self.columns - len(figures) - len(counter) - 5))
        done = round(room * (step - self.first) / (self.last - self.first))
        return f"{counter} {'━' * done}{'┄' * (room - done)} {figures} "[: self.columns - 1]
