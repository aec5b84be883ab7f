"""The reader process of a capture: writes a source's frames into a ring, and reports events through a pipe.

Messages are monotonic times (signs of progress), ``Opened``, ``Note``, and finally ``Ended`` or ``Broken``.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import av
from av.error import FFmpegError

from flash_vstream.errors import UserError
from flash_vstream.video.addresses import hide_secrets_in_text
from flash_vstream.video.demux import BrokenOffError
from flash_vstream.video.reader import MissingSourceError, reason_of
from flash_vstream.video.ring import FrameRing
from flash_vstream.video.sources import BEAT_SECONDS, OpenedSource, Source, open_source


@dataclass(frozen=True)
class Opened:
    """The source is open. Times in the ring are the monotonic clock's if it is ``live``, otherwise the recording's."""

    live: bool


@dataclass(frozen=True)
class Note:
    """A remark about the source."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The source has ended; with ``error``, it ended before its declared length."""

    error: str | None = None


@dataclass(frozen=True)
class Broken:
    """The source cannot be read (any more).

    ``final``: retrying cannot help if no frame was ever read. ``broke_off``: a recording ended before its declared
    length. ``silent``: the source was silent for too long.
    """

    error: str
    final: bool = False
    broke_off: bool = False
    silent: bool = False


class Teller:
    """Reports to the parent: events, and progress at most every ``interval`` seconds or whenever a frame comes."""

    def __init__(self, pipe: Connection, interval: float):
        self._pipe, self._interval = pipe, interval
        self._beat_at = 0.0

    def beat(self) -> None:
        """Report progress, unless it was reported less than ``interval`` seconds ago."""
        if time.monotonic() - self._beat_at >= self._interval:
            self.wake()

    def wake(self) -> None:
        """Report progress now, because a frame has come."""
        self._beat_at = time.monotonic()
        self._pipe.send(self._beat_at)

    def note(self, text: str) -> None:
        """Send a remark about the source."""
        self._pipe.send(Note(text))

    def send(self, word: Opened | Ended | Broken) -> None:
        """Report that the source opened, ended or broke."""
        self._pipe.send(word)


def run_reader(source: Source, ring: FrameRing, pipe: Connection, patience: float) -> None:
    """The process's main function; gives up on a network source that is silent for ``patience`` seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = logging.getLogger("libav")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    teller = Teller(pipe, min(BEAT_SECONDS, patience / 4))
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        teller.wake()
        teller.send(_read(source, ring, teller, patience))


def _end_with_parent() -> None:
    """Exit when the parent has ended, even while blocked on a named pipe that nobody writes to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(source: Source, ring: FrameRing, teller: Teller, patience: float) -> Ended | Broken:
    """Write every frame into the ring; returns the final message."""
    what_failed = "could not be opened"
    try:
        opened = _open(source, teller, patience)
        teller.send(Opened(opened.live))
        what_failed = "broke off"
        _write_all(source, opened, ring, teller)
    except BrokenPipeError:
        raise
    except BrokenOffError as error:
        reason = f"{source.shown} {error}"
        return Ended(reason) if error.final or source.is_local else Broken(reason, broke_off=True)
    except UserError as error:
        final = not isinstance(error, MissingSourceError) and (source.is_local or source.is_finite)
        return Broken(str(error).replace(source.name, source.shown), final)
    except (FFmpegError, OSError, ValueError) as error:
        reason = f"{source.shown} {what_failed} ({hide_secrets_in_text(reason_of(error))})"
        return Broken(reason, final=source.is_pipe and source.is_finite, silent=isinstance(error, TimeoutError))
    return Broken(f"{source.shown} ended") if opened.live and not source.is_finite else Ended()


def _open(source: Source, teller: Teller, patience: float) -> OpenedSource:
    """Open the source with FFmpeg's log turned on: only the log says what is wrong with a file."""
    av.logging.set_level(av.logging.ERROR)
    try:
        return open_source(source, teller.beat, teller.note, patience)
    finally:
        av.logging.set_level(None)  # decoder threads that log into Python can deadlock


def _write_all(source: Source, opened: OpenedSource, ring: FrameRing, teller: Teller) -> None:
    zero: float | None = None  # when a live source's first frame came, on the monotonic clock
    for number, frame in enumerate(opened.frames, 1):
        while source.pace == "fast" and not opened.live and number - ring.taken > 1:
            time.sleep(0.0005)  # a recording read fast waits for the parent, so that no frame is skipped
            teller.beat()
        if opened.live:
            zero = time.monotonic() - frame.time if zero is None else zero
            frame = replace(frame, time=zero + frame.time)
        ring.write(number, frame)
        teller.wake()
