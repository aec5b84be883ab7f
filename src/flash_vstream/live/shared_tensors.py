"""Fixed-size tensors in a memory-mapped file: how workers share a stream's state, and how it outlives them.

A memory has constant size, so its whole state fits a fixed place in the file. The frame worker publishes it after every
write, the question worker reads it at any time, and a restarted frame worker resumes from it. Neither side waits for
the other, and there is no lock that a killed process could leave held: the file has two places, written alternately,
and a reader that hits one being rewritten reads again.

An xxh3 checksum of every tensor and of the notes shows whether a read is complete. Nothing relies on the order in which
stores become visible, which only x86 guarantees. On one core of a busy AMD machine, publishing nano's 2.2 MB takes
0.25 ms (0.05 ms of it for checksums), and the paper's sizes in float32, 81 MB, take 31 ms (14 ms for checksums).
Writing a new file and renaming it into place would take 1.1 ms and 94 ms, and could run out of space at any moment.
"""

import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from flash_vstream.files import atomic_write
from flash_vstream.video.shared_memory import reserve

if TYPE_CHECKING:  # who only reads pictures and numbers does without
    from torch import Tensor

NOTES_BYTES = 4096
_LAYOUT_AT, _LAYOUT_BYTES = 64, 16384
_TEXT = np.dtype([("checksum", "<u8"), ("size", "<i8")])
_CHECKSUM_DIGITS = 24
"""The most characters that one checksum takes in a place's text."""
PATIENCE_SECONDS = 1.0
"""How long a read is retried before falling back to the previous state."""

