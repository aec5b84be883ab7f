"""Records the newest frames of streams as they are published, in a thread of the server.

It reads what is published like any other reader, so the frame worker never waits for it. Where the disk or the server
is too slow, frames are passed over and counted.
"""

import logging
import math
import threading
import time
from contextlib import suppress

from flash_vstream.errors import UserError
from flash_vstream.live.engine import Streams
from flash_vstream.live.published import read_picture
from flash_vstream.serve.metrics import Metrics
from flash_vstream.serve.recordings import RecordedFrame, Recording, Recordings

LOOKS_PER_FRAME = 4
"""How often a new frame is looked for in the time that a stream's rate leaves between two."""
LOOK_SECONDS = (0.02, 0.25)
"""The shortest and longest time between two looks."""
log = logging.getLogger("flash_vstream.serve")


class Recorder:
    """Records, until closed, the streams that have a recording and whose source allows it.

    With ``recordings`` that take nothing, it does nothing.
    ``missed`` counts frames that were passed over, ``error`` says why the newest could not be written.
    """

    def __init__(self, recordings: Recordings, live: Streams):
        self._recordings, self._live = recordings, live
        self._is_on = recordings.most_bytes is not None
        self.missed = 0
        self.error: str | None = None
        # For each stream, how many frames had been kept when it was looked at, and when it is looked at again.
        self._seen: dict[str, tuple[Recording, int, float]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        if self._is_on:
            self._thread.start()

    def records(self, name: str) -> bool:
        """Whether a stream is recorded."""
        with suppress(UserError):
            return self._is_on and self._recordings.of(name) is not None and self._live.source(name).record
        return False

    def will_record(self, name: str) -> bool:
        """Whether more frames of a stream may come to be recorded."""
        with suppress(UserError):
            return self.records(name) and self._live.status(name).state not in ("ended", "failed")
        return False

    def report_to(self, metrics: Metrics) -> None:
        """Add what is recorded to the metrics."""
        metrics.gauge("recorded_bytes", "Size of the recordings", lambda: self._recordings.bytes)
        recorded = "Frames recorded since the server started"
        metrics.gauge("frames_recorded", recorded, lambda: self._recordings.frames)
        missed = "Frames that should have been recorded since the server started, and were not"
        metrics.gauge("frames_not_recorded", missed, lambda: self.missed)

    def _run(self) -> None:
        wait = LOOK_SECONDS[0]
        while not self._stopping.wait(wait):
            wait = self._look()

    def _look(self) -> float:
        """Look at the streams whose time has come; returns the seconds until the next one's."""
        names = [name for name in self._live.names() if self.records(name)]
        for name in self._seen.keys() - set(names):
            del self._seen[name]
        if not names:
            self.error = None  # nothing is missing any more
        for name in names:
            try:
                self._look_at(name)
            except UserError:  # removed in the meantime
                pass
            except Exception as error:  # this thread must survive, and the other streams are recorded
                self._note(f"{type(error).__name__}: {error}")
        shortest, longest = LOOK_SECONDS
        due = min((due for _, _, due in self._seen.values()), default=math.inf)
        return min(max(due - time.monotonic(), shortest), longest)

    def _look_at(self, name: str) -> None:
        now, recording = time.monotonic(), self._recordings.of(name)
        if recording is None:
            return
        known, seen, due = self._seen.get(name, (None, 0, 0.0))
        if known is recording and now < due:
            return
        # The recording was taken first: if the stream has become another since, it is of no more use.
        status = self._live.status(name)
        shortest, longest = LOOK_SECONDS
        due = now + min(max(1 / (LOOKS_PER_FRAME * status.fps), shortest), longest)
        if known is not recording:
            seen = max(0, status.kept - 1)  # the newest is recorded, those before it are not missed
        if status.kept != seen and status.time is not None:
            seen = self._record(name, recording, seen)
        self._seen[name] = recording, seen, due

    def _record(self, name: str, recording: Recording, seen: int) -> int:
        """Record a stream's newest frame; returns how many frames had been kept with it."""
        picture = read_picture(self._live.shared_state(name))
        if picture is None:
            return seen
        self.missed += max(0, picture.kept - seen - 1)
        try:
            self._recordings.write(recording, RecordedFrame(picture.time, time.time(), picture.jpeg))
        except OSError as error:
            self.missed += 1
            self._note(error.strerror or str(error))
        else:
            self.error = None
        return picture.kept

    def _note(self, error: str) -> None:
        if error != self.error:
            log.error("frames cannot be recorded", extra={"reason": error})
        self.error = error

    def close(self) -> None:
        """Stop recording. Safe to call twice."""
        self._stopping.set()
        if self._is_on:
            self._thread.join(timeout=5)
