"""The pool: registered memory at the end of the window, in which results lie where the peers can write them.

A block is handed out as a torch tensor. When the last tensor that views it is gone, the block may be used again after
the work that the current stream had been given at that moment: whoever used it on another stream must have joined that
one. Not for memory that a CUDA graph refers to: torch cannot tell how long a graph needs it.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ... import _C

_ALIGNMENT = 256
_windows: weakref.WeakSet[_C.Window] = weakref.WeakSet()  # all that may hold live tensors


def lies_in_a_window(tensor: torch.Tensor) -> bool:
    """Whether the tensor is memory of a pool, of any buffer, which torch's allocator knows nothing of."""
    address = tensor.data_ptr()
    return any(window.address <= address < window.address + window.num_bytes for window in _windows)


class WindowMemory:
    """Bytes of a window as torch takes them (the CUDA array interface); tensors that view them keep this alive."""

    def __init__(self, window: _C.Window, offset: int, num_bytes: int) -> None:
        self._window = window  # keeps the memory allocated, also when the buffer is destroyed
        _windows.add(window)
        self.offset, self.num_bytes = offset, num_bytes
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (window.address + offset, False),
            "version": 2,
        }


class _Block(WindowMemory):
    """Memory of the pool, which goes back to it."""

    def __init__(self, pool: Pool, offset: int, num_bytes: int) -> None:
        super().__init__(pool.window, offset, num_bytes)
        self._pool = weakref.ref(pool)

    def __del__(self) -> None:
        pool = self._pool()
        if pool is not None:
            pool._take_back(self.offset, self.num_bytes)


@dataclass
class _Returned:
    """A block that may still be in use by work that was under way when it was given back; event None: not known yet."""

    offset: int
    num_bytes: int
    event: torch.cuda.Event | None


class Pool:
    """First fit, from either end, with neighbours merged. Thread-safe, for tensors may die in any thread."""

    def __init__(self, window: _C.Window, begin: int, num_bytes: int, device: torch.device) -> None:
        self.window = window
        self._device = device
        first = -(-begin // _ALIGNMENT) * _ALIGNMENT
        size = (begin + num_bytes - first) // _ALIGNMENT * _ALIGNMENT
        self._free: list[tuple[int, int]] = [(first, size)] if size > 0 else []  # offset and bytes, sorted
        self._returned: list[_Returned] = []
        self._lock = threading.RLock()

    def allocate(self, num_bytes: int, stream: torch.cuda.Stream, from_end: bool) -> torch.Tensor | None:
        """Memory for use on `stream`, `[num_bytes] uint8`, or None if there is no room.

        What is small and lives long belongs at the end, where it does not part the room for what is large.
        """
        wanted = max(_ALIGNMENT, -(-num_bytes // _ALIGNMENT) * _ALIGNMENT)
        with self._lock:
            self._reclaim(None)
            offset = self._fit(wanted, from_end)
            if offset is None and self._returned:
                self._reclaim(stream)
                offset = self._fit(wanted, from_end)
            if offset is None:
                return None
            block = _Block(self, offset, wanted)
        return torch.as_tensor(block, device=self._device)[:num_bytes]

    def _fit(self, wanted: int, from_end: bool) -> int | None:
        for index in range(len(self._free))[:: -1 if from_end else 1]:
            offset, size = self._free[index]
            if size < wanted:
                continue
            taken, left = (offset + size - wanted, offset) if from_end else (offset, offset + wanted)
            self._free[index : index + 1] = [(left, size - wanted)] if size > wanted else []
            return taken
        return None

    def _take_back(self, offset: int, num_bytes: int) -> None:
        event = None
        with torch.cuda.device(self._device):
            if not torch.cuda.is_current_stream_capturing():  # a captured event would say nothing about the present
                event = torch.cuda.Event()
                event.record()
        with self._lock:
            self._returned.append(_Returned(offset, num_bytes, event))

    def _reclaim(self, stream: torch.cuda.Stream | None) -> None:
        """Make blocks free whose last use has ended; with a stream, all: the stream waits for it."""
        still_in_use = []
        for block in self._returned:
            if block.event is None:
                block.event = torch.cuda.Event()
                block.event.record(torch.cuda.current_stream(self._device))
            if stream is not None:
                stream.wait_event(block.event)
            elif not block.event.query():
                still_in_use.append(block)
                continue
            self._insert(block.offset, block.num_bytes)
        self._returned = still_in_use

    def _insert(self, offset: int, num_bytes: int) -> None:
        merged: list[tuple[int, int]] = []
        for begin, size in sorted([*self._free, (offset, num_bytes)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((begin, size))
        self._free = merged
