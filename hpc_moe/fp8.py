"""Casting tokens to fp8 (e4m3) with one scale per 128 channels, in plain torch: for users' own code and for tests.

`Buffer.low_latency_dispatch(use_fp8=True)` casts by itself, in C++; `Buffer.dispatch` takes what `cast_to_fp8` returns.
"""

from __future__ import annotations

import torch

from .errors import ArgumentError

GROUP_CHANNELS = 128  # channels that share a scale
FP8_MAX = 448.0  # largest finite e4m3 value
AMAX_MIN = 1e-4  # smaller largest magnitudes count as this one


def cast_to_fp8(
    x: torch.Tensor, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast tokens to e4m3, with one scale per 128 channels.

    `amax` is the largest magnitude of the 128 channels, at least 1e-4. Without `round_scale` the scale is `amax / 448`
    and `q = saturate(x * (448 / amax))`; with it the scale is `2^ceil(log2(amax / 448))` and `q = saturate(x / scale)`.

    Args:
        x: `[..., H]` floating point, H a multiple of 128 (512 with `use_ue8m0`).
        round_scale: use powers of two.
        use_ue8m0: store the scales' exponent bits, four to an int32, lowest byte first; needs `round_scale`.

    Returns:
        `(q, scales)`: `[..., H] float8_e4m3fn`, and `[..., H/128] float32` or `[..., H/512] int32`.

    Raises:
        ArgumentError: H or the flags do not fit.
    """
    multiple = 4 * GROUP_CHANNELS if use_ue8m0 else GROUP_CHANNELS
    if x.dim() < 1 or x.shape[-1] % multiple:
        raise ArgumentError(f"cast_to_fp8: x must be [..., H], H a multiple of {multiple}; got {list(x.shape)}")
    if use_ue8m0 and not round_scale:
        raise ArgumentError("cast_to_fp8: use_ue8m0 needs round_scale")
    groups = x.float().reshape(*x.shape[:-1], x.shape[-1] // GROUP_CHANNELS, GROUP_CHANNELS)
    amax = groups.abs().amax(dim=-1, keepdim=True).clamp_min(AMAX_MIN)
    # A number divided by a tensor would be the tensor's reciprocal times the number: other bits than the quotient.
    fp8_max = torch.full_like(amax, FP8_MAX)
    scale = amax / fp8_max
    if round_scale:
        scale = _next_power_of_two(scale)
        scaled = groups / scale
    else:
        scaled = groups * (fp8_max / amax)
    q = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).reshape(x.shape)
    scale = scale.squeeze(-1)
    return q, pack_ue8m0(scale) if use_ue8m0 else scale


def _next_power_of_two(value: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is at least `value` (positive float32), from its exponent: no logarithm."""
    mantissa, exponent = torch.frexp(value)  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(value), exponent)


def dequantize(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values that `(q, scales)` stand for.

    Args:
        q: `[..., H] float8_e4m3fn`.
        scales: `[..., H/128] float32` or `[..., H/512] int32` (UE8M0), of any strides.

    Returns:
        `[..., H] float32`.
    """
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales)
    groups = q.float().reshape(*scales.shape, GROUP_CHANNELS)
    return torch.mul(groups, scales.unsqueeze(-1)).flatten(-2)


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Pack `[..., G] float32` powers of two, G a multiple of 4, into `[..., G/4] int32`.

    A byte is the eight exponent bits of the float32; the lowest byte of a word belongs to the first of its four scales.
    """
    exponents = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return exponents.reshape(*scales.shape[:-1], scales.shape[-1] // 4, 4).view(torch.int32).squeeze(-1)


def unpack_ue8m0(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_ue8m0`: `[..., W] int32` of any strides to `[..., 4 * W] float32`."""
    exponents = torch.stack([(words >> (8 * i)) & 0xFF for i in range(4)], dim=-1).flatten(-2)
    return (exponents << 23).view(torch.float32)
