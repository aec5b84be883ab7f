"""Live sources: whatever can be watched becomes frames as time goes by.

A source is named as a person would name it: a file, ``rtsp://…``, ``http(s)://…`` (files, MJPEG,
HLS, MPEG-TS), ``udp://…``, ``/dev/video0``, a folder of pictures, a named pipe, or ``push`` for
frames that somebody else puts into a ring.
"""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flash_vstream.errors import UserError
from flash_vstream.video.gateway import reach
from flash_vstream.video.network import SCHEMES, SourceRules, check_name, is_url, parse_url
from flash_vstream.video.reader import Frame, decoded, read_frames, rgb, video_stream

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
NETWORK = SCHEMES
PUSH = "push"
PROTOCOLS = "rtsp,rtsps,rtmp,rtp,srtp,http,https,httpproxy,tls,tcp,udp,srt,crypto,data"
"""What a network source may lead FFmpeg to: a playlist from elsewhere must not open local files."""
SILENCE_SECONDS = 10.0
"""How long FFmpeg may wait for a network source before it gives up."""


@dataclass(frozen=True)
class Source:
    """What to watch and how.

    ``fps`` frames a second of stream time are looked at, each scaled and cropped to ``size``
    pixels square. ``pace`` is for files: ``"real"`` plays at the file's own speed, ``"fast"`` as
    fast as it can be read. ``loop`` begins a file or folder again at its end, stream time going on.
    ``transport`` is RTSP's, ``"tcp"`` or ``"udp"``. ``begin`` is where in a file to begin, in seconds.
    ``rules`` are what it may reach (None: anything); they hold for every connection and file that it leads to.
    """

    name: str
    fps: float = 1.0
    size: int = 256
    pace: str = "real"
    loop: bool = False
    transport: str = "tcp"
    begin: float = 0.0
    rules: SourceRules | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "the source's name")
        if self.is_network:
            parse_url(self.name)
        if not 0 < self.fps <= 120:
            raise UserError(f"the frame rate is {self.fps:g}; it must be above 0 and at most 120")
        if self.pace not in ("real", "fast"):
            raise UserError(f"the pace is {self.pace!r}; choose real or fast")
        if self.transport not in ("tcp", "udp"):
            raise UserError(f"the RTSP transport is {self.transport!r}; choose tcp or udp")
        if not (self.is_network or self.is_push or os.path.exists(self.name)):
            raise UserError(f"there is nothing to watch at {self.shown}; check the path or the address")

    @property
    def is_network(self) -> bool:
        """Whether the source comes over a network."""
        return is_url(self.name)

    @property
    def is_push(self) -> bool:
        """Whether frames are put into the stream's ring by somebody else."""
        return self.name == PUSH

    @property
    def is_pipe(self) -> bool:
        """Whether the source is a named pipe."""
        return not (self.is_network or self.is_push) and stat.S_ISFIFO(os.stat(self.name).st_mode)

    @property
    def is_device(self) -> bool:
        """Whether the source is a camera of this machine."""
        return self.name.startswith("/dev/video")

    @property
    def is_finite(self) -> bool:
        """Whether the source has an end of its own: a file, a folder or a pipe."""
        return not (self.loop or self.is_network or self.is_device or self.is_push)

    @property
    def resumes(self) -> bool:
        """Whether it can be taken up again where it was left: a file or folder with an end."""
        return self.is_finite and not self.is_pipe

    @property
    def shown(self) -> str:
        """The source's name without passwords, for people and logs."""
        return hide_secrets(self.name)


def hide_secrets(name: str) -> str:
    """A URL without its user, password and query; anything else as it is."""
    parts = urlsplit(name)
    if parts.scheme.lower() not in NETWORK:
        return name
    host = parts.netloc.rpartition("@")[2]
    shown = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return shown + ("?…" if parts.query else "")


def watch_source(source: Source) -> Iterator[Frame]:
    """Frames of a source as its time goes by; ends where the source ends.

    Stream time begins at 0. Files and folders carry their own; live sources are timed by arrival,
    since cameras' time stamps jump and run backwards. Raises ``UserError`` when there is nothing to
    watch, and passes on what FFmpeg raises when a live source breaks.
    """
    if source.is_network or source.is_device or source.is_pipe:
        yield from _live(source)
        return
    started, offset = time.monotonic() - source.begin, 0.0
    begin = source.begin
    while True:
        last = offset
        if source.rules is not None:
            source.rules.check_path(source.name)
        folder = os.path.isdir(source.name)
        frames = _pictures(source, begin) if folder else read_frames(source.name, source.fps, source.size, None, begin)
        for frame in frames:
            last = offset + frame.time
            if source.pace == "real":
                time.sleep(max(0.0, last - (time.monotonic() - started)))
            yield Frame(last, frame.image)
        if not source.loop:
            return
        offset, begin = last + 1 / source.fps, 0.0


def _pictures(source: Source, begin: float) -> Iterator[Frame]:
    """A folder's pictures by name, one at each tick of the frame rate, from ``begin`` on."""
    paths = sorted(path for path in Path(source.name).iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise UserError(f"{source.name} holds no pictures ({', '.join(sorted(PICTURES))})")
    for i, path in enumerate(paths):
        if source.rules is not None:
            source.rules.check_path(str(path))
        if i / source.fps < begin - 1e-6:
            continue
        try:
            picture = Image.open(path).convert("RGB")
        except (OSError, UnidentifiedImageError):
            raise UserError(f"{path} is not a picture that can be read") from None
        yield Frame(i / source.fps, np.asarray(ImageOps.fit(picture, (source.size, source.size))))


def _live(source: Source) -> Iterator[Frame]:
    """Frames of a camera, a network stream or a pipe, timed by their arrival."""
    patience = str(int(SILENCE_SECONDS * 1e6))
    options = {"rw_timeout": patience, "protocol_whitelist": PROTOCOLS} if source.is_network else {}
    if source.name.lower().startswith("rtsp"):
        options |= {"rtsp_transport": source.transport, "timeout": patience}
    if source.rules is not None and not source.is_network:
        source.rules.check_path(source.name)
    opened: AbstractContextManager[tuple[str, dict[str, str]]] = (
        reach(source.name, source.rules, source.transport) if source.is_network else nullcontext((source.name, {}))
    )
    with (
        opened as (name, guard),
        av.open(name, format="v4l2" if source.is_device else None, options=options | guard) as container,
    ):
        stream = video_stream(container, source.shown)
        stream.thread_type = "AUTO"
        first, due = None, 0.0
        for frame in decoded(container, stream):
            now = time.monotonic()
            first = now if first is None else first
            if now - first < due:
                continue
            due = max(due + 1 / source.fps, now - first)
            yield Frame(now - first, rgb(frame, source.size))
