"""`copy.deepcopy` of modules that hold what cannot be copied: communicators and buffers, which the copy shares."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

M = TypeVar("M", bound=torch.nn.Module)


def copy_sharing(module: M, memo: dict[int, Any], *shared: object) -> M:
    """A deep copy that refers to the same `shared` objects. For a module's `__deepcopy__`."""
    memo.update({id(each): each for each in shared})
    copied = type(module).__new__(type(module))
    memo[id(module)] = copied
    copied.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return copied
