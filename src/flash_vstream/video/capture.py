"""A source in a process of its own, so that FFmpeg may hang or crash without taking anybody along.

The reader process writes frames into a ring in shared memory and tells the parent by a pipe what happens. The parent
reads the newest frame, counts what it passed over, and starts another reader when one hangs or dies.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from flash_vstream.video.reader import Frame, FrameRate
from flash_vstream.video.reader_process import Broken, Ended, Note, Opened, run_reader
from flash_vstream.video.ring import FrameRing
from flash_vstream.video.shared_memory import shared_folder
from flash_vstream.video.sources import ARRIVAL_SLACK, SILENCE_SECONDS, Source

__all__ = ["RESUME_AFTER", "Capture", "FrameRing", "PushedFrames", "SourceStatus", "shared_folder", "wait_for_any"]

RESUME_AFTER = 1e-3
"""Seconds after the newest frame of a recording at which it is taken up again."""
RESTART_SECONDS = (0.2, 5.0)
"""The first and the longest wait before a source is opened again; each wait doubles, with jitter."""
START_SECONDS = 120.0
"""How long a reader process may take until it says its first word: a busy machine imports slowly."""
LOCAL_SILENCE_SECONDS = 60.0
"""How long the reader of a file may make no progress: neither read, decode, sleep, nor wait for its taker."""
MOST_PATIENCE = 10.0
"""A live source that is slow may be silent for at most this many times what others may."""
LEARNING_PERIODS = 60
"""After this many times the usual silence, long pauses from before no longer count."""
RECORDING_TRIES = 8
"""How often in a row a recording on a server may break off without a new frame before it is given up."""
_END_SECONDS = 1.0


@dataclass
class SourceStatus:
    """How a source is doing: frames that came, frames passed over for newer ones, restarts.

    ``state`` is starting, live, reconnecting, ended or failed. ``error`` says why it is reconnecting or failed, or that
    a recording ended before the length that it declares. ``note`` is what else should be known of the source.
    """

    came: int = 0
    skipped: int = 0
    restarts: int = 0
    state: str = "starting"
    error: str | None = None
    note: str | None = None


class Capture:
    """Reads a source in a child process and keeps it going.

    ``newest`` gives the newest frame since the last call. Its time is ``start`` and on: a recording has its own clock,
    ``start`` being the moment ``source.begin`` in it; a live source goes by the clock, ``start`` being the moment when
    the capture was made. With ``start`` None, stream time is 0 at the first frame.

    A reader that dies, or that makes no progress, is ended and started again, after a wait that grows while it keeps
    failing. A recording is taken up where it was left; for the rest stream time goes on across the gap by the clock.
    A live source may be silent for ``silence`` seconds at first; one that turns out to send less often gets more time.
    A recording that ends is done; a source fails for good only when its reader says that it cannot be read.
    What is shared with the reader lies in ``folder``, best one in memory (``shared_folder``), in a file without a name.
    Raises ``UserError`` when there is no room in it.
    """

    def __init__(self, source: Source, folder: str, start: float | None = None, silence: float = SILENCE_SECONDS):
        self.source = source
        self.status = SourceStatus()
        self.position: float | None = None
        """Where in the recording to go on from: the time of the newest frame taken. None where that cannot be done."""
        self._silence, self._patience = silence, silence
        self._longest_pause, self._learning_since = 0.0, time.monotonic()
        self._ring = FrameRing.unnamed(folder, source.size)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._opened: Opened | None = None  # what this reader said of the source
        self._last_word: Ended | Broken | None = None
        self._number = 0  # of the newest frame taken, in this reader's counting
        self._spoke = False  # whether this reader has said anything
        self._heard_at = 0.0
        self._zero = None if start is None else time.monotonic() - start  # the moment of stream time 0, by the clock
        # From a recording's time to stream time; None until a loop that was begun again gives its first frame.
        self._offset: float | None = (start or 0.0) - source.begin
        self._last_time: float | None = None
        self._last_clock = 0.0
        self._failures = 0
        self._broke_off: str | None = None
        self._start_at = 0.0

    def fileno(self) -> int | None:
        """A descriptor that is readable when frames wait, None while no reader runs."""
        return self._pipe.fileno() if self._pipe is not None else None

    def newest(self) -> Frame | None:
        """The newest frame that came since the last call, its time going on over restarts."""
        if self.status.state in ("ended", "failed"):
            return None
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start_reader(now)
            return None
        self._listen()
        if self._opened is not None:
            found = self._ring.newest(self._number)
            if found is not None:
                return self._take(*found, self._opened, now)
        if self._last_word is not None:
            self._over(now, self._last_word)
        elif not self._process.is_alive():
            self._over(now, Broken("the reader stopped"))
        elif now - self._heard_at > (limit := self._limit()):
            self._over(now, Broken(f"nothing came for {limit:.0f} s", silent=True))
        return None

    def _limit(self) -> float:
        """How long the reader may say nothing, in seconds."""
        if not self._spoke:
            return START_SECONDS
        return LOCAL_SILENCE_SECONDS if self.source.is_local else self._patience

    def _start_reader(self, now: float) -> None:
        source = self.source
        if self.position is not None:
            source = replace(source, begin=self.position + RESUME_AFTER)
        elif self._last_time is not None:
            self._offset = None
        self._ring.clear()
        self._number, self._heard_at, self._spoke, self._opened, self._last_word = 0, now, False, None, None
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe(duplex=False)
        arguments = (source, self._ring, child, self._patience)
        self._process = context.Process(target=run_reader, args=arguments, daemon=True)
        self._process.start()
        child.close()

    def _listen(self) -> None:
        """Take what the reader has said: that it works, what the source is, how it ended."""
        assert self._pipe is not None
        try:
            while self._pipe.poll():
                word = self._pipe.recv()
                self._spoke = True
                if isinstance(word, float):
                    if self._opened is not None and self._opened.live:
                        self._learn_pace(word - self._heard_at, word)
                    self._heard_at = word
                elif isinstance(word, Opened):
                    self._opened = word
                elif isinstance(word, Note):
                    self.status.note = word.text
                else:
                    self._last_word = word
        except (EOFError, OSError):
            self._last_word = self._last_word or Broken("the reader stopped")

    def _learn_pace(self, pause: float, now: float) -> None:
        """A source that has paused for long may do so again: three times as long is silence."""
        self._longest_pause = max(self._longest_pause, pause)
        needed = max(self._silence, min(3 * self._longest_pause, MOST_PATIENCE * self._silence))
        self._patience = max(self._patience, needed)
        if now - self._learning_since > LEARNING_PERIODS * self._silence:
            self._patience, self._longest_pause, self._learning_since = needed, 0.0, now

    def _take(self, number: int, frame: Frame, opened: Opened, now: float) -> Frame:
        self.status.came += number - self._number
        self.status.skipped += number - self._number - 1
        self.status.state, self.status.error = "live", None
        self._failures, self._number, self._broke_off = 0, number, None
        self._ring.taken = number
        if opened.live:
            if self._zero is None:
                self._zero = frame.time if self._last_time is None else self._last_clock - self._last_time
            moment = frame.time - self._zero
        else:
            if self._offset is None:  # the gap is part of the stream's time
                self._offset = (self._last_time or 0.0) + (now - self._last_clock) - frame.time
            moment = frame.time + self._offset
            self.position = None if self.source.loop else frame.time
        moment = max(moment, self._last_time or 0.0)
        self._last_time, self._last_clock = moment, now
        return Frame(moment, frame.image)

    def _over(self, now: float, word: Ended | Broken) -> None:
        """The reader is done for: the source has ended or failed, or another reader is started in a while."""
        self._end_reader()
        if isinstance(word, Ended):
            self.status.state, self.status.error = "ended", word.error
            return
        if word.broke_off:
            self._broke_off = word.error
        self._failures += 1
        given_up = self._broke_off is not None and self._failures > RECORDING_TRIES
        self.status.error = self._broke_off if given_up else word.error
        if given_up or (word.final and self._last_time is None):
            self.status.state = "failed"
            return
        if word.silent:
            self._patience = min(2 * self._patience, MOST_PATIENCE * self._silence)
        self.status.state = "reconnecting"
        self.status.restarts += 1
        first, longest = RESTART_SECONDS
        self._start_at = now + min(longest, first * 2.0 ** min(self._failures - 1, 10)) * random.uniform(0.7, 1.0)

    def _end_reader(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(_END_SECONDS)  # longer only where the system itself hangs, on a network drive say
            with contextlib.suppress(ValueError):
                self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def close(self) -> None:
        """End the reader and give back what is shared."""
        self._end_reader()
        self._ring.close()


class PushedFrames:
    """The frames that another process puts into a ring as it gets them (a WebSocket, say), at most ``fps`` a second.

    Their times in the ring are those of the system's monotonic clock, the same for all processes. Stream time is 0 at
    the first frame or, with ``start``, that much when this object was made.
    """

    def __init__(self, path: str, size: int, fps: float, start: float | None = None):
        self.status = SourceStatus()
        self.position = None
        self._ring = FrameRing(path, size)
        self._number = self._ring.taken
        self._fps = fps
        self._rate = FrameRate(fps, ARRIVAL_SLACK)
        self._zero = None if start is None else time.monotonic() - start
        self._last_time: float | None = start

    def fileno(self) -> int | None:
        """Nothing to wait on: a ring is looked at."""
        return None

    def newest(self) -> Frame | None:
        """The newest frame that was pushed since the last call, if it is due."""
        found = self._ring.newest(self._number)
        if found is None:
            return None
        number, frame = found
        passed_over = number - self._number - 1
        self._number = self._ring.taken = number
        self._zero = frame.time if self._zero is None else self._zero
        moment = max(frame.time - self._zero, self._last_time or 0.0)
        if not self._rate.picks(moment):
            return None
        # Of the frames that nobody looked at, only as many as the rate allows would have been kept.
        due = int((moment - self._last_time) * self._fps) - 1 if self._last_time is not None else 0
        skipped = max(0, min(passed_over, due))
        self.status.came += skipped + 1
        self.status.skipped += skipped
        self.status.state = "live"
        self._last_time = moment
        return Frame(moment, frame.image)

    def close(self) -> None:
        """The ring is its maker's."""


def wait_for_any(readers: Sequence[Capture | PushedFrames], seconds: float) -> None:
    """Sleep until a reader has frames, at most ``seconds``."""
    descriptors = [number for reader in readers if (number := reader.fileno()) is not None]
    if descriptors:
        multiprocessing.connection.wait(descriptors, seconds)  # select takes no descriptor above 1,023
    else:
        time.sleep(seconds)
