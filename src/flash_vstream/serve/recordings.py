"""Frames of streams kept on disk within a bound, the oldest deleted first; independent of processes and HTTP.

A stream's frames are in segments, files to which one frame after another is appended as motion JPEG with its times. A
server that is killed leaves at most one frame incomplete, and the rest can be read: by this module, FFmpeg and VLC.
"""

import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote, unquote

from flash_vstream.errors import UserError
from flash_vstream.serve.store import StoreError

SEGMENT_SECONDS = 60.0
SEGMENT_BYTES = 4_000_000
"""A segment ends before it has more stream time or more bytes than these; it is deleted as a whole."""
LEAST_BYTES = 64_000_000
"""The smallest bound: a segment for each of a server's 16 streams."""
RESERVE_BYTES = 256 * 2**20
"""With less than this free on the disk, recordings do not grow: memories, answers and alerts need it."""
NEAR_SECONDS = 600.0
"""Frames recorded further than this from a moment, by the wall clock, belong to another run with the same stream times.
"""
_NAME = re.compile(r"(\d{10})-(\d+\.\d{3})\.mjpeg")
_HEAD = re.compile(
    rb"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: (\d+)\r\n"
    rb"X-Stream-Time: ([\d.e+-]+)\r\nX-Clock: ([\d.e+-]+)\r\n\r\n"
)
log = logging.getLogger("flash_vstream.serve")


@dataclass(frozen=True)
class RecordedFrame:
    """A frame as JPEG, its stream time, and when (Unix time) it was recorded."""

    time: float
    clock: float
    jpeg: bytes = field(repr=False)


@dataclass
class _Segment:
    """A file of frames; ``number`` rises with each, ``begin`` is the stream time of its first frame."""

    path: Path
    number: int
    begin: float
    size: int = 0


@dataclass
class Recording:
    """One stream's recording. It survives a rename; once the stream is deleted it is no longer used.

    ``running`` is whether its last segment may be continued; ``newest`` is the stream time of its newest frame, if that
    came since the server started.
    """

    folder: Path
    segments: list[_Segment] = field(default_factory=list)
    running: bool = False
    newest: float | None = None
    is_deleted: bool = False


