"""The STAR memory: a stream of any length in constant space (arXiv 2406.08085, section 3).

Deals only with tensors and times, independent of models, video files and processes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from flash_vstream.memory.attention import SemanticAttention
from flash_vstream.memory.checks import checked_frames
from flash_vstream.memory.config import StarConfig
from flash_vstream.memory.locks import Locked
from flash_vstream.memory.pooling import pool_grid
from flash_vstream.memory.retrieval import FrameBuffer, heaviest, nearest_frames
from flash_vstream.memory.snapshot import MemorySnapshot, Slots
from flash_vstream.memory.temporal import ClusterMemory
from flash_vstream.memory.upgrades import upgraded


class StarMemory(Locked):
    """The spatial, temporal, abstract and retrieved memory of one stream, and its long-term memory if it has one.

    >>> memory = StarMemory(StarConfig(), channels=1024, attention=SemanticAttention(1024, 32))
    >>> memory.write(features, times)        # [T, P², D] float, [T] seconds
    >>> snapshot = memory.read()             # slots, times and weights; unaffected by later writes

    ``channels`` is D, the feature width; frames are stored as ``dtype`` on ``device``. Whatever the
    dtype, centroids have twice float32's precision and the abstract memory float32, since in half precision
    a mean over many frames stops moving.

    All space is allocated at construction; a write does the same work for the first frame and the
    ten millionth. Writing never tracks gradients (training differentiates ``abstract_memory`` instead).
    Threads may share a memory: each write, read and restore is atomic.

    Raises ``ValueError`` for ``compat="release"`` and for an abstract memory without ``attention``.
    """

    def __init__(
        self,
        config: StarConfig,
        channels: int,
        attention: SemanticAttention | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if config.compat != "none":
            raise ValueError("StarMemory is this project's memory; use ReleaseMemory for compat='release'")
        if config.abstract_length and attention is None:
            raise ValueError("an abstract memory needs its SemanticAttention; pass one or set abstract_length=0")
        super().__init__()
        self.config = config
        self.channels = channels
        self.attention = attention
        space: dict[str, Any] = {"dtype": dtype, "device": device}
        self._spatial = torch.zeros(config.spatial_length, config.spatial_size**2, channels, **space)
        self._spatial_times = torch.zeros(config.spatial_length, dtype=torch.float64)
        exemplar_side = config.spatial_size if config.retrieval == "exemplar" and config.retrieved_length else 0
        self._temporal = (
            ClusterMemory(config.temporal_length, config.temporal_size, exemplar_side, channels, **space)
            if config.temporal_length
            else None
        )
        # Whole frames are compared by their means, which keeps the work of several hundred slots small.
        self._longterm = (
            ClusterMemory(config.longterm_length, 1, config.longterm_size, channels, torch.float16, device)
            if config.longterm_length
            else None
        )
        buffered = config.retrieval == "buffer" and config.retrieved_length
        self._buffer = (
            FrameBuffer(config.buffer_length, config.spatial_size**2, channels, **space) if buffered else None
        )
        # The slots, and up to as many pending frames, which are absorbed as one chunk.
        length, tokens = config.abstract_length, config.abstract_size**2
        self._abstract = torch.zeros(length, tokens, channels, dtype=torch.float32, device=device)
        self._abstract_times = torch.zeros(4, length, dtype=torch.float64)  # start, end, mean, weight
        self._pending = torch.zeros(length, tokens, channels, dtype=torch.float32, device=device)
        self._pending_times = torch.zeros(length, dtype=torch.float64)
        self._frames = torch.zeros((), dtype=torch.int64)
        self._time = torch.full((), math.nan, dtype=torch.float64)

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return int(self._frames)

    @property
    def time(self) -> float | None:
        """Stream time of the newest frame in seconds; None before the first."""
        return float(self._time) if self.frames else None

    @property
    def nbytes(self) -> int:
        """The memory's size in bytes; constant from the first frame to the last."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())

    @torch.no_grad()
    def write(self, features: Tensor, times: Tensor | list[float]) -> None:
        """Write frames: ``features [T, P², D]`` on a grid that pools to P_spa, ``times [T]`` seconds.

        Times must not decrease, within a write or between writes. With ``consolidation="merge"`` the
        result does not depend on how a stream is split into writes. Raises ``ValueError`` for a wrong
        shape, for values that are not finite or too large for the memory's dtype, and for times that
        go backwards; the memory is then unchanged.
        """
        with self._lock:
            features, times = checked_frames(
                features,
                times,
                channels=self.channels,
                side=self.config.spatial_size,
                dtype=self._spatial.dtype,
                longterm=self._longterm is not None,
                newest=float(self._time),
            )
            device, side = self._spatial.device, self.config.spatial_size
            # Frame by frame: pooling a batch may round differently, and chunking must not affect the result.
            frames = [pool_grid(frame[None].to(device), side)[0] for frame in features]
            for frame, time in zip(frames, times.tolist(), strict=True):
                self._write_frame(frame, time)
            if self._temporal is not None and self.config.consolidation == "lloyd":
                self._temporal.consolidate(torch.stack(frames), times, int(self._frames) - len(frames))

    def _write_frame(self, frame: Tensor, time: float) -> None:
        """Add one pooled frame ``[P_spa², D]`` to every part, except a temporal memory consolidated by Lloyd's."""
        dtype = self._spatial.dtype
        if self.config.spatial_length:
            self._spatial = torch.cat([self._spatial[1:], frame[None].to(dtype)])
            seen = self._spatial_times.numpy()
            seen[:-1] = seen[1:]
            seen[-1] = time
        if self._buffer is not None:
            self._buffer.push(frame.to(dtype), time)
        if self.config.abstract_length:
            self._absorb(frame, time)
        if self._temporal is not None and self.config.consolidation == "merge":
            self._temporal.merge_in(frame, time, int(self._frames))
        if self._longterm is not None:
            self._longterm.merge_in(frame, time, int(self._frames))
        self._frames += 1
        self._time.fill_(time)

    def _absorb(self, frame: Tensor, time: float) -> None:
        """Add a frame to the abstract memory: fill it first, then update it in chunks of its own length."""
        length = self.config.abstract_length
        pooled = pool_grid(frame[None], self.config.abstract_size)[0].float()
        index = int(self._frames)
        if index < length:
            self._abstract[index] = pooled
            self._abstract_times[:, index] = torch.tensor([time, time, time, 1.0], dtype=torch.float64)
            return
        row = index % length
        self._pending[row] = pooled
        self._pending_times.numpy()[row] = time
        if row == length - 1:
            self._abstract, self._abstract_times = self._updated(length)

    def _updated(self, pending: int) -> tuple[Tensor, Tensor]:
        """The abstract memory and its times after absorbing the first ``pending`` of the waiting frames."""
        assert self.attention is not None
        length, ratio = self.config.abstract_length, self.config.update_ratio
        memory, weights = self.attention(self._abstract.flatten(0, 1), self._pending[:pending].flatten(0, 1), ratio)
        start, end, mean, weight = self._abstract_times
        # Token-to-token attention reduced to slot-to-frame, so that times mix as the features do.
        per_frame = weights.double().reshape(length, -1, pending, self.config.abstract_size**2).sum(3).mean(1).cpu()
        times = self._pending_times[:pending]
        mixed = mean * (1 - ratio) + ratio * (per_frame @ times)
        stats = torch.stack([start, times[-1].expand_as(end), mixed, weight + pending])
        return memory.reshape(self._abstract.shape), stats

    @torch.no_grad()
    def read(self) -> MemorySnapshot:
        """A snapshot of the memory. Raises ``ValueError`` before the first frame."""
        with self._lock:
            return self._snapshot()

    def _snapshot(self) -> MemorySnapshot:
        frames, config = self.frames, self.config
        if not frames:
            raise ValueError("the memory is empty; write at least one frame before reading it")
        newest = min(frames, config.spatial_length)
        kept = slice(config.spatial_length - newest, None)
        spatial = Slots.of_frames(self._spatial[kept].clone(), self._spatial_times[kept].clone())
        nothing = self._spatial.new_zeros(0, config.temporal_size**2, self.channels)
        retrieved = Slots.of_frames(self._spatial[:0].clone(), self._spatial_times[:0].clone())
        temporal = Slots.of_frames(nothing, self._spatial_times[:0].clone())
        if self._temporal is not None:
            temporal, exemplars = self._temporal.read()
            if config.retrieved_length:
                chosen = heaviest(temporal.weight, config.retrieved_length)
                retrieved = self._retrieved(temporal, exemplars, chosen)
        nothing = self._spatial.new_zeros(0, config.longterm_size**2, self.channels)
        longterm = Slots.of_frames(nothing, self._spatial_times[:0].clone())
        if self._longterm is not None:
            longterm = self._longterm.read_exemplars()
        return MemorySnapshot(self._read_abstract(), temporal, retrieved, spatial, longterm, float(self._time), frames)

    def _retrieved(self, temporal: Slots, exemplars: Tensor, chosen: Tensor) -> Slots:
        if self._buffer is None:
            return Slots.of_frames(exemplars[chosen], temporal.exemplar[chosen])
        frames, times = self._buffer.read()
        nearest = nearest_frames(pool_grid(frames, self.config.temporal_size), temporal.features[chosen])
        return Slots.of_frames(frames[nearest], times[nearest.cpu()])

    def _read_abstract(self) -> Slots:
        length, frames = self.config.abstract_length, self.frames
        memory, stats = self._abstract, self._abstract_times
        if frames > length and length and frames % length:
            memory, stats = self._updated(frames % length)
        filled = min(frames, length)
        start, end, mean, weight = stats[:, :filled].clone()
        features = memory[:filled].to(self._spatial.dtype, copy=True)
        return Slots(features, start, end, mean, start.clone(), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the memory by name, ready for safetensors.

        The tensors are the memory's own, not copies: copy them before the next write.
        """
        state = {name[1:]: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self._temporal is not None:
            state |= {f"temporal.{name}": value for name, value in self._temporal.state_dict().items()}
        if self._longterm is not None:
            state |= {f"longterm.{name}": value for name, value in self._longterm.state_dict().items()}
        if self._buffer is not None:
            state |= {f"buffer.{name}": value for name, value in self._buffer.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state bit for bit; raises ``ValueError`` if names, shapes or dtypes differ."""
        with self._lock:
            own = self.state_dict()
            state = upgraded(state, own)
            if own.keys() != state.keys():
                raise ValueError(
                    f"not a state of this memory: it differs in {', '.join(sorted(own.keys() ^ state.keys()))}"
                )
            for name, value in state.items():
                if own[name].shape != value.shape or own[name].dtype != value.dtype:
                    raise ValueError(
                        f"{name} is {list(value.shape)} {value.dtype}, but this memory has"
                        f" {list(own[name].shape)} {own[name].dtype}; was it saved with another StarConfig?"
                    )
            for name, value in state.items():
                own[name].copy_(value)
