"""Clips of alerts: the recorded frames around what an alert tells, as MP4."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
from av.error import FFmpegError
from fastapi.responses import FileResponse
from PIL import Image
from starlette.types import Receive, Scope, Send

from flash_vstream.errors import UserError
from flash_vstream.serve.alert_store import SavedAlert
from flash_vstream.serve.in_progress import InProgress
from flash_vstream.serve.recorder import Recorder
from flash_vstream.serve.recordings import RecordedFrame, Recordings
from flash_vstream.serve.security import ApiError
from flash_vstream.video.pictures import decode_picture
from flash_vstream.video.reader import FrameRate
from flash_vstream.video.shared_memory import OwnedFolder
from flash_vstream.video.writer import write_clip

AROUND_SECONDS = 5.0
"""A clip runs from this long before its event began to this long after its alert, in stream time."""
EVENT_SECONDS = 20.0
"""A clip shows at most this much of an event before its alert."""
LATE_SECONDS = 5.0
"""How long the last frames of a clip are waited for beyond the time that they should take."""
MOST_FPS = 25.0
AT_ONCE = 32
"""How many clips are waited for or made at once; of these, one is encoded at a time."""
KEPT = 16
"""How many clips are kept for callers who ask for parts of them, one after another."""
POLL_SECONDS = 0.1


class AlertClips:
    """Makes clips of alerts from ``recordings``; ``recorder`` knows whether more frames are to come."""

    def __init__(self, recordings: Recordings, recorder: Recorder):
        self._recordings, self._recorder = recordings, recorder
        self._owned = OwnedFolder("flash-vstream-alerts")
        self._places = InProgress(AT_ONCE)
        self._made: OrderedDict[str, tuple[Path, float]] = OrderedDict()  # alert -> file, when it begins
        self._names = 0
        self._lock = threading.Lock()  # held while a clip is made

    async def response(self, alert: SavedAlert, ending: Callable[[], bool]) -> "ClipResponse":
        """An alert's clip; waits for the frames after the alert if it is new.

        Raises ``ApiError``: 404 without frames, 429 if too many clips are being made, 409 if there is no room.
        """
        if not self._places.begin():
            raise ApiError(429, f"{AT_ONCE} clips are being made, the maximum; try again in a moment")
        try:
            began = time.monotonic()
            while self._may_go_on(alert, time.monotonic() - began) and not ending():
                await anyio.sleep(POLL_SECONDS)
            return await anyio.to_thread.run_sync(self._clip, alert)
        finally:
            self._places.end()

    def _may_go_on(self, alert: SavedAlert, waited: float) -> bool:
        """Whether frames after an alert are still to come, ``waited`` seconds after its clip was asked for."""
        longest = AROUND_SECONDS + LATE_SECONDS
        if (
            waited > longest
            or time.time() - alert.body["clock"] > longest
            or not self._recorder.will_record(alert.stream)
        ):
            return False
        recording = self._recordings.of(alert.stream)
        newest = recording.newest if recording is not None else None
        return newest is None or newest < alert.body["time"] + AROUND_SECONDS

    def _clip(self, alert: SavedAlert) -> "ClipResponse":
        """The clip of an alert, as it is or newly made."""
        with self._lock:
            path, begin = self._made.get(alert.id, (Path(self._owned.path) / f"{alert.id}.mp4", 0.0))
            try:
                if not path.exists():
                    begin = self._make(alert, path)
                self._names += 1
                own = path.with_name(f"{self._names}.mp4")
                os.link(path, own)
            except (OSError, FFmpegError) as error:
                path.unlink(missing_ok=True)
                raise ApiError(409, f"the clip cannot be made ({error})") from None
            self._made[alert.id] = path, begin
            self._made.move_to_end(alert.id)
            while len(self._made) > KEPT:
                self._made.popitem(last=False)[1][0].unlink(missing_ok=True)
        headers = {"cache-control": "private, no-cache", "x-stream-time": str(begin)}
        return ClipResponse(own, media_type="video/mp4", headers=headers)

    def _make(self, alert: SavedAlert, path: Path) -> float:
        """Write an alert's clip to ``path``; returns the stream time at which it begins."""
        began, at = alert.body["began"], alert.body["time"]
        begin, end = max(began, at - EVENT_SECONDS) - AROUND_SECONDS, at + AROUND_SECONDS
        rate = FrameRate(MOST_FPS)
        found = self._recordings.frames_around(alert.stream, begin, end, alert.body["clock"])
        found = [frame for frame in found if rate.picks(frame.time)]
        if not found:
            raise ApiError(404, _why_none(alert))
        write_clip(path, _pictures(found))
        return found[0].time

    def clear(self) -> None:
        """Delete the clips made so far; those that are still wanted are made again."""
        with self._lock:
            while self._made:
                self._made.popitem()[1][0].unlink(missing_ok=True)

    def close(self) -> None:
        """Delete every clip. Safe to call twice."""
        self._owned.cleanup()


def _pictures(frames: Sequence[RecordedFrame]) -> Iterator[tuple[float, Image.Image]]:
    """Frames decoded, with their times from that of the first; damaged ones are left out."""
    for frame in frames:
        with suppress(UserError):
            yield frame.time - frames[0].time, decode_picture(frame.jpeg)


def _why_none(alert: SavedAlert) -> str:
    """Why there is no clip of an alert."""
    if alert.body.get("clip") is None:
        return f"stream {alert.stream!r} was not recorded when this was told; start the server with --record SIZE"
    return "the frames around this alert are not kept any more; start the server with a larger --record SIZE"


class ClipResponse(FileResponse):
    """A file that is deleted once it has been sent; ``Range`` is honoured.

    The file is a further name of one that other responses may still need.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)
