"""Live sources: whatever can be watched becomes frames as time goes by.

A source is named as a person would name it: a file, ``rtsp://…``, ``http(s)://…`` (files, MJPEG,
HLS, MPEG-TS), ``udp://…``, ``/dev/video0``, a folder of pictures, a named pipe, or ``push`` for
frames that somebody else puts into a ring.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import av
from av.container import InputContainer
from av.error import ExitError, FFmpegError, InvalidDataError

from flash_vstream.errors import UserError
from flash_vstream.video.addresses import NETWORK, hide_secrets, scheme_of, split_login
from flash_vstream.video.demux import BrokenOffError, Playback, clock_may_jump
from flash_vstream.video.folders import read_folder
from flash_vstream.video.reader import Frame, FrameRate, opened, play, rgb, video_stream

__all__ = ["NETWORK", "PUSH", "OpenedSource", "Source", "hide_secrets", "open_source", "watch_source"]

PUSH = "push"
PROTOCOLS = "rtsp,rtsps,rtmp,rtmps,rtp,srtp,http,https,httpproxy,tls,tcp,udp,srt,crypto,data"
"""What a network source may lead FFmpeg to: a playlist from elsewhere must not open local files."""
SILENCE_SECONDS = 12.0
"""How long a live source may be silent before it is given up, as long as nothing is known of its pace."""
_OPEN_SHARE = 0.7
KEY_FRAME_SECONDS = 60.0
"""How long a live source may send what does not decode: some cameras send two key frames a minute."""
ARRIVAL_SLACK = 0.25
"""The share of a tick by which a frame that is timed by its arrival may be early."""
BEAT_SECONDS = 0.5
"""How often work in progress is told of, at most."""
READ_LIMIT_SECONDS = 3600.0
"""For PyAV, which would otherwise go on with the limit for opening; whoever started this judges silence."""


@dataclass(frozen=True)
class Source:
    """What to watch and how.

    ``fps`` frames a second of stream time are looked at, each scaled and cropped to ``size``
    pixels square. ``pace`` is for files: ``"real"`` plays at the file's own speed, ``"fast"`` as
    fast as it can be read. ``loop`` begins a file or folder again at its end, stream time going on.
    ``transport`` is RTSP's, ``"tcp"`` or ``"udp"``. ``begin`` is where in a recording to begin, in seconds.

    A source may name what is not there (any more); ``checked`` is for names that a user has just given.
    """

    name: str = field(repr=False)  # it may hold a password
    fps: float = 1.0
    size: int = 256
    pace: str = "real"
    loop: bool = False
    transport: str = "tcp"
    begin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 120:
            raise UserError(f"the frame rate is {self.fps:g}; it must be above 0 and at most 120")
        if self.pace not in ("real", "fast"):
            raise UserError(f"the pace is {self.pace!r}; choose real or fast")
        if self.transport not in ("tcp", "udp"):
            raise UserError(f"the RTSP transport is {self.transport!r}; choose tcp or udp")

    def checked(self) -> "Source":
        """Return the source; raises ``UserError`` when there is nothing at its path, or its address cannot be read."""
        if self.is_network:
            _check_address(self.name, self.shown)
        elif not self.is_push and not os.path.exists(self.name):
            raise UserError(f"there is nothing to watch at {self.shown}; check the path or the address")
        return self

    @property
    def is_network(self) -> bool:
        """Whether the source comes over a network."""
        return scheme_of(self.name) in NETWORK

    @property
    def is_push(self) -> bool:
        """Whether frames are put into the stream's ring by somebody else."""
        return self.name == PUSH

    @property
    def is_pipe(self) -> bool:
        """Whether the source is a named pipe; False when nothing is there."""
        if self.is_network or self.is_push:
            return False
        try:
            return stat.S_ISFIFO(os.stat(self.name).st_mode)
        except (OSError, ValueError):
            return False

    @property
    def is_device(self) -> bool:
        """Whether the source is a camera of this machine."""
        return self.name.startswith("/dev/video")

    @property
    def is_local(self) -> bool:
        """Whether the source is a file or a folder, which keeps until it is read."""
        return not (self.is_network or self.is_device or self.is_push or self.is_pipe)

    @property
    def is_finite(self) -> bool:
        """Whether the source is known to end: a file, a folder or a pipe.

        A recording on a server ends too, but what is a recording is known when it is opened (``OpenedSource.live``).
        """
        return not (self.loop or self.is_network or self.is_device or self.is_push)

    @property
    def can_resume(self) -> bool:
        """Whether it can be taken up where it was left, if it is a recording: with an end, and not read as it comes."""
        return not (self.loop or self.is_device or self.is_push or self.is_pipe)

    @property
    def shown(self) -> str:
        """The source's name without passwords, for people and logs."""
        return hide_secrets(self.name)


