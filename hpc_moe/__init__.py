"""hpc_moe: expert-parallel communication (Mixture-of-Experts dispatch and combine) for MPI programs.

Start with `Buffer`. `hpc_moe.nn` has differentiable forms and a module, `hpc_moe.testing` a reference implementation.

What is exported is imported when it is first used, so that `hpc_moe doctor` can say what is wrong with an installation
in which torch, MPI or the extension cannot be loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import config, fp8
    from .buffer import Buffer, topk_idx_t
    from .config import Config
    from .errors import ArgumentError, BootstrapError, Error, PeerTimeoutError, UnavailableError
    from .events import EventOverlap
    from .handles import DispatchHandle, LowLatencyHandle

_MODULE_OF = {
    "ArgumentError": "errors",
    "BootstrapError": "errors",
    "Buffer": "buffer",
    "Config": "config",
    "DispatchHandle": "handles",
    "Error": "errors",
    "EventOverlap": "events",
    "LowLatencyHandle": "handles",
    "PeerTimeoutError": "errors",
    "UnavailableError": "errors",
    "topk_idx_t": "buffer",
}

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
    "config",
    "fp8",
    "topk_idx_t",
]


def __getattr__(name: str) -> Any:
    if name in ("config", "fp8"):
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hpc_moe' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
