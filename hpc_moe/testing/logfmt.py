"""The logarithmic format of `low_latency_combine(use_logfmt=True)` in plain torch.

For tests and for reading; `hpc_moe.fp8` has the other formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpc_moe.fp8 import GROUP_CHANNELS

LOGFMT_CODES = 511  # non-zero codes of 9 bits
LOGFMT_MAX_RANGE = 32.0  # powers of two that the codes may span


def split_groups(x: torch.Tensor) -> torch.Tensor:
    """View `x [..., H]` as `[..., H/128, 128]`."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP_CHANNELS, GROUP_CHANNELS)


@dataclass(frozen=True)
class LogFormat:
    """Groups of 128 channels in the logarithmic format. Letters: G groups.

    Attributes:
        encoded: `[..., G] bool`; False where the group does not fit (largest magnitude 1 or more, or not finite) and
            travels as bf16.
        codes: `[..., G, 128] int64`; 0 is zero, `c` in 1..511 is the magnitude `2^(log_min + (c - 1) * step)`.
        negative: `[..., G, 128] bool`; the sign bits.
        log_min: `[..., G] float32`.
        step: `[..., G] float32`.
        as_bf16: `[..., G, 128] bfloat16`; the values, for the groups that are not encoded.
    """

    encoded: torch.Tensor
    codes: torch.Tensor
    negative: torch.Tensor
    log_min: torch.Tensor
    step: torch.Tensor
    as_bf16: torch.Tensor

    def decode(self) -> torch.Tensor:
        """Return what the receiver reads, float32 `[..., H]`."""
        magnitude = _magnitude(self.codes, self.log_min.double(), self.step.double())
        value = torch.where(self.negative, -magnitude, magnitude).float()
        value = torch.where(self.encoded.unsqueeze(-1), value, self.as_bf16.float())
        return value.flatten(-2)

    def error_bound(self) -> torch.Tensor:
        """Return, as float64 `[..., H]`, the most by which a decoded value may differ from the original.

        Half the distance of the two codes around it, plus what float32 logarithms lose.
        """
        magnitude = split_groups(self.decode().double().abs())
        smallest = torch.exp2(self.log_min.double()).unsqueeze(-1)
        half_gap = (torch.exp2(self.step.double()).unsqueeze(-1) - 1) / 2
        bound = magnitude * (half_gap * 1.05 + 2.0**-14)
        bound = torch.where(self.codes <= 1, bound.maximum(smallest * 0.5001), bound)
        bound = torch.where((self.step == 0).unsqueeze(-1), magnitude * 2.0**-14, bound)
        bound = torch.where(self.as_bf16 == 0, 0.0, bound)
        bf16_rounding = self.as_bf16.double().abs() * 2.0**-8
        return torch.where(self.encoded.unsqueeze(-1), bound, bf16_rounding).flatten(-2)


def encode(x: torch.Tensor) -> LogFormat:
    """Encode `x [..., H]`, H a multiple of 128, group by group of 128 channels.

    With `m` the largest magnitude: encoded if `m < 1` (all zeros are, with code 0 everywhere).
    `log_min = max(log2(smallest non-zero magnitude), log2(m) - 32)` and `step = (log2(m) - log_min) / 510`. A value
    takes the nearer, in linear space, of the two codes around it; below `2^log_min`, of zero and `2^log_min`. Where
    `step` is 0, everything that is not zero takes code 1.
    """
    groups = split_groups(x.double())
    magnitude = groups.abs()
    largest = magnitude.amax(dim=-1)
    smallest = torch.where(magnitude > 0, magnitude, torch.inf).amin(dim=-1)
    non_zero = largest > 0
    encoded = largest < 1  # False for NaN and infinity
    usable = encoded & non_zero
    log_max = torch.where(usable, largest, 1.0).log2()
    log_min = torch.where(usable, smallest, 1.0).log2().maximum(log_max - LOGFMT_MAX_RANGE)
    step = (log_max - log_min) / (LOGFMT_CODES - 1)
    log_min, step = log_min.float(), step.float()

    safe_step = torch.where(step > 0, step, 1.0).double().unsqueeze(-1)
    safe_magnitude = torch.where(magnitude > 0, magnitude, 1.0)
    lower = ((safe_magnitude.log2() - log_min.double().unsqueeze(-1)) / safe_step).floor().long() + 1
    lower = lower.clamp(0, LOGFMT_CODES - 1)
    below = _magnitude(lower, log_min.double(), step.double())
    above = _magnitude(lower + 1, log_min.double(), step.double())
    codes = torch.where((magnitude - below).abs() <= (above - magnitude).abs(), lower, lower + 1)
    codes = torch.where((step == 0).unsqueeze(-1), 1, codes)
    codes = torch.where((magnitude > 0) & encoded.unsqueeze(-1), codes, 0)
    as_bf16 = groups.float().to(torch.bfloat16)
    return LogFormat(encoded, codes, torch.signbit(groups), log_min, step, as_bf16)


def _magnitude(codes: torch.Tensor, log_min: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Magnitudes (float64) of `codes [..., G, 128]`."""
    value = torch.exp2(log_min.unsqueeze(-1) + (codes - 1) * step.unsqueeze(-1))
    return torch.where(codes == 0, 0.0, value)