class Recordings:
    """The recordings of all ``streams`` in ``folder``, of at most ``most_bytes`` in all.

    Those of other streams are deleted. With None as ``most_bytes``, or as ``folder``, nothing is added. Raises
    ``UserError`` if the folder cannot be used.
    """

    def __init__(self, folder: Path | None, most_bytes: int | None, streams: Collection[str]):
        self._folder, self.most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        self._recordings: dict[str, Recording] = {}
        self._number = 0
        self.bytes = self.frames = 0
        """The size of all recordings, and how many frames were recorded since the server started."""
        try:
            if folder is not None and most_bytes is not None:
                folder.mkdir(exist_ok=True)
            if folder is not None and folder.is_dir():
                self._find(folder, streams)
        except OSError as error:
            raise UserError(f"the recordings in {folder} cannot be used ({error}); make it writable") from None

    def _find(self, folder: Path, streams: Collection[str]) -> None:
        for own in folder.iterdir():
            name = unquote(own.name)
            if name not in streams:
                shutil.rmtree(own, ignore_errors=True)
                continue
            found = ((path, _NAME.fullmatch(path.name)) for path in own.iterdir())
            segments = [_Segment(p, int(m[1]), float(m[2]), p.stat().st_size) for p, m in found if m is not None]
            segments.sort(key=lambda segment: segment.number)
            self._recordings[name] = Recording(own, segments)
            self.bytes += sum(segment.size for segment in segments)
            self._number = max([self._number, *(segment.number for segment in segments)])
        if self.most_bytes is not None:
            self._shrink(self.most_bytes)

    # --- writing

    def follow(self, stream: str) -> None:
        """Keep a recording of a stream from now on, going on with what there is of it."""
        with self._lock:
            if self._folder is not None and stream not in self._recordings:
                self._recordings[stream] = Recording(self._folder / quote(stream, safe=""))

    def of(self, stream: str) -> Recording | None:
        """A stream's recording; None if none is kept."""
        return self._recordings.get(stream)

    def write(self, recording: Recording, frame: RecordedFrame) -> bool:
        """Append a frame, deleting the oldest segments if there is no room for it; raises ``OSError``.

        Returns False, without doing anything, if the stream has been deleted in the meantime. After an error the frame
        is not there, and the next one may be tried.
        """
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(frame.jpeg)}\r\n"
        head += f"X-Stream-Time: {frame.time!r}\r\nX-Clock: {frame.clock!r}\r\n\r\n"
        part = head.encode() + frame.jpeg + b"\r\n"
        with self._lock:
            if recording.is_deleted or self.most_bytes is None:
                return False
            self._make_room(len(part), self.most_bytes)
            segment = self._segment(recording, frame.time, len(part))
            try:
                _append(segment.path, segment.size, part)
            except BaseException:
                recording.running = False  # what was written of it stays at its end, if it could not be taken back
                raise
            segment.size += len(part)
            self.bytes += len(part)
            self.frames += 1
            recording.running, recording.newest = True, frame.time
        return True

    def _make_room(self, size: int, most: int) -> None:
        """Delete the oldest segments until ``size`` bytes more are within the bound and leave the disk its reserve."""
        assert self._folder is not None
        free = shutil.disk_usage(self._folder).free
        allowed = min(most, self.bytes + max(0, free - RESERVE_BYTES))
        self._shrink(allowed - size)
        if self.bytes + size > allowed:
            raise OSError(f"less than {RESERVE_BYTES / 2**20:.0f} MB are free on the disk")

    def _shrink(self, most: int) -> None:
        """Delete the oldest segments until at most so many bytes remain."""
        while self.bytes > most:
            kept = [recording for recording in self._recordings.values() if recording.segments]
            if not kept:
                return
            oldest = min(kept, key=lambda recording: recording.segments[0].number)
            oldest.segments[0].path.unlink(missing_ok=True)
            self.bytes -= oldest.segments.pop(0).size
            oldest.running = oldest.running and bool(oldest.segments)

    def _segment(self, recording: Recording, time: float, size: int) -> _Segment:
        """The segment to append a frame of ``size`` bytes at stream time ``time`` to, a new one if need be."""
        if recording.running and (recording.newest or 0.0) <= time:
            last = recording.segments[-1]
            if time < last.begin + SEGMENT_SECONDS and last.size + size <= SEGMENT_BYTES:
                return last
        recording.folder.mkdir(exist_ok=True)
        self._number += 1
        path = recording.folder / f"{self._number:010}-{time:.3f}.mjpeg"
        recording.segments.append(_Segment(path, self._number, time))
        return recording.segments[-1]

    # --- reading

    def frames_around(self, stream: str, begin: float, end: float, clock: float) -> list[RecordedFrame]:
        """A stream's frames between two stream times, in order of time, of about the Unix time ``clock``.

        Stream times repeat when a stream starts over or resumes from an older save. So only
        frames that were recorded in one go are returned: the run that is nearest to ``clock``, if it is near.
        """
        with self._lock:
            recording = self._recordings.get(stream)
            segments = list(recording.segments) if recording is not None else []
        runs: list[list[RecordedFrame]] = []
        newest: float | None = None  # of the run; None before its first frame
        before: _Segment | None = None
        for segment, after in zip_longest(segments, segments[1:]):
            if before is not None and segment.begin < before.begin:
                newest = None
            before = segment
            if not begin - SEGMENT_SECONDS <= segment.begin <= end + 0.001:  # names have milliseconds
                continue
            if after is not None and segment.begin <= after.begin < begin:
                continue
            for frame in _frames_in(segment.path):
                if newest is None or frame.time < newest:
                    runs.append([])
                # The newest frame is recorded again after a restart.
                if begin <= frame.time <= end and (not runs[-1] or frame.time > runs[-1][-1].time):
                    runs[-1].append(frame)
                newest = frame.time
        distances = [min((abs(frame.clock - clock) for frame in run), default=math.inf) for run in runs]
        nearest = min(distances, default=math.inf)
        return runs[distances.index(nearest)] if nearest <= NEAR_SECONDS else []

    # --- streams

    def rename_stream(self, name: str, new_name: str) -> None:
        """Keep a stream's recording under its new name; raises ``StoreError``, and nothing has changed then."""
        with self._lock:
            recording = self._recordings.get(name)
            if recording is None or self._folder is None:
                return
            folder = self._folder / quote(new_name, safe="")
            try:
                if recording.folder.exists():
                    recording.folder.rename(folder)
            except OSError as error:
                raise StoreError(str(error)) from None
            recording.folder = folder
            for segment in recording.segments:
                segment.path = folder / segment.path.name
            self._recordings[new_name] = self._recordings.pop(name)

    def remove_stream(self, stream: str) -> None:
        """Delete a stream's recording; what cannot be deleted now is deleted at the next start."""
        with self._lock:
            recording = self._recordings.pop(stream, None)
            if recording is None:
                return
            recording.is_deleted = True
            self.bytes -= sum(segment.size for segment in recording.segments)
            doomed = recording.folder.with_name(f"~{self._number}-{recording.folder.name}")  # no stream's name
            with suppress(OSError):
                recording.folder.rename(doomed)
        for folder in (doomed, recording.folder):
            shutil.rmtree(folder, ignore_errors=True)


def _append(path: Path, size: int, part: bytes) -> None:
    """Append to a file of ``size`` bytes; raises ``OSError``, and the file is as it was then, if that is possible."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        written = os.write(file, part)
        if written < len(part):
            raise OSError("the disk is full")
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, size)
        raise
    finally:
        os.close(file)


def _frames_in(path: Path) -> Iterator[RecordedFrame]:
    """The frames of a segment up to the first that is incomplete; none if it has been deleted."""
    try:
        data = path.read_bytes()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("a recording cannot be read", extra={"reason": str(error)})
        return
    at = 0
    while (head := _HEAD.match(data, at)) is not None:
        at = head.end() + int(head[1])
        if at > len(data):
            return
        yield RecordedFrame(float(head[2]), float(head[3]), data[head.end() : at])
        at += len(b"\r\n")
