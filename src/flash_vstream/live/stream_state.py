"""What the frame worker publishes for a stream: its memory, a table of its slots, and pictures of them.

All of it has constant size. Readers take what they need: the web page never reads the features, and the question worker
reads the memory without the pictures.
"""

import json
import math
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flash_vstream.files import atomic_write
from flash_vstream.memory import PARTS, MemorySnapshot
from flash_vstream.models.interface import Memory
from flash_vstream.video import Frame
from flash_vstream.video.pictures import WHOLE_BYTES, encode_jpeg, encode_whole

THUMBNAIL_PIXELS = 128
_THUMBNAIL_BYTES = 8192
MEMORY = "memory."
LONGTERM_PIXELS = 72
_LONGTERM_BYTES = 2048
_THUMBNAILS = tuple(f"thumbnails.{name}" for name in ("time", "size", "data"))
_LONGTERM_THUMBNAILS = tuple(f"longterm_{name}" for name in _THUMBNAILS)


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

    def read(self, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
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
    """JPEGs of a stream's frames, as the model saw them: those of its memory's slots, and the whole newest one.

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


def slots_of(table: Tensor) -> list[SlotInfo]:
    """The slots in a table made by ``slot_table``, in reading order."""
    return [SlotInfo(PARTS[int(part)], *rest) for part, *rest in table.tolist() if part >= 0]


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
    published = shared.read([name for name in shared.names if name.startswith(MEMORY)])
    return memory_state(published[0]) if published is not None else None


def frames_seen(shared: PublishedState) -> tuple[int, float]:
    """The number of frames in the newest shared memory (0 before the first), and the last frame's age in seconds."""
    published = shared.read((MEMORY + "frames",))
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
    published = shared.read((MEMORY + "frames", "slots", *_THUMBNAILS, _LONGTERM_THUMBNAILS[0]))
    if published is None:
        return MemoryTable(None, 0, [], {}, [])
    state, _ = published
    slots = slots_of(state["slots"])
    time = max((slot.end for slot in slots), default=None)
    longterm = sorted(at for at in state[_LONGTERM_THUMBNAILS[0]].tolist() if not math.isnan(at))
    return MemoryTable(time, int(state[MEMORY + "frames"]), slots, unpack_thumbnails(state), longterm)


def unpack_thumbnails(state: dict[str, Tensor], names: tuple[str, ...] = _THUMBNAILS) -> dict[float, bytes]:
    """Thumbnails (JPEG) by frame time, from a published state."""
    times, sizes, data = (state[name] for name in names)
    return {
        time: bytes(data[row, :size].numpy())
        for row, (time, size) in enumerate(zip(times.tolist(), sizes.tolist(), strict=True))
        if size and not math.isnan(time)
    }


def read_thumbnails(shared: PublishedState) -> dict[float, bytes]:
    """Thumbnails (JPEG) of the frames in a memory, those of the long-term memory included, by frame time."""
    published = shared.read((*_THUMBNAILS, *_LONGTERM_THUMBNAILS))
    return all_thumbnails(published[0]) if published is not None else {}


def all_thumbnails(state: dict[str, Tensor]) -> dict[float, bytes]:
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
    published = shared.read(("picture.size", "picture.data"))
    if published is None or not (size := int(published[0]["picture.size"])):
        return None
    state, notes = published
    return Picture(bytes(state["picture.data"][:size].numpy()), notes["time"], notes["kept"])


def save_state(shared: PublishedState, path: Path) -> bool:
    """Write a shared state to ``path`` atomically; returns False when there is none yet."""
    published = shared.read()
    if published is None:
        return False
    state, notes = published
    text = json.dumps({**(shared.read_status() or {}), **notes})
    metadata = {"notes": text, "checksum": _checksum(state, text)}
    with atomic_write(path) as scratch:
        save_file({name: value.contiguous() for name, value in state.items()}, scratch, metadata)
    return True


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load what ``save_state`` wrote: the tensors, and the notes with the stream's status.

    Raises ``ValueError`` or ``SafetensorError`` for a damaged file.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if "checksum" in metadata and metadata["checksum"] != _checksum(state, metadata["notes"]):  # version 0.1 wrote none
        raise ValueError(f"{path} is damaged: its checksum is not that of what it holds")
    return state, json.loads(metadata["notes"])


def _checksum(state: dict[str, Tensor], notes: str) -> str:
    """A checksum over names, shapes, dtypes, values and notes; a flipped bit anywhere changes it."""
    digest = xxhash.xxh3_128(notes.encode())
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
