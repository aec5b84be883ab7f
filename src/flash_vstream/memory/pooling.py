"""Mean pooling of feature maps between grid sizes."""

import math

from torch import Tensor


def grid_side(features: Tensor) -> int:
    """Side P of a feature map ``[..., P², D]``; raises ``ValueError`` when it is not a square."""
    side = math.isqrt(features.shape[-2])
    if side * side != features.shape[-2]:
        raise ValueError(f"a feature map of {features.shape[-2]} tokens is not a square grid")
    return side


def pool_grid(features: Tensor, side: int) -> Tensor:
    """Mean-pool ``[T, P², D]`` to ``[T, side², D]``, row-major on both sides.

    ``side`` must divide P. Agrees with the released code's ``compress_spatial_features`` with
    ``compress_type="mean"``.
    """
    source = grid_side(features)
    if source == side:
        return features
    if source % side:
        raise ValueError(
            f"a grid of {source}x{source} cannot be pooled to {side}x{side}: {side} does not divide {source}"
        )
    frames, _, channels = features.shape
    step = source // side
    return features.reshape(frames, side, step, side, step, channels).mean((2, 4)).flatten(1, 2)
