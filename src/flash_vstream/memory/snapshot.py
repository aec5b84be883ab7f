"""The result of reading a memory: slots with their times and weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_vstream.memory.config import PARTS


@dataclass(frozen=True)
class Slots:
    """The n slots of one part of the memory, oldest first.

    ``features`` is ``[n, P², D]``. The rest are float64 ``[n]``: the ``start``, ``end`` and ``mean`` of
    the times of the frames behind each slot, the time of its ``exemplar`` (a real frame that
    represents it), all in seconds of stream time, and ``weight``, the number of those frames.
    """

    features: Tensor
    start: Tensor
    end: Tensor
    mean: Tensor
    exemplar: Tensor
    weight: Tensor

    @classmethod
    def of_frames(cls, features: Tensor, times: Tensor) -> "Slots":
        """Slots of single frames ``[n, P², D]`` at ``times [n]``."""
        return cls(features, times, times, times, times, torch.ones_like(times))

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, index: Tensor) -> "Slots":
        return Slots(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class MemorySnapshot:
    """An immutable copy of a STAR memory: its four parts, and the newest frame's ``time`` in seconds.

    ``longterm`` is the long-term memory beside them: real frames, which are read only if a question
    recalls them. It has no slots in a memory without one. ``frames`` is the number of frames written
    so far. The tensors are copies that later writes do not affect.
    """

    abstract: Slots
    temporal: Slots
    retrieved: Slots
    spatial: Slots
    longterm: Slots
    time: float
    frames: int

    def parts(self) -> Iterator[tuple[str, Slots]]:
        """Yield each part's name and slots, in reading order."""
        for name in PARTS:
            yield name, getattr(self, name)

    def tokens(self) -> Tensor:
        """All visual tokens ``[n, D]`` in reading order: abstract, temporal, retrieved, spatial."""
        return torch.cat([slots.features.flatten(0, 1) for _, slots in self.parts()])
