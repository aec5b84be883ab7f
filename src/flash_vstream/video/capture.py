"""Reads a source in its own process, so that a hang or crash in FFmpeg affects nothing else.

The reader process writes frames into a ring in shared memory and reports events to the parent through a pipe. The
parent takes the newest frame, counts the frames it skipped, and replaces a reader that hangs or dies.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from flash_vstream.backoff import backoff_seconds
from flash_vstream.video.reader import Frame, FrameRate
from flash_vstream.video.reader_process import Broken, Ended, Note, Opened, run_reader
from flash_vstream.video.ring import FrameRing
from flash_vstream.video.sources import ARRIVAL_SLACK, SILENCE_SECONDS, Source

__all__ = ["RESUME_AFTER", "Capture", "FrameRing", "PushedFrames", "SourceStatus", "wait_for_any"]

RESUME_AFTER = 1e-3
"""A recording resumes this many seconds after its newest frame."""
RESTART_SECONDS = (0.2, 5.0)
"""The shortest and longest delay before a source is reopened; the delay doubles each time, with jitter."""
START_SECONDS = 120.0
"""How long a reader process may take to send its first message: imports are slow on a busy machine."""
LOCAL_SILENCE_SECONDS = 60.0
"""How long a file's reader may make no progress: neither read, decode, sleep, nor wait for its frames to be taken."""
MOST_PATIENCE = 10.0
"""The silence allowed to a slow live source is at most this multiple of the usual silence."""
LEARNING_PERIODS = 60
"""Pauses are forgotten after this many times the usual silence."""
RECORDING_TRIES = 8
"""How many times in a row a recording on a server may break off without a new frame before the capture gives up."""
_END_SECONDS = 1.0


@dataclass
class SourceStatus:
    """A source's status: frames that arrived, frames skipped in favour of newer ones, restarts.

    ``state`` is starting, live, reconnecting, ended or failed. ``error`` says why it is reconnecting or failed, or that
    a recording stopped short of its declared length. ``note`` is a remark about the source.
    """

    came: int = 0
    skipped: int = 0
    restarts: int = 0
    state: str = "starting"
    error: str | None = None
    note: str | None = None


