"""hpc_moe: expert-parallel communication (Mixture-of-Experts dispatch and combine) for MPI programs.

Start with `Buffer`. `hpc_moe.nn` has differentiable forms and a module, `hpc_moe.testing` a reference implementation.
"""

from . import fp8
from ._version import __version__
from .buffer import Buffer, topk_idx_t
from .config import Config
from .errors import ArgumentError, BootstrapError, Error, PeerTimeoutError, UnavailableError
from .events import EventOverlap
from .handles import DispatchHandle, LowLatencyHandle

__all__ = [
    "ArgumentError",
    "BootstrapError",
    "Buffer",
    "Config",
    "DispatchHandle",
    "Error",
    "EventOverlap",
    "LowLatencyHandle",
    "PeerTimeoutError",
    "UnavailableError",
    "__version__",
    "fp8",
    "topk_idx_t",
]
