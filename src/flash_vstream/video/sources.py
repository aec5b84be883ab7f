"""Sources: turns anything watchable into frames as time passes.

A source's name is a path or URL: a file, ``rtsp://…``, ``http(s)://…`` (files, MJPEG, HLS, MPEG-TS),
``udp://…``, ``/dev/video0``, a folder of pictures, a named pipe, or ``push`` for frames that another
process writes into a ring.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace

import av
from av.container import InputContainer
from av.error import ExitError, FFmpegError, InvalidDataError

from flash_vstream.errors import UserError
from flash_vstream.video.addresses import hide_secrets, scheme_of, split_login
from flash_vstream.video.demux import BrokenOffError, Playback, clock_may_jump
from flash_vstream.video.folders import read_folder
from flash_vstream.video.network import SourceRules, check_name, is_url, parse_url
from flash_vstream.video.reader import Frame, FrameRate, centre_and_whole, opened, play, video_stream

__all__ = ["PUSH", "OpenedSource", "Source", "hide_secrets", "open_source", "watch_source"]

PUSH = "push"
PROTOCOLS = "rtsp,rtsps,rtmp,rtmps,rtp,srtp,http,https,httpproxy,tls,tcp,udp,srt,crypto,data"
"""The protocols that FFmpeg may use for a network source: a remote playlist must not open local files."""
SILENCE_SECONDS = 12.0
"""The silence allowed to a live source until its pace is known."""
_OPEN_SHARE = 0.7
KEY_FRAME_SECONDS = 60.0
"""How long a live source may send data that does not decode: some cameras send only two key frames a minute."""
ARRIVAL_SLACK = 0.25
"""The fraction of a tick by which a frame timed by its arrival may be early."""
BEAT_SECONDS = 0.5
"""The interval between progress reports, and the longest sleep without one."""
READ_LIMIT_SECONDS = 3600.0
"""PyAV's read timeout, which would otherwise be that for opening. The parent process watches for silence."""


@dataclass(frozen=True)
class Source:
    """What to watch and how.

    At most ``fps`` frames per second of stream time are used, each scaled and cropped to ``size`` pixels
    square. ``pace`` applies to recordings: ``"real"`` plays at the recording's own speed, ``"fast"`` as fast as
    it can be read. ``loop`` restarts a file or folder at its end while stream time continues. ``transport`` is
    RTSP's, ``"tcp"`` or ``"udp"``. ``begin`` is where to start in a recording, in seconds. ``rules`` limit what
    the source may reach (None: anything) and apply to every connection and file that it leads to. ``record`` is whether
    a server that records streams keeps its frames.

    A source need not exist (any more); use ``checked`` for names that a user has just entered.
    """

    name: str = field(repr=False)  # it may contain a password
    fps: float = 1.0
    size: int = 256
    pace: str = "real"
    loop: bool = False
    transport: str = "tcp"
    begin: float = 0.0
    rules: SourceRules | None = None
    record: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 120:
            raise UserError(f"the frame rate is {self.fps:g}; it must be above 0 and at most 120")
        if self.pace not in ("real", "fast"):
            raise UserError(f"the pace is {self.pace!r}; choose real or fast")
        if self.transport not in ("tcp", "udp"):
            raise UserError(f"the RTSP transport is {self.transport!r}; choose tcp or udp")

    def checked(self) -> "Source":
        """Return the source; raises ``UserError`` if its path does not exist or its address is malformed."""
        check_name(self.name, "the source's name")
        if self.is_network:
            _check_address(self.name, self.shown)
        elif not self.is_push and not os.path.exists(self.name):
            raise UserError(f"there is nothing to watch at {self.shown}; check the path or the address")
        return self

    @property
    def is_network(self) -> bool:
        """Whether the source is on a network."""
        return is_url(self.name)

    @property
    def is_push(self) -> bool:
        """Whether another process writes frames into the stream's ring."""
        return self.name == PUSH

    @property
    def is_pipe(self) -> bool:
        """Whether the source is a named pipe; False if it does not exist."""
        if self.is_network or self.is_push:
            return False
        try:
            return stat.S_ISFIFO(os.stat(self.name).st_mode)
        except (OSError, ValueError):
            return False

    @property
    def is_device(self) -> bool:
        """Whether the source is a camera on this machine."""
        return self.name.startswith("/dev/video")

    @property
    def is_local(self) -> bool:
        """Whether the source is a local file or folder, which can wait to be read."""
        return not (self.is_network or self.is_device or self.is_push or self.is_pipe)

    @property
    def is_finite(self) -> bool:
        """Whether the source is known in advance to end: a file, a folder or a pipe.

        A recording on a server also ends, but only opening it shows that it is one (``OpenedSource.live``).
        """
        return not (self.loop or self.is_network or self.is_device or self.is_push)

    @property
    def can_resume(self) -> bool:
        """Whether the source can resume where it stopped, if opening it shows that it is a recording."""
        return not (self.loop or self.is_device or self.is_push or self.is_pipe)

    @property
    def shown(self) -> str:
        """The source's name without secrets, for people and logs."""
        return hide_secrets(self.name)


