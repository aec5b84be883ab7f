"""What the frame worker publishes of a stream: its memory, what its slots are, and pictures of them.

All of constant size. A reader takes what it needs: the web page never touches the features, the
question worker never the pictures of slots that its answer did not look at.
"""

import io
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flash_vstream.files import atomic_write
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.memory import PARTS, MemorySnapshot, StarMemory

THUMBNAIL_PIXELS = 128
_THUMBNAIL_BYTES = 8192
_PICTURE_BYTES = 65536
_QUALITIES = (80, 60, 40, 20, 5)
MEMORY = "memory."


@dataclass(frozen=True)
class SlotInfo:
    """What a slot stands for, without its features: times in seconds of stream time, frames as weight."""

    part: str
    start: float
    end: float
    mean: float
    exemplar: float
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Pictures:
    """JPEGs of the frames that stand for a memory's slots, and of the newest frame.

    Space for ``slots`` thumbnails of 8 kB and one picture of 64 kB is taken once.
    """

    def __init__(self, slots: int):
        self._times = torch.full((slots,), math.nan, dtype=torch.float64)
        self._sizes = torch.zeros(slots, dtype=torch.int64)
        self._data = torch.zeros(slots, _THUMBNAIL_BYTES, dtype=torch.uint8)
        self._newest_size = torch.zeros((), dtype=torch.int64)
        self._newest = torch.zeros(_PICTURE_BYTES, dtype=torch.uint8)

    def see(self, time: float, image: np.ndarray, wanted: set[float]) -> None:
        """Take the newest frame ``[H, W, 3]``; keep thumbnails of the ``wanted`` times alone."""
        picture = Image.fromarray(image)
        self._newest_size.fill_(_put(self._newest, _jpeg(picture, _PICTURE_BYTES)))
        for row, known in enumerate(self._times.tolist()):
            if known not in wanted:
                self._times[row] = math.nan
        free = self._times.isnan().nonzero()
        if time in wanted and time not in self._times.tolist() and len(free):
            row = int(free[0])
            picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            self._sizes[row] = _put(self._data[row], _jpeg(picture, _THUMBNAIL_BYTES))
            self._times[row] = time

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {
            "thumbnails.time": self._times,
            "thumbnails.size": self._sizes,
            "thumbnails.data": self._data,
            "picture.size": self._newest_size,
            "picture.data": self._newest,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])


def _jpeg(picture: Image.Image, most: int) -> bytes:
    """The picture as JPEG of at most ``most`` bytes; noise gets a lower quality."""
    for quality in _QUALITIES:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if file.tell() <= most:
            break
    return file.getvalue() if file.tell() <= most else b""


def _put(place: Tensor, data: bytes) -> int:
    place[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else place[:0]
    return len(data)


def slot_table(snapshot: MemorySnapshot, rows: int) -> Tensor:
    """A view's slots as numbers ``[rows, 6]``: part, start, end, mean, exemplar, weight; -1 is no slot."""
    table = torch.full((rows, 6), -1.0, dtype=torch.float64)
    at = 0
    for number, (_, slots) in enumerate(snapshot.parts()):
        columns = [slots.start, slots.end, slots.mean, slots.exemplar, slots.weight]
        own = torch.stack([torch.full_like(slots.start, number), *columns], dim=1)
        table[at : at + len(own)] = own
        at += len(own)
    return table


def slots_of(table: Tensor) -> list[SlotInfo]:
    """The slots that ``slot_table`` wrote, in reading order."""
    return [SlotInfo(PARTS[int(part)], *rest) for part, *rest in table.tolist() if part >= 0]


def max_slots(memory: StarMemory) -> int:
    """How many slots a memory can come to have."""
    config = memory.config
    return config.abstract_length + config.temporal_length + config.retrieved_length + config.spatial_length


def empty_slots(memory: StarMemory) -> Tensor:
    """The table of a memory that has no slots yet."""
    return torch.full((max_slots(memory), 6), -1.0, dtype=torch.float64)


def stream_state(memory: StarMemory, slots: Tensor, pictures: Pictures) -> dict[str, Tensor]:
    """Everything that a stream shares, by name."""
    state = {MEMORY + name: value for name, value in memory.state_dict().items()}
    return {**state, "slots": slots, **pictures.state_dict()}


def memory_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A memory's ``state_dict`` out of what was published."""
    return {name.removeprefix(MEMORY): value for name, value in state.items() if name.startswith(MEMORY)}


def frames_seen(shared: SharedTensors) -> tuple[int, float]:
    """Frames in the newest shared memory (0 before the first), and how many seconds ago the last of them came."""
    known = shared.read((MEMORY + "frames",))
    if known is None:
        return 0, 0.0
    state, notes = known
    return int(state[MEMORY + "frames"]), time.time() - (notes.get("clock") or 0.0)


def read_slots(shared: SharedTensors) -> list[SlotInfo]:
    """The slots of the newest shared memory."""
    known = shared.read(("slots",))
    return slots_of(known[0]["slots"]) if known else []


def unpack_thumbnails(state: dict[str, Tensor]) -> dict[float, bytes]:
    """JPEGs by the times of their frames, out of what was published."""
    rows = zip(state["thumbnails.time"].tolist(), state["thumbnails.size"].tolist(), strict=True)
    return {
        time: bytes(state["thumbnails.data"][row, :size].numpy())
        for row, (time, size) in enumerate(rows)
        if size and not math.isnan(time)
    }


def read_thumbnails(shared: SharedTensors) -> dict[float, bytes]:
    """JPEGs of the slots' frames, by the times of the frames."""
    known = shared.read(("thumbnails.time", "thumbnails.size", "thumbnails.data"))
    return unpack_thumbnails(known[0]) if known else {}


def read_picture(shared: SharedTensors) -> bytes | None:
    """The newest frame as JPEG, None before the first."""
    known = shared.read(("picture.size", "picture.data"))
    size = int(known[0]["picture.size"]) if known else 0
    return bytes(known[0]["picture.data"][:size].numpy()) if known and size else None


def save_state(shared: SharedTensors, path: Path) -> bool:
    """Write a shared state to ``path``, atomically; False when it holds nothing yet."""
    known = shared.read()
    if known is None:
        return False
    state, notes = known
    with atomic_write(path) as scratch:
        save_file({name: value.contiguous() for name, value in state.items()}, scratch, {"notes": json.dumps(notes)})
    return True


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_state`` wrote."""
    with safe_open(path, "pt") as file:
        notes = json.loads(file.metadata()["notes"])
        return {name: file.get_tensor(name) for name in file.keys()}, notes  # noqa: SIM118 - not a dict
