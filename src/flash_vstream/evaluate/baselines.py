"""What the model sees of a stream: the memory, parts of it, a few frames, or nothing.

All methods except ``star`` are baselines that show what the memory contributes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.memory import PARTS, MemorySnapshot, StarConfig
from flash_vstream.models.interface import Memory, StreamModel

TIMES = "times"
REMOVABLE = (*PARTS, "longterm")
MEMORY_METHODS = (
    "star, star-PART (without abstract, temporal, retrieved, spatial, longterm or the times in the prompt), recent:N,"
    " uniform:N, all, blind"
)


class MemoryMethod:
    """What the model keeps of one stream: write frames, then take a snapshot to ask about.

    - ``star`` writes every frame to the memory; ``star-PART`` does too, but leaves out one part.
    - ``recent:N`` writes the newest N frames to a fresh memory of the same size.
    - ``uniform:N`` does so with N frames spread evenly over the stream, including the last one.
    - ``all`` keeps every frame at full resolution, as long as that fits.
    - ``blind`` sees no video.

    Raises ``UserError`` for any other name.
    """

    def __init__(self, name: str, model: StreamModel, star: StarConfig | None = None):
        self.name = name
        self._model = model
        self._star: StarConfig = star or model.config.star
        self._kind, _, argument = name.partition(":")
        self._without = name.removeprefix("star-") if name.startswith("star-") else None
        self._count = int(argument) if argument.isdigit() else 0
        counted = self._kind in ("recent", "uniform") and self._count > 0
        if not (name in ("star", "blind", "all") or counted or self._without in (*REMOVABLE, TIMES)):
            raise UserError(f"no memory is called {name!r}; choose from {MEMORY_METHODS}")
        self.frames = 0
        self._kept: list[tuple[float, Tensor]] = []
        self._memory = self._new_memory()

    @property
    def is_blind(self) -> bool:
        """Whether the method ignores the video."""
        return self._kind == "blind"

    @property
    def time_stamps(self) -> bool:
        """Whether the prompt contains the times of the memory slots."""
        return self._without != TIMES

    def _new_memory(self) -> Memory:
        # Float32, as features are read; on the model's device. The release's form for whole videos is the one that
        # its published numbers come from.
        return self._model.new_memory(torch.float32, self._star, offline=True)

    def write(self, time: float, feature: Tensor) -> None:
        """Write a frame ``[P², D]`` at ``time`` seconds."""
        self.frames += 1
        if self._kind == "star" or self._without:
            self._memory.write(feature[None].float(), [time])
        elif not self.is_blind:
            self._kept.append((time, feature.half()))
            if self._kind == "recent":
                del self._kept[: -self._count]

    def snapshot(self) -> MemorySnapshot | None:
        """The snapshot to ask about, or None for no video. Raises ``ValueError`` before the first frame."""
        if self.is_blind:
            return None
        if self._kind == "star" or self._without:
            whole = self._memory.read()
            return without(whole, self._without) if self._without in REMOVABLE else whole
        if not self._kept:
            raise ValueError("no frame has been seen")
        kept = self._kept
        if self._kind == "uniform":
            rows = torch.linspace(0, len(kept) - 1, min(self._count, len(kept))).round().long().tolist()
            kept = [kept[row] for row in rows]
        times = [time for time, _ in kept]
        features = torch.stack([feature for _, feature in kept]).float()
        return self._model.snapshot_of(features, times, self._kind == "all", self._star)


def without(snapshot: MemorySnapshot, part: str) -> MemorySnapshot:
    """The snapshot with one part emptied."""
    return replace(snapshot, **{part: getattr(snapshot, part)[torch.arange(0)]})
