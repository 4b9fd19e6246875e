"""Tools for testing what is built on hpc_moe: a reference implementation, routings, a slow buffer for any dtype.

- `reference`: what every `Buffer` call must return, computed from the inputs of all ranks;
- `logfmt`: the logarithmic format of low-latency combine;
- `make_topk_idx`, `make_topk_weights`: routings, balanced or nasty;
- `gather_tensors`: all ranks' tensors on every rank;
- `ReferenceBuffer`: `dispatch` and `combine` in any floating dtype.

`import hpc_moe` does not import this package.
"""

from hpc_moe.testing import logfmt, reference
from hpc_moe.testing.comm import gather_tensors
from hpc_moe.testing.reference_buffer import ReferenceBuffer
from hpc_moe.testing.routing import ROUTING_KINDS, make_topk_idx, make_topk_weights

__all__ = [
    "ROUTING_KINDS",
    "ReferenceBuffer",
    "gather_tensors",
    "logfmt",
    "make_topk_idx",
    "make_topk_weights",
    "reference",
]
