"""Contents of the rows of stress.py: functions of a token's key, the channel and the number of the call."""

from __future__ import annotations

import torch

Named = dict[str, torch.Tensor | None]


def contents(keys: torch.Tensor, width: int, num_bits: int, salt: int) -> torch.Tensor:
    """`[len(keys), width]` integers of `num_bits` (at most 31), sign included; zeros where the key is 0."""
    most = 2**31 - 1
    columns = torch.arange(width, device=keys.device)
    mixed = (keys * 0x9E3779B1 + salt * 0x85EBCA6B)[:, None] + columns * 0xC2B2AE35
    mixed = (mixed ^ mixed >> 15) & most
    mixed = mixed * 0x2C1B3C6D & most
    mixed = (mixed ^ mixed >> 12) * 0x297A2D39 & most
    return ((mixed >> (31 - num_bits)) - (1 << num_bits - 1)) * (keys != 0)[:, None]
