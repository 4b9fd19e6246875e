"""Collecting tensors of different shapes from all ranks of an mpi4py communicator.

For tests and comparisons, where the inputs of all ranks are needed in one place. Not for production: the calls are
blocking collectives with no time limit, and every rank ends up with everything.
"""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI

_DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)
_MAX_NDIM = 6


def gather_tensors(comm: MPI.Intracomm, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return every rank's tensor, in rank order, on the CPU. Collective.

    Args:
        comm: the communicator.
        tensor: any shape of up to 6 dimensions, any strides, on any device; shape and dtype may differ between ranks.
            All ranks' tensors together must be smaller than 2 GiB.

    Returns:
        R contiguous CPU tensors with the shapes and dtypes that the ranks passed.

    Raises:
        ValueError: on every rank, if some rank's dtype or number of dimensions is not supported.
    """
    header = np.full(2 + _MAX_NDIM, -1, dtype=np.int64)
    if tensor.dtype in _DTYPES and tensor.dim() <= _MAX_NDIM:
        header[0], header[1] = _DTYPES.index(tensor.dtype), tensor.dim()
        header[2 : 2 + tensor.dim()] = tensor.shape
    headers = np.empty((comm.Get_size(), header.size), dtype=np.int64)
    comm.Allgather(header, headers)
    if (headers[:, 0] < 0).any():
        bad = [int(rank) for rank in np.flatnonzero(headers[:, 0] < 0)]
        raise ValueError(f"gather_tensors: dtype or number of dimensions not supported on ranks {bad}")

    dtypes = [_DTYPES[row[0]] for row in headers]
    shapes = [tuple(int(n) for n in row[2 : 2 + row[1]]) for row in headers]
    num_bytes = [
        int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    send = _to_bytes(tensor)
    recv = np.empty(sum(num_bytes), dtype=np.uint8)
    comm.Allgatherv([send, MPI.BYTE], [recv, num_bytes, MPI.BYTE])

    gathered = []
    begin = 0
    for shape, dtype, size in zip(shapes, dtypes, num_bytes, strict=True):
        raw = torch.from_numpy(recv[begin : begin + size].copy())
        gathered.append(raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype))
        begin += size
    return gathered


def _to_bytes(tensor: torch.Tensor) -> np.ndarray:
    # Not contiguous(): it leaves a single element's stride as it is, and view() wants 1.
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, dtype=np.uint8)
