"""A ring of frames in shared memory: one process writes, another reads, and neither waits."""

import os
import struct
import tempfile
import zlib
from multiprocessing import reduction
from typing import Any

import numpy as np

from flash_vstream.video.pictures import WHOLE_BYTES
from flash_vstream.video.reader import Frame
from flash_vstream.video.shared_memory import take_space

SLOTS = 4


def _layout(size: int) -> np.dtype:
    head = [("sequence", "<i8"), ("checksum", "<u4"), ("time", "<f8"), ("whole_bytes", "<i4")]
    slot = np.dtype([*head, ("whole", "u1", (WHOLE_BYTES,)), ("image", "u1", (size, size, 3))])
    return np.dtype([("taken", "<i8"), ("slots", slot, (SLOTS,))])


def ring_bytes(size: int) -> int:
    """The size in bytes of a ring for frames ``[size, size, 3]`` with their whole pictures."""
    return _layout(size).itemsize


class FrameRing:
    """The newest frames ``[size, size, 3]`` of one source, with whole pictures, in a file that two processes map.

    One of them writes, the other reads. There is no lock that a killed process could leave held, and nothing depends on
    the order in which stores become visible to other processors: a frame that does not match its checksum is incomplete
    or another one. The file is at ``path``. With ``FrameRing.unnamed`` it has no name and disappears when the last
    process that maps it ends; such a ring can be passed to a child process as it starts. Space is reserved on creation,
    which raises ``UserError`` if there is too little.
    """

    def __init__(self, path: str, size: int, create: bool = False):
        with open(path, "w+b" if create else "r+b") as file:
            self._map(file, size, create)

    @classmethod
    def unnamed(cls, folder: str, size: int) -> "FrameRing":
        """A new ring whose file, in ``folder``, has no name."""
        ring = cls.__new__(cls)
        ring._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, stays open as long as the ring
        try:
            ring._map(ring._file, size, create=True)
        except BaseException:
            ring._file.close()
            raise
        return ring

    def _map(self, file: Any, size: int, create: bool) -> None:
        whole = _layout(size)
        if create:
            take_space(file, whole.itemsize)
        self._size = size
        mapped = np.memmap(file, whole, "r+", shape=1)
        self._taken, self._slots = mapped["taken"], mapped["slots"][0]

    def __getstate__(self) -> tuple[Any, int]:
        return reduction.DupFd(self._file.fileno()), self._size

    def __setstate__(self, state: tuple[Any, int]) -> None:
        descriptor, size = state
        self._file = os.fdopen(descriptor.detach(), "r+b")
        self._map(self._file, size, create=False)

    def clear(self) -> None:
        """Discard all frames, for a new writer that counts from 1."""
        self._slots["sequence"] = 0
        self.taken = 0

    def close(self) -> None:
        """Close and unmap an unnamed ring; it cannot be used afterwards."""
        self._file.close()
        del self._taken, self._slots

    def write(self, number: int, frame: Frame) -> None:
        """Write frame number ``number`` (counted from 1) over the oldest; a whole picture too large is left out."""
        whole = np.frombuffer(frame.whole if len(frame.whole) <= WHOLE_BYTES else b"", np.uint8)
        slot = self._slots[number % SLOTS]
        slot["sequence"] = -number  # being written
        slot["checksum"] = _checksum(number, frame.time, frame.image, whole)
        slot["time"] = frame.time
        slot["image"] = frame.image
        slot["whole_bytes"] = len(whole)
        slot["whole"][: len(whole)] = whole
        slot["sequence"] = number

    @property
    def taken(self) -> int:
        """The number of the newest frame that the ring's reader has taken."""
        return int(self._taken[0])

    @taken.setter
    def taken(self, number: int) -> None:
        self._taken[0] = number

    def newest(self, after: int) -> tuple[int, Frame] | None:
        """The newest frame and its number; None if its number is not above ``after``, or it is incomplete."""
        numbers = self._slots["sequence"].copy()
        at = int(numbers.argmax())
        number = int(numbers[at])
        if number <= after:
            return None
        slot = self._slots[at]
        time, image = float(slot["time"]), np.array(slot["image"])
        whole = np.array(slot["whole"][: max(0, int(slot["whole_bytes"]))])
        if int(slot["checksum"]) != _checksum(number, time, image, whole):
            return None
        return number, Frame(time, image, whole.tobytes())


def _checksum(number: int, time: float, image: np.ndarray, whole: np.ndarray) -> int:
    head = struct.pack("<qdi", number, time, len(whole))
    return zlib.crc32(np.ascontiguousarray(image).data, zlib.crc32(whole.data, zlib.crc32(head)))
