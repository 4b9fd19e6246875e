"""The CUDA backend: kernels that write into the peers' windows over NVLink.

`device.py` chooses the GPU; `backend.py` owns the runtime, the streams and the errors; `dispatch.py` and `combine.py`
are the calls; `pool.py` is the registered memory that results lie in; `streams.py` is who waits for whom; `reports.py`
turns what kernels report into exceptions; `nvshmem.py` starts NVSHMEM.
"""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