BFLOAT16 = "bfloat16"
Layout = list[tuple[str, list[int], str]]
"""Names, shapes and dtypes, as plain JSON values."""


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor as bytes ``data``, with its shape and the name of its dtype. NumPy does not know all of those."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @classmethod
    def of(cls, tensor: "Tensor") -> "RawTensor":
        """A tensor's bytes, without copying them if they are on the CPU and contiguous."""
        data = bytes_of(tensor.detach().cpu().contiguous())
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)

    @property
    def is_array(self) -> bool:
        """Whether NumPy knows its dtype."""
        return self.dtype != BFLOAT16

    def array(self) -> np.ndarray:
        """The same bytes as an array; raises ``TypeError`` unless ``is_array``."""
        return self.data.view(np.dtype(self.dtype)).reshape(self.shape)

    def tensor(self) -> "Tensor":
        """The same bytes as a tensor; a copy only if they cannot be written to, as after a journey between machines."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        if not self.data.size:  # which PyTorch cannot view as another dtype
            return torch.empty(self.shape, dtype=dtype)
        return torch.from_numpy(np.require(self.data, requirements="W")).view(dtype).reshape(self.shape)


def layout_of(template: "Mapping[str, Tensor]") -> Layout:
    """The layout of tensors like those in ``template``."""
    return [(name, list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in template.items()]


class SharedTensors:
    """Two places for named tensors with notes, and two for a status; notes and status are JSON.

    The status is separate so that it can be published even when the tensors cannot be written.
    The file begins with its own layout, so its path is all a reader needs.
    """

    def __init__(self, path: str):
        """Open the tensors at ``path``; raises ``FileNotFoundError`` when there is none."""
        self.path = path
        self._map = np.memmap(path, np.uint8, "r+")
        # How many times tensors and status have been published.
        self._published = self._map[:16].view(np.int64)
        layout = json.loads(bytes(self._map[_LAYOUT_AT:_LAYOUT_BYTES]).partition(b"\0")[0])
        self._fields, self._tensor_bytes = _places(layout)
        self._place_bytes = _place_bytes(layout)

    @classmethod
    def create(cls, path: str, layout: Layout) -> "SharedTensors":
        """Create an empty file at ``path`` with its space reserved; raises ``UserError`` when there is too little.

        Raises ``ValueError`` for a layout that is too long.
        """
        text = json.dumps(layout).encode()
        if len(text) >= _LAYOUT_BYTES - _LAYOUT_AT:
            raise ValueError(f"the layout takes {len(text)} bytes; the limit is {_LAYOUT_BYTES - _LAYOUT_AT - 1}")
        with atomic_write(path) as scratch:
            reserve(str(scratch), shared_bytes(layout))
            with open(scratch, "r+b") as file:
                file.seek(_LAYOUT_AT)
                file.write(text)
        return cls(path)

    @property
    def nbytes(self) -> int:
        """The file's size; it never grows."""
        return self._map.size

    @property
    def names(self) -> Collection[str]:
        """The tensors' names."""
        return self._fields.keys()

    @property
    def version(self) -> int:
        """How many times tensors have been published; 0 before the first."""
        return int(self._published[0])

    @property
    def status_version(self) -> int:
        """How many times a status has been published; 0 before the first."""
        return int(self._published[1])

    def publish(self, state: "Mapping[str, Tensor]", notes: Mapping[str, Any]) -> None:
        """Publish ``state`` as the newest; only one process may publish.

        ``notes`` get 4 kB of JSON, and their strings are shortened to fit. Raises ``ValueError`` if that is not enough.
        """
        version = self.version + 1
        text = bounded_json(notes)
        place = self._place(version)
        _erase_text(place[self._tensor_bytes :])
        checksums = []
        for name, (at, _, _) in self._fields.items():
            raw = RawTensor.of(state[name]).data
            place[at : at + raw.size] = raw
            checksums.append(xxhash.xxh3_64_intdigest(raw.data))
        head = json.dumps([version, checksums]).encode()
        _write_text(place[self._tensor_bytes :], head + b"\n" + text)
        self._published[0] = version

    def publish_status(self, status: Mapping[str, Any]) -> None:
        """Publish ``status`` as the newest, limited to the same size as notes."""
        version = self.status_version + 1
        _write_text(self._status_place(version), bounded_json(status))
        self._published[1] = version

    def read(self, names: Collection[str] | None = None) -> "tuple[dict[str, Tensor], dict[str, Any]] | None":
        """What ``read_raw`` reads, as tensors."""
        if (published := self.read_raw(names)) is None:
            return None
        state, notes = published
        return {name: value.tensor() for name, value in state.items()}, notes

    def read_raw(self, names: Collection[str] | None = None) -> tuple[dict[str, RawTensor], dict[str, Any]] | None:
        """Copies of the newest tensors (all, or those in ``names``) and their notes; None before the first.

        If the newest state stays incomplete for a second, returns the previous one, or None if that is incomplete too.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while version := self.version:
            if (found := self._read(version, names)) is not None:
                return found
            if time.monotonic() > deadline:
                return self._read(version - 1, names)
        return None

    def read_status(self) -> dict[str, Any] | None:
        """The newest complete status; None before the first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while version := self.status_version:
            text = _read_text(self._status_place(version))
            if text is None and time.monotonic() > deadline:
                text = _read_text(self._status_place(version - 1))
                if text is None:
                    return None
            if text is not None:
                return dict(json.loads(text))
        return None

    def _read(self, version: int, names: Collection[str] | None) -> tuple[dict[str, RawTensor], dict[str, Any]] | None:
        """The tensors and notes of one version; None unless every byte read is as it was published."""
        place = self._place(version)
        text = _read_text(place[self._tensor_bytes :])
        if text is None:
            return None
        head, _, notes = text.partition(b"\n")
        written, checksums = json.loads(head)
        if written != version:
            return None
        state = {}
        for (name, (at, shape, dtype)), checksum in zip(self._fields.items(), checksums, strict=True):
            if names is None or name in names:
                raw = np.array(place[at : at + _size(shape, dtype)])
                if xxhash.xxh3_64_intdigest(raw.data) != checksum:
                    return None
                state[name] = RawTensor(dtype, tuple(shape), raw)
        return state, json.loads(notes)

    def _status_place(self, version: int) -> np.ndarray:
        begin = _LAYOUT_BYTES + (version % 2) * _text_bytes(0)
        return self._map[begin : begin + _text_bytes(0)]

    def _place(self, version: int) -> np.ndarray:
        begin = _LAYOUT_BYTES + 2 * _text_bytes(0) + (version % 2) * self._place_bytes
        return self._map[begin : begin + self._place_bytes]