def _check_address(address: str, shown: str) -> None:
    login, _, certain = split_login(address.partition("://")[2])
    if certain and any(mark in login for mark in "/?#"):
        raise UserError(f"{shown}: in a user name or password, write / as %2F, ? as %3F, # as %23 and @ as %40")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
        readable = bool(host or port) and "\0" not in address and bool(address.encode())
    except ValueError:
        readable = False
    if not readable:
        raise UserError(f"{shown} is not an address that can be read; write it as rtsp://host:port/path")


@dataclass(frozen=True)
class OpenedSource:
    """A source that has been opened.

    ``live`` is whether its frames are timed by their arrival, from 0 at the first; if not, they have the times of the
    recording, and ``begin`` of the source counts.
    """

    frames: Iterator[Frame]
    live: bool


def watch_source(source: Source) -> Iterator[Frame]:
    """Frames of a source as its time goes by; ends where the source ends. See ``open_source``."""
    yield from open_source(source).frames


def open_source(
    source: Source,
    beat: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda _: None,
    patience: float = SILENCE_SECONDS,
) -> OpenedSource:
    """Open a source; its frames come as its time goes by.

    Cameras, streams and pipes are timed by arrival, since cameras' time stamps jump and run backwards. Files, folders
    and recordings on a web server (what has a length, or a playlist with an end) have their own times.
    ``beat`` is called while there is progress, ``note`` with what should be known of the source.
    A network source that sends nothing for ``patience`` seconds is given up.

    Raises ``UserError`` when there is nothing to watch, and what FFmpeg raises when a source breaks. A recording that
    ends before the length it declares raises ``BrokenOffError`` after its last frame.
    """
    if source.is_local:
        return OpenedSource(_recorded(source, _passes_of_path(source, beat, note), beat), live=False)
    container = _open_container(source, patience, beat)
    if _is_recording(container, source):
        return OpenedSource(_recorded(source, _passes_of_url(source, container, beat, patience), beat), live=False)
    return OpenedSource(_arriving(source, container, beat, patience), live=True)


def _recorded(source: Source, read: Callable[[float], Iterator[Frame]], beat: Callable[[], None]) -> Iterator[Frame]:
    """Frames that ``read`` gives from a time on, at the source's pace, again and again for a loop."""
    offset, begin, started = 0.0, source.begin, None
    while True:
        last = offset
        for frame in read(begin):
            last = offset + frame.time
            if source.pace == "real":
                started = time.monotonic() - last if started is None else started
                _sleep_until(started + last, beat)
            yield Frame(last, frame.image)
        if not source.loop:
            return
        offset, begin = last + 1 / source.fps, 0.0


def _sleep_until(moment: float, beat: Callable[[], None]) -> None:
    while (left := moment - time.monotonic()) > 0:
        time.sleep(min(left, BEAT_SECONDS))
        beat()


def _passes_of_path(
    source: Source, beat: Callable[[], None], note: Callable[[str], None]
) -> Callable[[float], Iterator[Frame]]:
    def read(begin: float) -> Iterator[Frame]:
        if os.path.isdir(source.name):
            yield from read_folder(source.name, source.fps, source.size, begin, note, beat)
            return
        with opened(source.name) as (container, stream):
            try:
                yield from play(Playback(container, stream, beat), source.name, source.fps, source.size, begin=begin)
            except BrokenOffError as error:
                if not source.loop:
                    raise
                note(f"the file {error}")

    return read


