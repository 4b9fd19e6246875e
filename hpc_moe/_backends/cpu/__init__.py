"""The CPU backend: the C++ runtime for the work inside a rank, MPI for the bytes between ranks.

`backend.py` owns windows, messages and counters, and starts and ends every call; `dispatch.py`, `combine.py` and
`low_latency.py` are the calls; `announcement.py` is what each begins with. `docs/follow-a-token.md` walks through them.
"""

from .backend import CpuBackend

__all__ = ["CpuBackend"]
