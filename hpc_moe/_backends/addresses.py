"""Addresses of tensors and arrays, for the C++ core; whoever passes one keeps the memory alive."""

from __future__ import annotations

import ctypes

import numpy as np
import torch


def address(memory: torch.Tensor | np.ndarray | None) -> int:
    """Where a tensor or an array begins; 0 for None."""
    if memory is None:
        return 0
    return memory.data_ptr() if isinstance(memory, torch.Tensor) else int(memory.ctypes.data)


def array_at(where: int, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """A view of memory that somebody else keeps alive."""
    count = int(np.prod(shape))
    if count == 0:
        return np.empty(shape, dtype)
    raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(where)
    return np.frombuffer(memoryview(raw), dtype).reshape(shape)
