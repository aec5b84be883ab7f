"""A wall clock that ``bench chaos`` can step, for the server's processes alone.

The system's clock can be set only by root, and for everybody. So each Python process of the server imports this module
as it starts (through a ``sitecustomize`` on its path) and adds an offset, which the benchmark writes to a file that all
of them map, to what ``time.time`` returns. All of the server's code reads the wall clock there; libraries in C that
read it themselves are not affected.
"""

import mmap
import os
import struct
import time
from pathlib import Path

VARIABLE = "FLASH_VSTREAM_CHAOS_CLOCK"
_OFFSET = struct.Struct("d")


class SteppedClock:
    """The benchmark's side: ``environment`` makes a child process follow this clock, ``offset`` steps it."""

    def __init__(self, folder: Path):
        self._file = folder / "offset"
        self._hook = folder / "start"
        self._hook.mkdir()
        (self._hook / "sitecustomize.py").write_text(f"from {__name__} import follow\n\nfollow()\n")
        self.offset = 0.0

    @property
    def offset(self) -> float:
        """Seconds by which the children's wall clock is ahead."""
        return self._offset

    @offset.setter
    def offset(self, seconds: float) -> None:
        self._offset = seconds
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(_OFFSET.pack(seconds))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for a child process."""
        path = [str(self._hook), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {VARIABLE: str(self._file), "PYTHONPATH": os.pathsep.join(path)}


def follow() -> None:
    """In a child process: add the offset in the file that ``FLASH_VSTREAM_CHAOS_CLOCK`` names to the wall clock."""
    with open(os.environ[VARIABLE], "rb") as file:
        offset = mmap.mmap(file.fileno(), _OFFSET.size, access=mmap.ACCESS_READ)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + float(_OFFSET.unpack(offset)[0])
    time.time_ns = lambda: real_ns() + int(1e9 * _OFFSET.unpack(offset)[0])