def bytes_of(tensor: "Tensor") -> np.ndarray:
    """The bytes of a contiguous tensor, without copying them."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


def shared_bytes(layout: Layout) -> int:
    """The size in bytes of a file for a layout."""
    return _LAYOUT_BYTES + 2 * _text_bytes(0) + 2 * _place_bytes(layout)


def _places(layout: Layout) -> tuple[dict[str, tuple[int, list[int], str]], int]:
    """Each tensor's offset, shape and dtype, and the bytes they all take."""
    fields, at = {}, 0
    for name, shape, dtype in layout:
        fields[name] = (at, shape, dtype)
        at += _rounded(_size(shape, dtype))
    return fields, at


def _size(shape: Sequence[int], dtype: str) -> int:
    """The bytes of a tensor."""
    return math.prod(shape) * (2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize)


def _place_bytes(layout: Layout) -> int:
    return _places(layout)[1] + _text_bytes(len(layout))


def _text_bytes(checksums: int) -> int:
    return _rounded(_TEXT.itemsize + NOTES_BYTES + _CHECKSUM_DIGITS * (checksums + 2))


def _rounded(size: int) -> int:
    """``size`` rounded up to a multiple of a cache line."""
    return -(-size // 64) * 64


def _erase_text(place: np.ndarray) -> None:
    place[: _TEXT.itemsize].view(_TEXT)["checksum"] = 0


def _write_text(place: np.ndarray, text: bytes) -> None:
    head = place[: _TEXT.itemsize].view(_TEXT)
    head["size"] = len(text)
    place[_TEXT.itemsize : _TEXT.itemsize + len(text)] = np.frombuffer(text, np.uint8)
    head["checksum"] = xxhash.xxh3_64_intdigest(text)


def _read_text(place: np.ndarray) -> bytes | None:
    """The text in ``place``; None unless its checksum matches."""
    raw = bytes(place)
    (checksum, size) = np.frombuffer(raw[: _TEXT.itemsize], _TEXT)[0]
    text = raw[_TEXT.itemsize : _TEXT.itemsize + max(0, int(size))]
    return text if len(text) == size and xxhash.xxh3_64_intdigest(text) == checksum else None


def bounded_json(notes: Mapping[str, Any], most: int = NOTES_BYTES) -> bytes:
    """``notes`` as at most ``most`` bytes of UTF-8 JSON; strings lose their middles until it fits.

    Raises ``ValueError`` if it does not fit even with empty strings.
    """
    if len(text := _json(notes)) <= most:
        return text
    texts = [name for name, value in notes.items() if isinstance(value, str)]
    rest = len(_json({**notes, **dict.fromkeys(texts, "")}))
    if rest > most:
        raise ValueError(f"the notes are {rest} bytes without their texts; the limit is {most}")
    room = (most - rest) // max(1, len(texts))
    return _json({**notes, **{name: shortened(notes[name], room) for name in texts}})


def shortened(text: str, most: int) -> str:
    """``text``, without its middle if it takes more than ``most`` bytes as JSON.

    The beginning of a message usually names the subject, and the end the reason.
    """
    kept, short = len(text), text
    while kept and len(_json(short)) - 2 > most:
        kept = min(kept - 1, most, kept * 9 // 10)
        half = max(kept, 0) // 2
        short = f"{text[:half]} … {text[len(text) - half :]}" if half else ""
    return short


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