def _check_address(address: str, shown: str) -> None:
    login, _, certain = split_login(address.partition("://")[2])
    if certain and any(mark in login for mark in "/?#"):
        raise UserError(f"{shown}: in a user name or password, write / as %2F, ? as %3F, # as %23 and @ as %40")
    try:
        parse_url(address)
    except UserError as error:
        raise UserError(f"{shown}: {error}") from None


@dataclass(frozen=True)
class OpenedSource:
    """An opened source.

    If it is ``live``, its frames are timed by their arrival, from 0 at the first. Otherwise they have the recording's
    times, and the source's ``begin`` applies.
    """

    frames: Iterator[Frame]
    live: bool


def watch_source(source: Source) -> Iterator[Frame]:
    """Yield a source's frames in real time (or fast) until it ends. See ``open_source``."""
    yield from open_source(source).frames


def open_source(
    source: Source,
    beat: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda _: None,
    patience: float = SILENCE_SECONDS,
) -> OpenedSource:
    """Open a source; its frames arrive at the source's pace.

    Cameras, streams and pipes are timed by arrival, since cameras' time stamps jump and run backwards. Files, folders
    and recordings on a web server (anything with a length, or a playlist with an end) have their own times.
    ``beat`` is called while there is progress, ``note`` with remarks about the source.
    A network source that sends nothing for ``patience`` seconds is abandoned.

    Raises ``UserError`` if there is nothing to watch, and FFmpeg's error if the source breaks. A recording that ends
    before its declared length raises ``BrokenOffError`` after its last frame.
    """
    if source.is_local:
        return OpenedSource(_recorded(source, _passes_of_path(source, beat, note), beat), live=False)
    with ExitStack() as gateway:
        address = _Address(source, patience, *gateway.enter_context(_reached(source)))
        container = _open_container(address, beat)
        live = not _is_recording(container, source)
        if live:
            frames = _arriving(address, container, beat)
        else:
            frames = _recorded(source, _passes_of_url(address, container, beat), beat)
        return OpenedSource(_within(gateway.pop_all(), frames), live)


@dataclass(frozen=True)
class _Address:
    """What FFmpeg opens for a source that is not local: ``url``, which leads through the gateway if one is needed."""

    source: Source
    patience: float
    url: str
    guard: dict[str, str]

    @property
    def options(self) -> dict[str, str]:
        """FFmpeg's options. Its timeouts are longer than ours, so that ours fire first and report the reason."""
        microseconds = str(int(1.5 * self.patience * 1e6))
        options = {"rw_timeout": microseconds, "protocol_whitelist": PROTOCOLS} if self.source.is_network else {}
        if scheme_of(self.source.name) in ("rtsp", "rtsps"):
            options |= {"rtsp_transport": self.source.transport, "timeout": microseconds}
        return options | self.guard


def _reached(source: Source) -> AbstractContextManager[tuple[str, dict[str, str]]]:
    """Context with the URL and extra options for opening a source."""
    if source.is_network:
        from flash_vstream.video.gateway import reach  # its HTTP client takes 0.1 s to import

        return reach(source.name, source.rules, source.transport)
    if source.rules is not None:
        source.rules.check_path(source.name)
    return nullcontext((source.name, {}))


def _within(gateway: ExitStack, frames: Iterator[Frame]) -> Iterator[Frame]:
    with gateway:
        yield from frames


