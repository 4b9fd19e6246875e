"""Casting tokens to fp8 (e4m3) with one scale per 128 channels, in plain torch: for users' own code and for tests.

`Buffer.low_latency_dispatch(use_fp8=True)` casts by itself; `Buffer.dispatch` takes what these functions return.
"""

from __future__ import annotations

import torch

from .errors import ArgumentError

GROUP = 128
FP8_MAX = 448.0  # largest finite e4m3 value
SMALLEST_AMAX = 1e-4


def cast_to_fp8(
    x: torch.Tensor, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast tokens to e4m3, with one scale per 128 channels.

    `amax` is the largest magnitude of the 128 channels, at least 1e-4. Without `round_scale` the scale is `amax / 448`
    and `q = saturate(x * (448 / amax))`; with it the scale is `2^ceil(log2(amax / 448))` and `q = saturate(x / scale)`.

    Args:
        x: `[T, H]` floating point, H a multiple of 128 (512 with `use_ue8m0`).
        round_scale: use powers of two.
        use_ue8m0: store the scales' exponent bits, four to an int32, lowest byte first; needs `round_scale`.

    Returns:
        `(q, scales)`: `[T, H] float8_e4m3fn`, and `[T, H/128] float32` or `[T, H/512] int32`.

    Raises:
        ArgumentError: H or the flags do not fit.
    """
    multiple = 4 * GROUP if use_ue8m0 else GROUP
    if x.dim() != 2 or x.shape[1] % multiple:
        raise ArgumentError(
            f"cast_to_fp8: x must be [tokens, hidden] with hidden a multiple of {multiple}; got {list(x.shape)}"
        )
    if use_ue8m0 and not round_scale:
        raise ArgumentError("cast_to_fp8: use_ue8m0 needs round_scale")
    groups = x.float().reshape(len(x), -1, GROUP)
    amax = groups.abs().amax(dim=2, keepdim=True).clamp_min(SMALLEST_AMAX)
    scale = amax / FP8_MAX
    if round_scale:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))
        q = groups / scale
    else:
        # A scalar divided by a tensor would be the tensor's reciprocal times the scalar: other bits than the quotient.
        q = groups * (torch.full_like(amax, FP8_MAX) / amax)
    q = q.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).flatten(1)
    scale = scale.squeeze(2)
    if use_ue8m0:
        return q, (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8).view(torch.int32)
    return q, scale


def dequantize(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values that `(q, scales)` stand for.

    Args:
        q: `[..., H] float8_e4m3fn`.
        scales: `[..., H/128] float32` or `[..., H/512] int32` (UE8M0), of any strides.

    Returns:
        `[..., H] float32`.
    """
    if scales.dtype == torch.int32:
        scales = (scales.contiguous().view(torch.uint8).to(torch.int32) << 23).view(torch.float32)
    groups = q.float().reshape(*scales.shape, GROUP)
    return torch.mul(groups, scales.unsqueeze(-1)).flatten(-2)
