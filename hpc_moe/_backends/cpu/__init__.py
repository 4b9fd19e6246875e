"""The CPU backend: the C++ runtime for the work inside a rank, MPI for the bytes between ranks.

`backend.py` owns windows, messages and counters, and starts and ends every call; `normal.py` is dispatch and combine,
`low_latency.py` their low-latency forms, `messages.py` what goes over MPI. `docs/follow-a-token.md` walks through them.
"""

from .backend import CpuBackend

__all__ = ["CpuBackend"]
