"""The reader process of a capture: a source's frames into a ring, and a word into the pipe for whatever happens.

Words are moments of the monotonic clock at which work went on, ``Opened``, ``Note``, and last ``Ended`` or ``Broken``.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import av
from av.error import FFmpegError

from flash_vstream.errors import UserError
from flash_vstream.video.addresses import hide_secrets_in_text
from flash_vstream.video.demux import BrokenOffError
from flash_vstream.video.reader import Frame, MissingSourceError, reason_of
from flash_vstream.video.ring import FrameRing
from flash_vstream.video.sources import BEAT_SECONDS, OpenedSource, Source, open_source


@dataclass(frozen=True)
class Opened:
    """The source is open. Times in the ring are the monotonic clock's if it is ``live``, else the recording's."""

    live: bool


@dataclass(frozen=True)
class Note:
    """Something that should be known of the source."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The source has come to its end, or with ``error`` to one before the length that it declares."""

    error: str | None = None


@dataclass(frozen=True)
class Broken:
    """The source cannot be read (any more).

    ``final``: trying again cannot help if it never worked. ``broke_off``: a recording ended before its declared end.
    ``silent``: it is the silence that was too long.
    """

    error: str
    final: bool = False
    broke_off: bool = False
    silent: bool = False


class Teller:
    """The way to the parent, which is told of work going on at least every ``interval`` seconds while it does."""

    def __init__(self, pipe: Connection, interval: float):
        self._pipe, self._interval = pipe, interval
        self._beat_at = 0.0

    def beat(self) -> None:
        """Work goes on."""
        if time.monotonic() - self._beat_at >= self._interval:
            self.wake()

    def wake(self) -> None:
        """Say that work goes on now, since a frame has come."""
        self._beat_at = time.monotonic()
        self._pipe.send(self._beat_at)

    def note(self, text: str) -> None:
        """Something should be known of the source."""
        self._pipe.send(Note(text))

    def send(self, word: Opened | Ended | Broken) -> None:
        """What became of the source."""
        self._pipe.send(word)


def run_reader(source: Source, ring: FrameRing, pipe: Connection, patience: float) -> None:
    """The process's main function; a network source that is silent for ``patience`` seconds is given up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = logging.getLogger("libav")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    teller = Teller(pipe, min(BEAT_SECONDS, patience / 4))
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and nobody is left to tell
        teller.wake()
        teller.send(_read(source, ring, teller, patience))


def _end_with_parent() -> None:
    """End this process when its parent has ended, even while it waits for a pipe that nobody writes to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(source: Source, ring: FrameRing, teller: Teller, patience: float) -> Ended | Broken:
    """Put every frame into the ring; returns the last word."""
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
    """Open the source with FFmpeg's log turned on, which alone says what is wrong with a file."""
    av.logging.set_level(av.logging.ERROR)
    try:
        return open_source(source, teller.beat, teller.note, patience)
    finally:
        av.logging.set_level(None)  # decoding threads that log into Python may wait for one another


def _write_all(source: Source, opened: OpenedSource, ring: FrameRing, teller: Teller) -> None:
    zero: float | None = None  # the moment of a live source's first frame
    for number, frame in enumerate(opened.frames, 1):
        while source.pace == "fast" and not opened.live and number - ring.taken > 1:
            time.sleep(0.0005)  # nothing is skipped of what waits for its reader
            teller.beat()
        if opened.live:
            zero = time.monotonic() - frame.time if zero is None else zero
            frame = Frame(zero + frame.time, frame.image)
        ring.write(number, frame)
        teller.wake()
