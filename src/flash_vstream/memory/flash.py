"""The flash memory of Flash-VStream-Qwen (arXiv 2506.23825), in constant space.

Deals only with tensors and times. An encoded frame ``[P², 5C]`` holds two resolutions (``join_resolutions``).
"""

from dataclasses import replace

import torch
from torch import Tensor

from flash_vstream.memory.attention import SemanticAttention
from flash_vstream.memory.config import StarConfig
from flash_vstream.memory.snapshot import MemorySnapshot, Slots
from flash_vstream.memory.star import StarMemory
from flash_vstream.memory.temporal import ClusterMemory


def split_resolutions(features: Tensor) -> tuple[Tensor, Tensor]:
    """High resolution ``[T, P², 4C]`` and low resolution ``[T, P²/4, 4C]`` of encoded frames ``[T, P², 5C]``.

    An encoded frame carries a quarter of its low resolution's features in each token, after the high resolution's.
    """
    frames, tokens, channels = features.shape
    quarter = channels // 5
    return features[..., : 4 * quarter], features[..., 4 * quarter :].reshape(frames, tokens // 4, 4 * quarter)


def join_resolutions(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of ``split_resolutions``."""
    frames, tokens, _ = high.shape
    return torch.cat([high, low.reshape(frames, tokens, -1)], dim=2)


class SynopsisMemory(ClusterMemory):
    """The Context Synopsis Memory: centroids of low-resolution maps; the exemplars are whole encoded frames."""

    def _compared_channels(self, channels: int) -> int:
        return channels // 5 * 4

    def _compared(self, frames: Tensor) -> Tensor:
        return split_resolutions(frames)[1]


class FlashMemory(StarMemory):
    """The Context Synopsis and Detail Augmentation Memory of one stream, as its temporal and retrieved memory.

    ``temporal_length`` centroids are kept of low-resolution maps, merged exactly, and with each a real frame near it:
    of every two that are merged, the nearer one. The ``retrieved_length`` heaviest show theirs in high resolution. The
    released code keeps every frame in two growing banks for that (``ReleaseFlashMemory``). Raises ``ValueError`` for a
    configuration with other parts, or with a low resolution that is not half of the high one.
    """

    def __init__(
        self,
        config: StarConfig,
        channels: int,
        attention: SemanticAttention | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        others = config.spatial_length or config.abstract_length or config.longterm_length
        variant = (config.consolidation, config.retrieval)
        if others or variant != ("merge", "exemplar") or config.spatial_size != 2 * config.temporal_size:
            raise ValueError(
                "a flash memory has temporal and retrieved slots alone, merged, with temporal_size half of spatial_size"
            )
        super().__init__(replace(config, temporal_length=0, retrieved_length=0), channels, attention, dtype, device)
        self.config = config
        self._temporal = SynopsisMemory(
            config.temporal_length, config.temporal_size, config.spatial_size, channels, dtype, device
        )

    def _snapshot(self) -> MemorySnapshot:
        snapshot = super()._snapshot()
        high, _ = split_resolutions(snapshot.retrieved.features)
        none = Slots.of_frames(high[:0], snapshot.retrieved.start[:0])
        temporal = snapshot.temporal[snapshot.temporal.mean.argsort(stable=True)]  # the release's order
        retrieved = replace(snapshot.retrieved, features=high)
        return replace(snapshot, temporal=temporal, retrieved=retrieved, abstract=none, spatial=none, longterm=none)
