"""A source in a process of its own, so that FFmpeg may hang or crash without taking anybody along.

The child writes frames into a ring in shared memory and a byte into a pipe for each; the parent
reads the newest and counts what it skipped. There is no lock that a killed child could keep.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np
import xxhash
from av.error import FFmpegError

from flash_vstream.errors import UserError
from flash_vstream.video.reader import Frame
from flash_vstream.video.shared_memory import reserve
from flash_vstream.video.sources import Source, watch_source

SLOTS = 4
END = "end"
RESUME_AFTER = 1e-3
"""Seconds after the newest frame of a file at which it is taken up again."""
END_SECONDS = 5.0
RESTART_SECONDS = (0.2, 5.0)
"""The first and the longest wait before a source is opened again; each wait doubles, with jitter."""


def ring_bytes(size: int) -> int:
    """The size of a ring's file for frames of ``size`` pixels square."""
    return _ring_layout(size).itemsize


def _ring_layout(size: int) -> np.dtype:
    slot = np.dtype([("sequence", "<i8"), ("checksum", "<u8"), ("time", "<f8"), ("image", "u1", (size, size, 3))])
    return np.dtype([("taken", "<i8"), ("slots", slot, (SLOTS,))])


def _frame_checksum(number: int, frame: Frame) -> int:
    """Tells a whole frame from a torn one, in whatever order a processor makes stores visible."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(frame.image).data, seed=number)
    digest.update(np.float64(frame.time).tobytes())
    return digest.intdigest()


class FrameRing:
    """The newest frames of one source in a file that two processes map; one writes, one reads."""

    def __init__(self, path: str, size: int, create: bool = False):
        """Open the ring at ``path`` or make an empty one; raises ``UserError`` when there is too little space."""
        layout = _ring_layout(size)
        if create:
            reserve(path, layout.itemsize)
        whole = np.memmap(path, layout, "r+", shape=1)
        self._taken, self._slots = whole["taken"], whole["slots"][0]

    def clear(self) -> None:
        """Forget every frame, for a writer that counts from 1 again."""
        self._slots["sequence"] = 0
        self.taken = 0

    def write(self, number: int, frame: Frame) -> None:
        """Put the frame numbered ``number`` (from 1) over the oldest."""
        slot = self._slots[number % SLOTS]
        slot["sequence"] = -number  # being written
        slot["time"] = frame.time
        slot["image"] = frame.image
        slot["checksum"] = _frame_checksum(number, frame)
        slot["sequence"] = number

    @property
    def taken(self) -> int:
        """The number of the newest frame that the reader of the ring has taken."""
        return int(self._taken[0])

    @taken.setter
    def taken(self, number: int) -> None:
        self._taken[0] = number

    def newest(self, after: int) -> tuple[int, Frame] | None:
        """The newest whole frame with a number above ``after``, and its number."""
        numbers = self._slots["sequence"].copy()
        at = int(numbers.argmax())
        number = int(numbers[at])
        if number <= after:
            return None
        slot = self._slots[at]
        frame = Frame(float(slot["time"]), np.array(slot["image"]))
        return (number, frame) if int(slot["checksum"]) == _frame_checksum(number, frame) else None


@dataclass(frozen=True)
class Resume:
    """Where a stream was left: its stream time, the place in its source, and how many seconds ago that was."""

    stream_time: float
    position: float
    seconds_ago: float


@dataclass
class SourceStatus:
    """How a source is doing: frames that came, frames passed over for newer ones, restarts."""

    came: int = 0
    skipped: int = 0
    restarts: int = 0
    state: str = "starting"
    error: str | None = None


class SourceReader:
    """Reads a source in a child process and keeps it going.

    ``newest`` gives the newest frame since the last call. A child that dies, or that has sent
    nothing for ``silence`` seconds, is ended and started again, after a wait that grows while it
    keeps failing; a file is taken up where it was left, and for the rest stream time goes on across
    the gap by the clock. A finite source that ends is done.
    What is shared with the child lies in ``folder``, best one in memory (``shared_folder``).
    A stream that another reader began goes on from ``resume``. Times are stream time; nobody adds to them.
    Raises ``UserError`` when there is too little space for the ring.
    """

    def __init__(self, source: Source, folder: str, silence: float = 12.0, resume: Resume | None = None):
        self.source = source
        self.status = SourceStatus()
        self._silence = silence
        handle, self._path = tempfile.mkstemp(prefix="ring-", dir=folder)
        os.close(handle)
        self._ring = FrameRing(self._path, source.size, create=True)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._number = 0  # of the newest frame taken, in this child's counting
        self._offset = 0.0  # added to the child's times
        self.position = source.begin  # in the source's own time, of the newest frame taken
        self._last_time: float | None = None
        self._last_clock = 0.0
        self._heard = 0.0
        self._word: str | None = None  # the child's last, once it has said it
        self._failures = 0
        self._start_at = 0.0
        if resume is not None:
            self.position = resume.position
            self._offset = resume.stream_time - resume.position
            self._last_time, self._last_clock = resume.stream_time, time.monotonic() - resume.seconds_ago

    def fileno(self) -> int | None:
        """A descriptor that is readable when frames wait, None while no child runs."""
        return self._pipe.fileno() if self._pipe is not None else None

    def newest(self) -> Frame | None:
        """The newest frame that came since the last call, its time going on over restarts."""
        if self.status.state in ("ended", "failed"):
            return None
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start(now)
            return None
        self._listen(now)
        found = self._ring.newest(self._number)
        if found is not None:
            return self._take(*found, now)
        if self._word is not None:
            self._over(now, None if self._word == END else self._word)
        elif not self._process.is_alive():
            self._over(now, "the reader stopped")
        elif now - self._heard > self._silence:
            self._over(now, f"nothing came for {self._silence:.0f} s")
        return None

    def _start(self, now: float) -> None:
        source = self.source
        if self._last_time is not None and source.resumes:
            source = replace(source, begin=self.position + RESUME_AFTER)
        elif self._last_time is not None:  # the gap is part of the stream's time
            self._offset = self._last_time + (now - self._last_clock)
        self._ring.clear()
        self._number, self._heard, self._word = 0, now, None
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe(duplex=False)
        self._process = context.Process(target=_read, args=(source, self._path, child), daemon=True)
        self._process.start()
        child.close()

    def _listen(self, now: float) -> None:
        """Take what the child has said: a frame came, the source ended, or why it cannot be read."""
        assert self._pipe is not None
        try:
            while self._pipe.poll():
                self._heard = now
                self._word = self._pipe.recv() or self._word
        except (EOFError, OSError):
            self._word = self._word or "the reader stopped"

    def _take(self, number: int, frame: Frame, now: float) -> Frame:
        self.status.came += number - self._number
        self.status.skipped += number - self._number - 1
        self.status.state, self.status.error = "live", None
        self._failures, self._number = 0, number
        self._ring.taken = number
        self.position = frame.time
        moment = frame.time + self._offset
        if self._last_time is not None:
            moment = max(moment, self._last_time)
        self._last_time, self._last_clock = moment, now
        return Frame(moment, frame.image)

    def _over(self, now: float, error: str | None) -> None:
        """The child is done for: the source has ended, or another child is started in a while."""
        self._end_child()
        if error is None:
            self.status.state = "ended"
            return
        self.status.error = error
        if self.source.is_finite and self._number == 0 and self._last_time is None:
            self.status.state = "failed"  # a file that cannot be read will not mend itself
            return
        self.status.state = "reconnecting"
        self.status.restarts += 1
        first, longest = RESTART_SECONDS
        wait = min(longest, first * 2.0 ** min(self._failures, 10)) * random.uniform(0.7, 1.0)
        self._failures += 1
        self._start_at = now + wait

    def _end_child(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(timeout=END_SECONDS)  # not for ever: it may hang in the kernel
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def close(self) -> None:
        """End the child and give back what is shared."""
        self._end_child()
        with contextlib.suppress(FileNotFoundError):  # the folder may be gone already
            os.unlink(self._path)


class PushReader:
    """The frames that another process puts into a ring as it gets them (a WebSocket, say).

    Their times in the ring are seconds of the monotonic clock, which processes share and nobody sets. Stream time
    begins at the first, or goes on from ``resume`` where the stream was begun earlier.
    """

    def __init__(self, path: str, size: int, resume: Resume | None = None):
        self.status = SourceStatus()
        self._ring = FrameRing(path, size)
        self._number = self._ring.taken
        self.position = resume.stream_time if resume is not None else 0.0  # stream time of the newest frame
        # What stream time 0 was on the monotonic clock.
        self._origin = time.monotonic() - resume.seconds_ago - resume.stream_time if resume is not None else None

    def fileno(self) -> int | None:
        """Nothing to wait on: a ring is looked at."""
        return None

    def newest(self) -> Frame | None:
        """The newest frame that was pushed since the last call."""
        found = self._ring.newest(self._number)
        if found is None:
            return None
        number, frame = found
        self.status.came += number - self._number
        self.status.skipped += number - self._number - 1
        self.status.state = "live"
        self._number = self._ring.taken = number
        if self._origin is None:
            self._origin = frame.time
        self.position = max(self.position, frame.time - self._origin)
        return Frame(self.position, frame.image)

    def close(self) -> None:
        """The ring is its maker's."""


