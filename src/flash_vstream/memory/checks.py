"""Validation of writes to a memory; invalid input is rejected before anything changes."""

import math

import torch
from torch import Tensor

from flash_vstream.memory.pooling import grid_side

LARGEST_FEATURE = 1e9
"""No vision tower outputs larger values, and up to this limit neither the sums in pooling nor the
squares in attention and distances can overflow float32."""


def checked_frames(
    features: Tensor,
    times: Tensor | list[float],
    *,
    channels: int,
    side: int,
    dtype: torch.dtype,
    newest: float,
    longterm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Validate a write; returns ``features`` unchanged, and ``times [T]`` as float64 on the CPU.

    ``features`` must be ``[T, P², channels]`` floats on a grid that pools to ``side`` x ``side``, with
    values that ``dtype`` can hold and, with a ``longterm`` memory, float16. ``times`` must be finite,
    must not decrease, and must not precede ``newest`` (NaN before the first write). Raises
    ``ValueError`` with the reason otherwise.
    """
    times = torch.as_tensor(times, dtype=torch.float64).detach().reshape(-1).cpu()
    if features.ndim != 3 or features.shape[-1] != channels or len(times) != len(features) or not len(times):
        raise ValueError(
            f"write takes features [T, P², {channels}] and T times, T at least 1; got"
            f" {list(features.shape)} and {len(times)} times"
        )
    if not features.is_floating_point():
        raise ValueError(f"write takes features of a floating-point dtype; got {features.dtype}")
    grid = grid_side(features)
    if not grid or grid % side:
        raise ValueError(f"a {grid}x{grid} feature map does not pool to the spatial memory's {side}x{side}")
    _check_values(features, dtype, longterm)
    seconds = times.tolist()
    if not all(map(math.isfinite, seconds)):
        raise ValueError("times must be finite, in seconds of stream time")
    before = seconds[0] if math.isnan(newest) else newest
    if any(later < earlier for earlier, later in zip([before, *seconds], seconds, strict=False)):
        raise ValueError(f"stream time goes back: {seconds[:4]}… after {before:g} s")
    return features, times


def _check_values(features: Tensor, dtype: torch.dtype, longterm: bool) -> None:
    limit = min(LARGEST_FEATURE, torch.finfo(dtype).max)
    lowest, highest = torch.aminmax(features.detach())  # NaN if any value is NaN
    largest = max(-float(lowest), float(highest))
    half = torch.finfo(torch.float16).max
    if largest <= (min(limit, half) if longterm else limit):
        return
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite; these hold NaN or infinity")
    if largest <= limit:
        raise ValueError(
            f"a feature of {largest:g} is beyond the {half:g} that the long-term memory takes, which is kept in"
            " float16; set longterm_length=0"
        )
    name = str(dtype).removeprefix("torch.")
    remedy = "make the memory with dtype=torch.float32" if largest <= LARGEST_FEATURE else "are the features right?"
    raise ValueError(f"a feature of {largest:g} is beyond the {limit:g} that a {name} memory takes; {remedy}")