def _passes_of_url(
    source: Source, container: InputContainer, beat: Callable[[], None], patience: float
) -> Callable[[float], Iterator[Frame]]:
    unused = [container]

    def read(begin: float) -> Iterator[Frame]:
        with unused.pop() if unused else _open_container(source, patience, beat) as recording:
            playback = Playback(recording, video_stream(recording, source.shown), beat)
            yield from play(playback, source.shown, source.fps, source.size, begin=begin)

    return read


def _arriving(source: Source, container: InputContainer, beat: Callable[[], None], patience: float) -> Iterator[Frame]:
    """Frames of a camera, a network stream or a pipe, timed by their arrival."""
    with container:
        playback = Playback(container, video_stream(container, source.shown), beat)
        rate, first = FrameRate(source.fps, ARRIVAL_SLACK), None
        for frame in playback.decoded(patience_seconds=KEY_FRAME_SECONDS):
            now = time.monotonic()
            first = now if first is None else first
            if rate.picks(now - first):
                yield Frame(now - first, rgb(frame, source.size))
    if first is None and playback.error is not None and container.format.name == "mpjpeg":
        yield from _arriving(source, _open_as_jpegs(source, patience), beat, patience)
    elif playback.error is not None and not source.is_finite:
        raise OSError(playback.error)


def _is_recording(container: InputContainer, source: Source) -> bool:
    """Whether what a web server sends was recorded: it has a length. Live streams and open playlists have none."""
    kind = container.format.name
    if scheme_of(source.name) not in ("http", "https") or any(word in kind for word in ("jpeg", "image", "_pipe")):
        return False
    # MPEG-TS tells its length by its last packet only, which a server that knows no ranges does not give.
    is_ts = "hls" not in kind and clock_may_jump(container)
    return bool(container.duration and container.duration > 0) or (is_ts and container.size > 0)


def _ffmpeg_options(source: Source, patience: float) -> dict[str, str]:
    """FFmpeg's options for a source. Its own time limits lie above ours, which tell what happened."""
    microseconds = str(int(1.5 * patience * 1e6))
    options = {"rw_timeout": microseconds, "protocol_whitelist": PROTOCOLS} if source.is_network else {}
    if scheme_of(source.name) in ("rtsp", "rtsps"):
        options |= {"rtsp_transport": source.transport, "timeout": microseconds}
    return options


def _open_container(source: Source, patience: float, beat: Callable[[], None]) -> InputContainer:
    """The opened source. What a web server sends and FFmpeg does not know is tried as a mere sequence of JPEGs."""
    options = _ffmpeg_options(source, patience)
    if source.is_device:
        return av.open(source.name, format="v4l2", options=options)
    if scheme_of(source.name) not in ("http", "https"):
        return av.open(source.name, options=options)
    try:
        return _open_within(_OPEN_SHARE * patience, source.name, None, options)
    except (InvalidDataError, TimeoutError) as error:
        failure: Exception = error
    beat()
    try:
        return _open_as_jpegs(source, patience)
    except TimeoutError:
        raise
    except (FFmpegError, OSError, ValueError):
        raise failure from None


def _open_within(seconds: float, name: str, format: str | None, options: dict[str, str]) -> InputContainer:
    """The opened address. Raises ``TimeoutError``: what is not understood and has no end would be read for ever."""
    begun = time.monotonic()
    with suppress(ExitError):
        container = av.open(name, format=format, options=options, timeout=(seconds, READ_LIMIT_SECONDS))
        if time.monotonic() - begun < seconds:
            return container
        container.close()  # it was interrupted within, and would say so at the next packet
    raise TimeoutError(f"nothing was understood of it within {seconds:.0f} s")


def _open_as_jpegs(source: Source, patience: float) -> InputContainer:
    """The source as JPEGs with anything between them.

    Some cameras send a multipart body that FFmpeg does not take for one: no content types, bare line feeds, boundaries
    that were never announced, or none.
    """
    options = _ffmpeg_options(source, patience) | {"analyzeduration": "1", "fpsprobesize": "0"}
    container = _open_within(_OPEN_SHARE * patience, source.name, "mjpeg", options)
    if container.streams.video and container.streams.video[0].codec_context.width:
        return container
    container.close()
    raise ValueError("no JPEGs")