def wait_for_any(readers: Sequence[SourceReader | PushReader], seconds: float) -> None:
    """Sleep until a reader has frames, at most ``seconds``."""
    descriptors = [number for reader in readers if (number := reader.fileno()) is not None]
    if descriptors:
        multiprocessing.connection.wait(descriptors, seconds)  # select takes no descriptor above 1,023
    else:
        time.sleep(seconds)


def _read(source: Source, path: str, pipe: Connection) -> None:
    """The child: frames into the ring, a word into the pipe for each."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and nobody is left to tell
        pipe.send(_read_all(source, FrameRing(path, source.size), pipe))


def _end_with_parent() -> None:
    """End this process when its parent has ended, whatever it waits for: FFmpeg, or its frames to be taken."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read_all(source: Source, ring: FrameRing, pipe: Connection) -> str:
    """Put every frame into the ring; the last word: that the source has ended, or why it broke off."""
    try:
        for number, frame in enumerate(watch_source(source), 1):
            while source.pace == "fast" and number - ring.taken > 1:
                time.sleep(0.0005)  # nothing is skipped of what waits for its reader
            ring.write(number, frame)
            pipe.send(None)
    except UserError as error:
        return str(error)
    except BrokenPipeError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return f"{source.shown} broke off ({reason})"
    return END if source.is_finite else f"{source.shown} ended"
