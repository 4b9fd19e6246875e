"""The CUDA backend: kernels that write into the peers' windows over NVLink.

`device.py` chooses the GPU; `backend.py` owns the runtime, the streams and the errors; `dispatch.py`, `combine.py` and
`low_latency.py` are the calls; `pool.py` is the registered memory that results lie in, `tensors.py` makes those of
low-latency calls; `streams.py` is who waits for whom; `reports.py` turns what kernels report into exceptions;
`nvshmem.py` starts NVSHMEM, `region.py` is the memory that low-latency calls have of it, `masks.py` the ranks that they
go on without.
"""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
