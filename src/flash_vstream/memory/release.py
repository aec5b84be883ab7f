"""The memory of the authors' released code, quirks included (``compat="release"``).

Only for parity with published numbers and for comparison. Its quirks: retrieved frames are looked up
by cluster index, so they never come from beyond the first ``temporal_length`` frames; streaming k-means
discards its weights at every step; the streaming abstract memory attends to a single key and
degenerates to a moving average; the feature buffer grows without limit; k-means starts at random.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_vstream.memory.attention import SemanticAttention, abstract_memory
from flash_vstream.memory.checks import checked_frames
from flash_vstream.memory.clustering import lloyd
from flash_vstream.memory.config import StarConfig
from flash_vstream.memory.locks import Locked
from flash_vstream.memory.pooling import pool_grid
from flash_vstream.memory.snapshot import MemorySnapshot, Slots

KEY_FRAMES = 3
"""The number of retrieved frames, which the release hard-codes."""


def _random_row(n: int) -> int:
    return int(torch.randint(n, ()))


class ReleaseMemory(Locked):
    """The release's memory behind the interface of ``StarMemory``.

    A write corresponds to one call of its ``embed_video_streaming``, so the result depends on how a
    stream is split into writes. With ``offline=True`` a read does what its
    ``compress_temporal_features`` does, over all frames written. ``permute(n)`` returns the random
    order that k-means starts from, and ``draw(n)`` a random row for an empty cluster; both default to
    PyTorch's and can be replaced for parity tests.
    """

    def __init__(
        self,
        config: StarConfig,
        channels: int,
        attention: SemanticAttention | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        offline: bool = False,
        permute: Callable[[int], Tensor] = torch.randperm,
        draw: Callable[[int], int] = _random_row,
    ):
        if attention is None:
            raise ValueError("the release's memory needs its SemanticAttention")
        super().__init__()
        self.config = config
        self.attention = attention
        self.offline = offline
        self._permute = permute
        self._draw = draw
        empty = torch.zeros(0, config.spatial_size**2, channels, dtype=dtype, device=device)
        self._buffer = empty
        self._times = torch.zeros(0, dtype=torch.float64)
        self._long = pool_grid(empty, config.temporal_size)
        self._abstract = pool_grid(empty, config.abstract_size)
        self._keys: list[int] = []
        self._weights = torch.zeros(0)

    @property
    def frames(self) -> int:
        """Frames written so far, all of them still in the buffer."""
        return len(self._buffer)

    @property
    def time(self) -> float | None:
        """Stream time of the newest frame in seconds; None before the first."""
        return float(self._times[-1]) if self.frames else None

    @property
    def nbytes(self) -> int:
        """The memory's size in bytes; grows with every frame."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())

    @torch.no_grad()
    def write(self, features: Tensor, times: Tensor | list[float]) -> None:
        """Write frames ``[T, P², D]`` at ``times [T]`` seconds, as one call of the release.

        Raises ``ValueError`` in the same cases as ``StarMemory.write``.
        """
        with self._lock:
            newest = float(self._times[-1]) if self.frames else math.nan
            features, times = checked_frames(
                features,
                times,
                channels=self._buffer.shape[2],
                side=self.config.spatial_size,
                dtype=self._buffer.dtype,
                newest=newest,
            )
            self._write(features, times)

    def _write(self, features: Tensor, times: Tensor) -> None:
        frames = pool_grid(features.to(self._buffer), self.config.spatial_size)
        first = not self.frames
        self._buffer = torch.cat([self._buffer, frames])
        self._times = torch.cat([self._times, times])
        if self.offline:
            return
        long = torch.cat([self._long, pool_grid(frames, self.config.temporal_size)])
        abstract = torch.cat([self._abstract, pool_grid(frames, self.config.abstract_size)])
        if first:  # kept unchanged, however long, with nothing retrieved
            self._long, self._abstract = long, abstract
            self._weights = torch.ones(len(long))
            return
        self._long, self._weights, self._keys = self._compress(long)
        self._abstract = abstract_memory(
            abstract, self.config.abstract_length, self.attention, self.config.update_ratio
        )

    def _compress(self, long: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Centroids, their weights, and the key frames' indices (the release uses cluster indices as such)."""
        length = self.config.temporal_length
        centroids, weights = long, torch.ones(len(long), device=long.device)
        if len(long) > length:
            centroids, weights = kmeans_feature(long, length, self._permute, self._draw)
        ranks = torch.argsort(weights, descending=True, stable=True)
        wanted = long[ranks.to(long.device)][:KEY_FRAMES].flatten(1)
        nearest = [int((long.flatten(1) - row).square().sum(1).argmin()) for row in wanted]
        return centroids, weights, nearest

    @torch.no_grad()
    def read(self) -> MemorySnapshot:
        """A snapshot of the memory as the release would pass it to its language model."""
        with self._lock:
            return self._snapshot()

    def _snapshot(self) -> MemorySnapshot:
        if not self.frames:
            raise ValueError("the memory is empty; write at least one frame before reading it")
        long, abstract, weights, keys = self._long, self._abstract, self._weights, self._keys
        if self.offline:
            past = self._buffer[: len(self._buffer) - self.config.spatial_length]
            long = pool_grid(past, self.config.temporal_size)
            abstract = pool_grid(past, self.config.abstract_size)
            weights, keys = torch.ones(len(long)), []
            if len(past):
                long, weights, keys = self._compress(long)
                abstract = abstract_memory(
                    abstract, self.config.abstract_length, self.attention, self.config.update_ratio
                )
        newest = slice(max(0, self.frames - self.config.spatial_length), None)
        return MemorySnapshot(
            self._untimed(abstract, torch.ones(len(abstract))),
            self._untimed(long, weights),
            Slots.of_frames(self._buffer[keys], self._times[keys]),
            Slots.of_frames(self._buffer[newest], self._times[newest]),
            Slots.of_frames(self._buffer[:0], self._times[:0]),
            float(self._times[-1]),
            self.frames,
        )

    def _untimed(self, features: Tensor, weights: Tensor) -> Slots:
        """Slots that each span the whole stream, since the release keeps no times for them."""
        start, end = self._times[:1].expand(len(features)), self._times[-1:].expand(len(features))
        return Slots(features.clone(), start, end, (start + end) / 2, start, weights.double().cpu())

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the memory by name."""
        keys = torch.tensor(self._keys, dtype=torch.int64)
        named = {name[1:]: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return named | {"keys": keys}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state; raises ``ValueError`` if names differ."""
        if self.state_dict().keys() != state.keys():
            raise ValueError("not a state of a release memory")
        for name, value in state.items():
            setattr(self, f"_{name}", value.tolist() if name == "keys" else value.clone())


def kmeans_feature(
    features: Tensor,
    length: int,
    permute: Callable[[int], Tensor],
    draw: Callable[[int], int],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The release's ``weighted_kmeans_feature``: ``[T, P², D]`` to ``[length, P², D]`` and weights.

    Videos of up to ``length`` frames are returned unchanged.
    """
    if weights is None:
        weights = torch.ones(len(features), dtype=features.dtype, device=features.device)
    if len(features) <= length:
        return features, weights
    points = features.flatten(1)
    start = permute(len(points))[:length].to(points.device)
    clusters = lloyd(points, weights, start, refill=lambda: draw(len(points)))
    return clusters.centroids.reshape(length, *features.shape[1:]), clusters.weights
