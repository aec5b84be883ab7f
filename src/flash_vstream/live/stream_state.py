"""What the frame worker publishes for a stream: its memory, a table of its slots, and pictures of them.

All of it has constant size. Readers take what they need: the web page never reads the features (``published``), and the
question worker reads the memory without the pictures.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from flash_vstream.live.published import MEMORY, PublishedState, state_checksum
from flash_vstream.live.shared_tensors import RawTensor
from flash_vstream.memory import MemorySnapshot
from flash_vstream.models.interface import Memory
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import Frame
from flash_vstream.video.pictures import WHOLE_BYTES, encode_jpeg, encode_whole

THUMBNAIL_PIXELS = 128
_THUMBNAIL_BYTES = 8192
LONGTERM_PIXELS = 72
_LONGTERM_BYTES = 2048


class Thumbnails:
    """Small JPEGs of frames by time, in space for ``rows`` pictures of up to ``most`` bytes, allocated once."""

    def __init__(self, rows: int, pixels: int, most: int):
        self._pixels, self._most = pixels, most
        self._times = torch.full((rows,), math.nan, dtype=torch.float64)
        self._sizes = torch.zeros(rows, dtype=torch.int64)
        self._data = torch.zeros(rows, most, dtype=torch.uint8)

    def see(self, time: float, picture: Image.Image, wanted: set[float]) -> None:
        """Drop the pictures whose times are not in ``wanted``, and store this one if its time is."""
        times = self._times.tolist()
        for row, kept in enumerate(times):
            if kept not in wanted:
                self._times[row] = math.nan
        free = self._times.isnan().nonzero()
        if time in wanted and time not in times and len(free):
            row, small = int(free[0]), picture.copy()
            small.thumbnail((self._pixels, self._pixels))
            self._sizes[row] = _put(self._data[row], encode_jpeg(small, self._most))
            self._times[row] = time

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {"time": self._times, "size": self._sizes, "data": self._data}


class Pictures:
    """JPEGs of a stream's frames: thumbnails of its memory's slots, as the model saw them, and the whole newest frame.

    There is space for ``slots`` thumbnails of 8 kB, for ``longterm`` smaller ones of 2 kB, of the frames in the
    long-term memory, and for one picture of 64 kB.
    """

    def __init__(self, slots: int, longterm: int = 0):
        self._slots = Thumbnails(slots, THUMBNAIL_PIXELS, _THUMBNAIL_BYTES)
        self._longterm = Thumbnails(longterm, LONGTERM_PIXELS, _LONGTERM_BYTES)
        self._newest_size = torch.zeros((), dtype=torch.int64)
        self._newest = torch.zeros(WHOLE_BYTES, dtype=torch.uint8)

    @classmethod
    def of(cls, memory: Memory) -> "Pictures":
        """Space for the pictures of a full memory."""
        return cls(max_slots(memory), memory.config.longterm_length)

    def see(self, frame: Frame, wanted: set[float], longterm: Collection[float] = ()) -> None:
        """Store the newest frame, and drop the thumbnails that are no longer ``wanted``, by time."""
        picture = Image.fromarray(frame.image)
        self._newest_size.fill_(_put(self._newest, frame.whole or encode_whole(picture)))
        self._slots.see(frame.time, picture, wanted)
        self._longterm.see(frame.time, picture, set(longterm))

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {
            **{f"thumbnails.{name}": value for name, value in self._slots.state_dict().items()},
            **{f"longterm_thumbnails.{name}": value for name, value in self._longterm.state_dict().items()},
            "picture.size": self._newest_size,
            "picture.data": self._newest,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned; raises ``KeyError`` or ``RuntimeError`` for anything else."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])


def _put(place: Tensor, data: bytes) -> int:
    place[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else place[:0]
    return len(data)


def slot_table(snapshot: MemorySnapshot, rows: int) -> Tensor:
    """A snapshot's slots as ``[rows, 6]`` float64: part, start, end, mean, exemplar, weight; unused rows are -1."""
    table = torch.full((rows, 6), -1.0, dtype=torch.float64)
    at = 0
    for number, (_, slots) in enumerate(snapshot.parts()):
        columns = [slots.start, slots.end, slots.mean, slots.exemplar, slots.weight]
        own = torch.stack([torch.full_like(slots.start, number), *columns], dim=1)
        table[at : at + len(own)] = own
        at += len(own)
    return table


def max_slots(memory: Memory) -> int:
    """The number of slots in a full memory."""
    config = memory.config
    return config.abstract_length + config.temporal_length + config.retrieved_length + config.spatial_length


def memory_capacity(memory: Memory) -> dict[str, Any]:
    """A memory's size in bytes; for each part, and for the long-term memory, its slots when full and their tokens."""
    config = memory.config
    parts = {
        "abstract": (config.abstract_length, config.abstract_size**2),
        "temporal": (config.temporal_length, config.temporal_size**2),
        "retrieved": (config.retrieved_length, config.spatial_size**2),
        "spatial": (config.spatial_length, config.spatial_size**2),
    }
    return {
        "bytes": memory.nbytes,
        "parts": {part: {"slots": slots, "tokens": tokens} for part, (slots, tokens) in parts.items()},
        "longterm": {"slots": config.longterm_length, "tokens": config.longterm_size**2},
    }


def empty_slots(memory: Memory) -> Tensor:
    """The slot table of an empty memory."""
    return torch.full((max_slots(memory), 6), -1.0, dtype=torch.float64)


def stream_state(memory: Memory, slots: Tensor, pictures: Pictures) -> dict[str, Tensor]:
    """Everything that a stream shares, by name."""
    state = {MEMORY + name: value for name, value in memory.state_dict().items()}
    return {**state, "slots": slots, **pictures.state_dict()}


def memory_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The memory's ``state_dict``, extracted from a published state."""
    return {name.removeprefix(MEMORY): value for name, value in state.items() if name.startswith(MEMORY)}


def read_memory(shared: PublishedState) -> dict[str, Tensor] | None:
    """The newest memory's ``state_dict``; None before the first."""
    published = shared.read_raw([name for name in shared.names if name.startswith(MEMORY)])
    if published is None:
        return None
    return memory_state({name: value.tensor() for name, value in published[0].items()})


def read_snapshot(shared: PublishedState, pipeline: "FlashVStream") -> MemorySnapshot | None:
    """A snapshot of the newest memory in a shared state; None before its first frame."""
    state = read_memory(shared)
    return restored_snapshot(state, pipeline) if state is not None else None


def restored_snapshot(state: dict[str, Tensor], pipeline: "FlashVStream") -> MemorySnapshot | None:
    """A snapshot of the memory with this state; None before its first frame."""
    memory = pipeline.new_memory()
    memory.load_state_dict(state)
    return memory.read() if memory.frames else None


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what ``save_state`` wrote: the tensors, and the notes with the stream's status.

    Raises ``ValueError`` or ``SafetensorError`` for a damaged file.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    raw = {name: RawTensor.of(value) for name, value in state.items()}
    checksum = metadata.get("checksum")  # version 0.1 wrote none
    if checksum is not None and checksum != state_checksum(raw, metadata["notes"]):
        raise ValueError(f"{path} is damaged: its checksum is not that of what it holds")
    return state, json.loads(metadata["notes"])