class Capture:
    """Reads a source in a child process and keeps it running.

    ``newest`` returns the newest frame since the last call. Stream time begins at ``start``. For a recording it follows
    the recording's own clock, with ``start`` at ``source.begin``; for a live source it follows real time, with
    ``start`` at the moment the capture was created. If ``start`` is None, stream time is 0 at the first frame.

    A reader that dies or makes no progress is killed and replaced, after a delay that grows with repeated failures. A
    recording resumes where it stopped; for other sources stream time includes the gap. A live source may initially be
    silent for ``silence`` seconds; one that turns out to send less often is allowed more. The capture ends when a
    recording ends. It fails permanently only if the reader reports, before any frame, that the source cannot be read,
    or if a recording on a server keeps breaking off.
    The memory shared with the reader is an unnamed file in ``folder``, preferably in RAM (``shared_folder``).
    Raises ``UserError`` when there is no room for it.
    """

    def __init__(self, source: Source, folder: str, start: float | None = None, silence: float = SILENCE_SECONDS):
        self.source = source
        self.status = SourceStatus()
        self.position: float | None = None
        """The time in the recording of the newest frame taken, to resume from; None for sources that cannot resume."""
        self._silence, self._patience = silence, silence
        self._longest_pause, self._learning_since = 0.0, time.monotonic()
        self._ring = FrameRing.unnamed(folder, source.size)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._opened: Opened | None = None  # what the current reader reported about the source
        self._last_word: Ended | Broken | None = None
        self._number = 0  # of the newest frame taken, as the current reader counts
        self._spoke = False  # whether the current reader has sent anything
        self._heard_at = 0.0
        self._zero = None if start is None else time.monotonic() - start  # stream time 0 on the monotonic clock
        # From a recording's time to stream time; None until a restarted loop delivers its first frame.
        self._offset: float | None = (start or 0.0) - source.begin
        self._last_time: float | None = None
        self._last_clock = 0.0
        self._failures = 0
        self._broke_off: str | None = None
        self._start_at = 0.0

    def fileno(self) -> int | None:
        """A descriptor that is readable when the reader has sent something; None while no reader runs."""
        return self._pipe.fileno() if self._pipe is not None else None

    def newest(self) -> Frame | None:
        """The newest frame since the last call, or None. Its stream time continues across restarts."""
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
        """How long the reader may stay silent, in seconds."""
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
        """Process the reader's messages: signs of progress, what the source is, how it ended."""
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
        """Adapt the allowed silence to the source's pace: three times its longest pause."""
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
            if self._offset is None:  # the gap counts as stream time
                self._offset = (self._last_time or 0.0) + (now - self._last_clock) - frame.time
            moment = frame.time + self._offset
            self.position = None if self.source.loop else frame.time
        moment = max(moment, self._last_time or 0.0)
        self._last_time, self._last_clock = moment, now
        return replace(frame, time=moment)

    def _over(self, now: float, word: Ended | Broken) -> None:
        """End the reader; mark the source as ended or failed, or schedule a new reader."""
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
        self._start_at = now + backoff_seconds(self._failures, *RESTART_SECONDS)

    def _end_reader(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(_END_SECONDS)  # exceeded only if the system itself hangs, say on a network drive
            with contextlib.suppress(ValueError):
                self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def close(self) -> None:
        """End the reader and free the shared memory."""
        self._end_reader()
        self._ring.close()


class PushedFrames:
    """Frames that another process writes into a ring as they arrive (from a WebSocket, say), at most ``fps`` a second.

    Their times in the ring are those of the system's monotonic clock, which all processes share. Stream time is 0 at
    the first frame or, if ``start`` is given, ``start`` at the moment this object was created.
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
        self._early: tuple[Frame, float] | None = None  # with when (monotonic seconds) it was seen

    def fileno(self) -> int | None:
        """None: a ring has to be polled."""
        return None

    def newest(self) -> Frame | None:
        """The newest frame pushed since the last call, if it is due.

        A frame that comes too early waits; it is given when its time has come and no newer one has replaced it.
        """
        found = self._ring.newest(self._number)
        if found is None:
            return self._waited()
        number, frame = found
        passed_over = number - self._number - 1
        self._number = self._ring.taken = number
        self._zero = frame.time if self._zero is None else self._zero
        moment = max(frame.time - self._zero, self._last_time or 0.0)
        if not self._rate.picks(moment):
            self._early = replace(frame, time=moment), time.monotonic()
            return None
        # Of the frames passed over, count only as many as the rate would have kept.
        due = int((moment - self._last_time) * self._fps) - 1 if self._last_time is not None else 0
        self.status.skipped += max(0, min(passed_over, due))
        self.status.came += max(0, min(passed_over, due))
        return self._taken(replace(frame, time=moment))

    def _waited(self) -> Frame | None:
        """The frame that came too early, once it is due."""
        if self._early is None:
            return None
        frame, since = self._early
        return self._taken(frame) if self._rate.picks(frame.time + time.monotonic() - since) else None

    def _taken(self, frame: Frame) -> Frame:
        self.status.came += 1
        self.status.state = "live"
        self._last_time, self._early = frame.time, None
        return frame

    def close(self) -> None:
        """Do nothing: the ring belongs to whoever created it."""


def wait_for_any(readers: Sequence[Capture | PushedFrames], seconds: float) -> None:
    """Sleep until a reader has frames, at most ``seconds``."""
    descriptors = [number for reader in readers if (number := reader.fileno()) is not None]
    if descriptors:
        multiprocessing.connection.wait(descriptors, seconds)  # select takes no descriptor above 1,023
    else:
        time.sleep(seconds)
