"""`TensorKind`: tensors that are made again and again, with less ado than by torch's own functions.

A low-latency call takes longer on the CPU than on the GPU, and making tensors is the largest part of that. What they
hold is undefined, also where torch.use_deterministic_algorithms has torch's functions fill them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TensorKind", "view_of"]

# What the code calls that the compiler of torch writes: half the time of torch.empty_strided and as_strided. No part
# of the interface of torch: where they are missing, the others do.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_on_current_device: Callable[..., Any] | None = getattr(_guards, "_empty_strided_cuda", None)
_reinterpret: Callable[..., Any] | None = getattr(_guards, "_reinterpret_tensor", None)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)  # builds without CUDA: none


@dataclass(frozen=True, eq=False)
class TensorKind:
    """What tensors have in common.

    Attributes:
        shape: of each.
        strides: in elements.
        dtype: of each.
        device: that they lie on.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> torch.Tensor:
        """One more; what it holds is undefined."""
        if _empty_on_current_device is not None and _current_device() == self.device.index:
            tensor: torch.Tensor = _empty_on_current_device(self.shape, self.strides, self.dtype)
            return tensor
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def view_of(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    """Elements of a tensor's memory from the element `offset` of the tensor on, which needs no gradient."""
    if _reinterpret is None:
        return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)
    view: torch.Tensor = _reinterpret(tensor, shape, strides, offset)
    return view