def _recorded(source: Source, read: Callable[[float], Iterator[Frame]], beat: Callable[[], None]) -> Iterator[Frame]:
    """Yield the frames that ``read`` yields from a given time on, at the source's pace, repeatedly for a loop."""
    offset, begin, started = 0.0, source.begin, None
    while True:
        last = offset
        if source.rules is not None and not source.is_network:
            source.rules.check_path(source.name)
        for frame in read(begin):
            last = offset + frame.time
            if source.pace == "real":
                started = time.monotonic() - last if started is None else started
                _sleep_until(started + last, beat)
            yield replace(frame, time=last)
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
            check = source.rules.check_path if source.rules is not None else lambda _: None
            yield from read_folder(source.name, source.fps, source.size, begin, note, beat, check)
            return
        with opened(source.name) as (container, stream):
            try:
                playback = Playback(container, stream, beat)
                yield from play(playback, source.name, source.fps, source.size, begin=begin, whole=True)
            except BrokenOffError as error:
                if not source.loop:
                    raise
                note(f"the file {error}")

    return read


def _passes_of_url(
    address: _Address, container: InputContainer, beat: Callable[[], None]
) -> Callable[[float], Iterator[Frame]]:
    source, unused = address.source, [container]

    def read(begin: float) -> Iterator[Frame]:
        with unused.pop() if unused else _open_container(address, beat) as recording:
            playback = Playback(recording, video_stream(recording, source.shown), beat)
            yield from play(playback, source.shown, source.fps, source.size, begin=begin, whole=True)

    return read


def _arriving(address: _Address, container: InputContainer, beat: Callable[[], None]) -> Iterator[Frame]:
    """Yield the frames of a camera, network stream or pipe, timed by their arrival."""
    source = address.source
    with container:
        playback = Playback(container, video_stream(container, source.shown), beat)
        rate, first = FrameRate(source.fps, ARRIVAL_SLACK), None
        playback.decode_for(rate, lambda: time.monotonic() - first if first is not None else None)
        for frame in playback.decoded(patience_seconds=KEY_FRAME_SECONDS):
            now = time.monotonic()
            first = now if first is None else first
            if rate.picks(now - first):
                yield Frame(now - first, *centre_and_whole(frame, source.size))
    if first is None and playback.error is not None and container.format.name == "mpjpeg":
        yield from _arriving(address, _open_as_jpegs(address), beat)
    elif playback.error is not None and not source.is_finite:
        raise OSError(playback.error)


def _is_recording(container: InputContainer, source: Source) -> bool:
    """Whether a web server's response is a recording: it has a length. Live streams and open playlists have none."""
    kind = container.format.name
    if scheme_of(source.name) not in ("http", "https") or any(word in kind for word in ("jpeg", "image", "_pipe")):
        return False
    # MPEG-TS shows its length only in its last packet, which a server without range requests cannot deliver.
    is_ts = "hls" not in kind and clock_may_jump(container)
    return bool(container.duration and container.duration > 0) or (is_ts and container.size > 0)


def _open_container(address: _Address, beat: Callable[[], None]) -> InputContainer:
    """Open the source. A web server's response that FFmpeg does not recognise is tried as a plain sequence of JPEGs."""
    if address.source.is_device:
        return av.open(address.url, format="v4l2")
    if scheme_of(address.source.name) not in ("http", "https"):
        return av.open(address.url, options=address.options)
    try:
        return _open_within(_OPEN_SHARE * address.patience, address.url, None, address.options)
    except (InvalidDataError, TimeoutError) as error:
        failure: Exception = error
    beat()
    try:
        return _open_as_jpegs(address)
    except TimeoutError:
        raise
    except (FFmpegError, OSError, ValueError):
        raise failure from None


def _open_within(seconds: float, name: str, format: str | None, options: dict[str, str]) -> InputContainer:
    """Open the address, or raise ``TimeoutError``: FFmpeg would read an endless unrecognised stream for ever."""
    started = time.monotonic()
    with suppress(ExitError):
        container = av.open(name, format=format, options=options, timeout=(seconds, READ_LIMIT_SECONDS))
        if time.monotonic() - started < seconds:
            return container
        container.close()  # it was interrupted while opening, and would fail at the next packet
    raise TimeoutError(f"nothing was understood of it within {seconds:.0f} s")


def _open_as_jpegs(address: _Address) -> InputContainer:
    """Open the source as JPEGs with arbitrary data between them.

    Some cameras send a multipart body that FFmpeg does not recognise: no content types, bare line feeds, undeclared
    boundaries, or no boundaries at all.
    """
    options = address.options | {"analyzeduration": "1", "fpsprobesize": "0"}
    container = _open_within(_OPEN_SHARE * address.patience, address.url, "mjpeg", options)
    if container.streams.video and container.streams.video[0].codec_context.width:
        return container
    container.close()
    raise ValueError("no JPEGs")
