"""What can be read of a stream's published state without PyTorch: the table of its slots, pictures, and a saved copy.

The page, the alerts and the state folder need no more than this.
"""

import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
import xxhash

from flash_vstream.files import atomic_write
from flash_vstream.live.shared_tensors import RawTensor
from flash_vstream.memory import PARTS

MEMORY = "memory."
_THUMBNAILS = tuple(f"thumbnails.{name}" for name in ("time", "size", "data"))
_LONGTERM_THUMBNAILS = tuple(f"longterm_{name}" for name in _THUMBNAILS)
THUMBNAILS = (*_THUMBNAILS, *_LONGTERM_THUMBNAILS)


class PublishedState(Protocol):
    """What is published of a stream, wherever it is: ``SharedTensors`` on this machine."""

    @property
    def path(self) -> str:
        """What names the state to questions and watches."""
        ...

    @property
    def names(self) -> Collection[str]:
        """The tensors' names."""
        ...

    def read_raw(self, names: Collection[str] | None = None) -> tuple[dict[str, RawTensor], dict[str, Any]] | None:
        """Copies of the newest tensors (all, or those in ``names``) and their notes; None before the first."""
        ...

    def read_status(self) -> dict[str, Any] | None:
        """The newest status; None before the first."""
        ...


@dataclass(frozen=True)
class SlotInfo:
    """A slot without its features: times in seconds of stream time, and the number of frames as its weight."""

    part: str
    start: float
    end: float
    mean: float
    exemplar: float
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def read_arrays(shared: PublishedState, names: Collection[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The newest of the tensors in ``names`` as arrays, and their notes; None before the first."""
    published = shared.read_raw(names)
    if published is None:
        return None
    state, notes = published
    return {name: value.array() for name, value in state.items()}, notes


def slots_of(table: np.ndarray) -> list[SlotInfo]:
    """The slots in a table made by ``slot_table``, in reading order."""
    return [SlotInfo(PARTS[int(part)], *rest) for part, *rest in table.tolist() if part >= 0]


def frames_seen(shared: PublishedState) -> tuple[int, float]:
    """The number of frames in the newest shared memory (0 before the first), and the last frame's age in seconds."""
    published = read_arrays(shared, (MEMORY + "frames",))
    if published is None:
        return 0, 0.0
    state, notes = published
    return int(state[MEMORY + "frames"]), time.monotonic() - (notes.get("monotonic") or 0.0)


@dataclass(frozen=True)
class MemoryTable:
    """What a memory holds at one moment: its newest time, its frames, its slots, and thumbnails by frame time.

    ``longterm`` are the times of the frames in its long-term memory.
    """

    time: float | None
    frames: int
    slots: list[SlotInfo]
    thumbnails: dict[float, bytes]
    longterm: list[float]


def read_memory_table(shared: PublishedState) -> MemoryTable:
    """The newest memory's table, from a single read: two reads could mix two moments."""
    published = read_arrays(shared, (MEMORY + "frames", "slots", *_THUMBNAILS, _LONGTERM_THUMBNAILS[0]))
    if published is None:
        return MemoryTable(None, 0, [], {}, [])
    state, _ = published
    slots = slots_of(state["slots"])
    time = max((slot.end for slot in slots), default=None)
    longterm = sorted(at for at in state[_LONGTERM_THUMBNAILS[0]].tolist() if not math.isnan(at))
    return MemoryTable(time, int(state[MEMORY + "frames"]), slots, unpack_thumbnails(state), longterm)


def unpack_thumbnails(state: Mapping[str, np.ndarray], names: tuple[str, ...] = _THUMBNAILS) -> dict[float, bytes]:
    """Thumbnails (JPEG) by frame time, from a published state."""
    times, sizes, data = (state[name] for name in names)
    return {
        time: data[row, :size].tobytes()
        for row, (time, size) in enumerate(zip(times.tolist(), sizes.tolist(), strict=True))
        if size and not math.isnan(time)
    }


def read_thumbnails(shared: PublishedState) -> dict[float, bytes]:
    """Thumbnails (JPEG) of the frames in a memory, those of the long-term memory included, by frame time."""
    published = read_arrays(shared, THUMBNAILS)
    return all_thumbnails(published[0]) if published is not None else {}


def all_thumbnails(state: Mapping[str, np.ndarray]) -> dict[float, bytes]:
    """Thumbnails (JPEG) of the frames in a memory, those of the long-term memory included, by frame time."""
    return unpack_thumbnails(state, _LONGTERM_THUMBNAILS) | unpack_thumbnails(state)


@dataclass(frozen=True)
class Picture:
    """The whole newest frame as JPEG, its stream time, and how many frames had been kept with it."""

    jpeg: bytes
    time: float
    kept: int


def read_picture(shared: PublishedState) -> Picture | None:
    """The newest frame's picture, from a single read; None before the first."""
    published = read_arrays(shared, ("picture.size", "picture.data"))
    if published is None or not (size := int(published[0]["picture.size"])):
        return None
    state, notes = published
    return Picture(state["picture.data"][:size].tobytes(), notes["time"], notes["kept"])


def save_state(shared: PublishedState, path: Path) -> bool:
    """Write a shared state to ``path`` atomically; returns False when there is none yet."""
    published = shared.read_raw()
    if published is None:
        return False
    state, notes = published
    text = json.dumps({**(shared.read_status() or {}), **notes})
    metadata = {"notes": text, "checksum": state_checksum(state, text)}
    with atomic_write(path) as scratch:
        if all(value.is_array for value in state.values()):
            safetensors.numpy.save_file({name: value.array() for name, value in state.items()}, scratch, metadata)
        else:
            from safetensors.torch import save_file

            save_file({name: value.tensor() for name, value in state.items()}, scratch, metadata)
    return True


def state_checksum(state: Mapping[str, RawTensor], notes: str) -> str:
    """A checksum over names, shapes, dtypes, values and notes; a flipped bit anywhere changes it."""
    digest = xxhash.xxh3_128(notes.encode())
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name} {list(value.shape)} torch.{value.dtype}".encode())
        digest.update(value.data.data)
    return digest.hexdigest()
