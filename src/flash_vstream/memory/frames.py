"""Plain choices of frames, to compare a memory with: the newest, some spread evenly over the stream, or all of them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_vstream.memory.checks import checked_frames
from flash_vstream.memory.config import StarConfig
from flash_vstream.memory.locks import Locked
from flash_vstream.memory.pooling import pool_grid
from flash_vstream.memory.snapshot import MemorySnapshot
from flash_vstream.memory.star import StarMemory

Present = Callable[[Tensor, list[float]], MemorySnapshot]


def whole_frames(side: int, count: int) -> StarConfig:
    """A memory of the ``count`` newest frames on a grid of ``side`` x ``side``, and of nothing else."""
    nothing = {f"{part}_length": 0 for part in ("temporal", "abstract", "retrieved", "longterm")}
    sizes = {f"{part}_size": side for part in ("spatial", "temporal", "abstract", "longterm")}
    return StarConfig.from_dict({**sizes, **nothing, "spatial_length": count})


def every_frame(features: Tensor, times: list[float]) -> MemorySnapshot:
    """Frames ``[T, P², D]`` as slots at full resolution, and nothing else."""
    star = whole_frames(math.isqrt(features.shape[1]), len(times))
    memory = StarMemory(star, features.shape[2], None, features.dtype, features.device)
    memory.write(features, times)
    return memory.read()


class FrameMemory(Locked):
    """Keeps frames instead of merging them, with the methods of a ``StarMemory``.

    ``method`` is ``recent`` (the ``count`` newest), ``uniform`` (``count`` frames spread evenly over the stream so far)
    or ``all``, which alone grows with the stream. ``present`` makes a snapshot of the frames chosen, such as
    ``every_frame``, and ``config`` is that of its slots.
    """

    def __init__(
        self,
        method: str,
        count: int,
        config: StarConfig,
        channels: int,
        present: Present = every_frame,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config = config
        self.channels = channels
        self.method, self.count = method, count
        self._present = present
        rows, side = {"recent": count, "uniform": 2 * count, "all": 0}[method], config.spatial_size
        self._kept = torch.zeros(rows, side**2, channels, dtype=dtype, device=device)
        self._kept_times = torch.zeros(rows, dtype=torch.float64)
        self._newest = torch.zeros(1, side**2, channels, dtype=dtype, device=device)
        # The rows in use, every how many frames one is kept, the frames written, and the newest one's time.
        self._filled, self._stride, self._frames = (torch.tensor(value) for value in (0, 1, 0))
        self._time = torch.full((), math.nan, dtype=torch.float64)

    @property
    def grows(self) -> bool:
        """Whether the memory takes more space with every frame."""
        return self.method == "all"

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
        """The memory's size in bytes."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())

    @torch.no_grad()
    def write(self, features: Tensor, times: Tensor | list[float]) -> None:
        """Write frames ``[T, P², D]`` at ``times [T]`` seconds; raises ``ValueError`` as ``StarMemory.write`` does."""
        with self._lock:
            side, dtype, newest = self.config.spatial_size, self._kept.dtype, float(self._time)
            features, times = checked_frames(
                features, times, channels=self.channels, side=side, dtype=dtype, newest=newest
            )
            for frame, time in zip(features, times.tolist(), strict=True):
                self._write_frame(pool_grid(frame[None].to(self._kept), side), time)

    def _write_frame(self, frame: Tensor, time: float) -> None:
        index, at = int(self._frames), torch.tensor([time], dtype=torch.float64)
        if self.method != "uniform":
            dropped = int(self.method == "recent")
            self._kept = torch.cat([self._kept[dropped:], frame])
            self._kept_times = torch.cat([self._kept_times[dropped:], at])
            self._filled.fill_(min(index + 1, len(self._kept)))
        elif index % int(self._stride) == 0:
            if int(self._filled) == len(self._kept):  # keep every other one, and from now on half as many
                half = len(self._kept) // 2
                self._kept[:half], self._kept_times[:half] = self._kept[::2].clone(), self._kept_times[::2].clone()
                self._filled.fill_(half)
                self._stride *= 2
            if index % int(self._stride) == 0:
                self._kept[int(self._filled)], self._kept_times[int(self._filled)] = frame[0], time
                self._filled += 1
        self._newest = frame
        self._frames += 1
        self._time.fill_(time)

    def chosen(self) -> tuple[Tensor, list[float]]:
        """The frames ``[n, side², D]`` and their times, oldest first."""
        filled = int(self._filled)
        used = slice(len(self._kept) - filled, None) if self.method == "recent" else slice(filled)
        frames, times = self._kept[used], self._kept_times[used]
        if self.method != "uniform":
            return frames.clone(), times.tolist()
        if float(times[-1]) != float(self._time):
            frames, times = torch.cat([frames, self._newest]), torch.cat([times, self._time[None]])
        count = min(self.count, len(times))
        rows = torch.linspace(0, len(times) - 1, count).round().long()
        return frames[rows], times[rows].tolist()

    @torch.no_grad()
    def read(self) -> MemorySnapshot:
        """A snapshot of the frames chosen. Raises ``ValueError`` before the first frame."""
        with self._lock:
            if not self.frames:
                raise ValueError("the memory is empty; write at least one frame before reading it")
            return self._present(*self.chosen())

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the memory by name."""
        return {name[1:]: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state bit for bit; raises ``ValueError`` if names, shapes or dtypes differ."""
        with self._lock:
            own = self.state_dict()
            if own.keys() != state.keys():
                raise ValueError("not a state of this memory")
            for name, value in state.items():
                alike = own[name].shape == value.shape or (self.grows and name.startswith("kept"))
                if not alike or own[name].dtype != value.dtype:
                    raise ValueError(f"{name} is {list(value.shape)}, but this memory has {list(own[name].shape)}")
            for name, value in state.items():
                setattr(self, f"_{name}", value.clone().to(own[name].device))
