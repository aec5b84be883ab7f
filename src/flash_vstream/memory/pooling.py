"""Mean pooling of feature maps between grid sizes."""

import math

from torch import Tensor
from torch.nn.functional import avg_pool2d


def grid_side(features: Tensor) -> int:
    """The side P of a feature map ``[..., P², D]``; raises ``ValueError`` if it is not square."""
    side = math.isqrt(features.shape[-2])
    if side * side != features.shape[-2]:
        raise ValueError(f"a feature map of {features.shape[-2]} tokens is not a square grid")
    return side


def pool_grid(features: Tensor, side: int) -> Tensor:
    """Mean-pool ``[T, P², D]`` to ``[T, side², D]``; both grids are row-major.

    ``side`` must divide P, else ``ValueError``. Matches ``compress_spatial_features`` with
    ``compress_type="mean"`` in the released code.
    """
    source = grid_side(features)
    if source == side:
        return features
    if source % side:
        raise ValueError(
            f"a grid of {source}x{source} cannot be pooled to {side}x{side}: {side} does not divide {source}"
        )
    frames, _, channels = features.shape
    grid = features.reshape(frames, source, source, channels).permute(0, 3, 1, 2)
    return avg_pool2d(grid, source // side).permute(0, 2, 3, 1).reshape(frames, side * side, channels)
