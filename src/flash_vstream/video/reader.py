"""Video files as timed RGB frames, through FFmpeg (PyAV)."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.video.demux import BrokenOffError, Playback
from flash_vstream.video.pictures import encode_whole

FILE_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,mpegts,mpeg,mpegvideo,flv,live_flv,avi,ogg,gif,asf,mxf,nut,ivf,yuv4mpegpipe,"
    "h264,hevc,av1,obu,m4v,mjpeg,mpjpeg,apng,webp,jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,gif_pipe,dv,rm,wtv,wav,mp3,aac,flac",
}
"""Only the file itself is read, and nothing that it refers to: no playlist, list of files or address."""
MAX_PIXELS = 139_264 * 256
"""The most pixels in a decoded picture, 35.7 million: the limit of H.264 and H.265, enough for 8K."""
LARGE_PIXELS = 4096 * 2304
MAX_THREADS = 4
"""Decoder threads; each holds its own pictures, so pictures above ``LARGE_PIXELS`` get only two."""
MAX_ASPECT = 16
"""A picture with a larger aspect ratio is cropped to its centre before scaling, not after."""

logger = logging.getLogger(__name__)


class MissingSourceError(UserError):
    """There is nothing at a source's path. Unlike an unreadable file, it may appear again."""


@dataclass(frozen=True)
class Frame:
    """An RGB picture ``[H, W, 3]`` uint8 and its stream time in seconds since the first frame.

    Where the image is the centre of a frame, ``whole`` is a JPEG of all of it, for people; else it is empty.
    """

    time: float
    image: np.ndarray
    whole: bytes = b""


@dataclass(frozen=True)
class VideoInfo:
    """What a file declares about its video; None where it declares nothing. ``rate`` is in frames per second."""

    width: int
    height: int
    rate: float | None
    duration: float | None
    codec: str


class FrameRate:
    """Picks at most ``fps`` frames a second: the first at or after each tick, never two within half a tick.

    Ticks are the multiples of ``1 / fps`` from time 0, so the choice does not depend on where reading began.
    ``slack`` is the fraction of a tick by which a frame may be early, since live frames do not arrive exactly on ticks.
    If ``fps`` is None, every frame is picked.
    """

    def __init__(self, fps: float | None, slack: float = 0.0):
        self._fps = fps
        self._slack = slack / fps if fps is not None else 0.0
        self._due = -math.inf

    @property
    def earliest(self) -> float:
        """The time before which no frame is picked; -inf if the next one is, whenever it comes."""
        return self._due - self._slack - 1e-6

    @property
    def latest(self) -> float:
        """Until when a key frame is worth waiting for, being cheaper to decode."""
        return self._due + self._slack

    def picks(self, time: float) -> bool:
        """Whether the frame at ``time`` is picked; times must not decrease."""
        if self._fps is None:
            return True
        if time < self.earliest:
            return False
        next_tick = (math.floor((time + self._slack) * self._fps + 1e-6) + 1) / self._fps
        self._due = max(next_tick, time + 0.5 / self._fps)
        return True


def probe(path: str | Path) -> VideoInfo:
    """Information about the video at ``path``; raises ``UserError`` if it has none that can be read."""
    with opened(path) as (container, stream):
        seconds = None
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / av.time_base
        rate = float(stream.average_rate) if stream.average_rate else None
        codec = stream.codec_context
        return VideoInfo(codec.width, codec.height, rate, seconds, codec.name)


def read_frames(
    path: str | Path,
    fps: float | None = 1.0,
    size: int | None = None,
    until: float | None = None,
    begin: float = 0.0,
) -> Iterator[Frame]:
    """Yield the file's frames in order of time, at most ``fps`` per second (None: all).

    With ``size``, each is scaled and centre-cropped to ``size`` by ``size``. Rotation declared in the file is applied.
    Times are the file's own, from 0 at the first frame; where they are missing or run backwards, the nominal frame rate
    fills in, and in formats whose clock may restart (MPEG-TS) it also bridges jumps of over 10 seconds.
    Starts at stream time ``begin`` (decoding from the preceding key frame; times do not change) and stops after
    ``until``. A truncated file ends early, with a warning in the log.
    Raises ``UserError`` if the file cannot be opened, its pictures exceed ``MAX_PIXELS``, or no frame decodes.
    """
    with opened(path) as (container, stream):
        try:
            yield from play(Playback(container, stream), os.fspath(path), fps, size, until, begin)
        except BrokenOffError as error:
            logger.warning("%s %s; what follows is missing", path, error)


def play(
    playback: Playback,
    name: str,
    fps: float | None,
    size: int | None,
    until: float | None = None,
    begin: float = 0.0,
    whole: bool = False,
) -> Iterator[Frame]:
    """Yield the frames of an opened recording, as ``read_frames`` does; with ``whole``, their whole pictures too.

    Raises ``UserError`` if no frame decodes, and after the last frame ``BrokenOffError`` if the recording ended before
    its declared length.
    """
    if fps is not None and not fps > 0:
        raise UserError(f"the frame rate must be above 0, not {fps:g}")
    rate, decoded_one = FrameRate(fps), False
    playback.decode_for(rate)
    # Start a few ticks early, so that the rate is in step by the first wanted frame.
    for time, frame in playback.timed(begin - 4 / fps if fps is not None else begin):
        if until is not None and time > until + 1e-6:
            return
        decoded_one = True
        if rate.picks(time) and time >= begin - 1e-6:
            if whole and size is not None:
                yield Frame(time, *centre_and_whole(frame, size))
            else:
                yield Frame(time, rgb(frame, size))
    if not decoded_one and playback.error is None:
        raise UserError(f"no frame of {name} could be decoded; it may be damaged or in an unknown format")
    playback.check_end()


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Context that opens the file's container and its video stream; raises ``UserError`` as ``read_frames`` does."""
    name = os.fspath(path)
    if not os.path.exists(name):
        raise MissingSourceError(f"no video at {name}; check the path")
    if os.path.isdir(name):
        raise UserError(f"{name} is a folder; name a video file in it")
    if os.path.getsize(name) == 0:
        raise UserError(f"{name} is empty")
    try:
        container = av.open(name, options=FILE_OPTIONS)
    except PermissionError:
        raise UserError(f"{name} may not be read; check its permissions") from None
    except (FFmpegError, ValueError, OSError) as error:
        raise UserError(f"{name} is not a video that FFmpeg can open ({reason_of(error)})") from None
    with container:
        yield container, video_stream(container, name)


def video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The container's first video stream other than cover art, its decoder limited in pixels and threads.

    Raises ``UserError`` if there is none that can be decoded, or its pictures exceed ``MAX_PIXELS``.
    """
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        what = "only sound" if container.streams.audio else "no video"
        raise UserError(f"{name} holds {what}; a video stream is needed")
    stream = streams[0]
    codec = stream.codec_context
    if codec is None:
        raise UserError(f"{name} holds video in a format that this FFmpeg cannot decode")
    pixels = codec.width * codec.height
    if pixels > MAX_PIXELS:
        raise UserError(
            f"the pictures of {name} are {codec.width} by {codec.height};"
            f" at most {MAX_PIXELS / 1e6:.1f} million pixels are decoded, so scale it down first"
        )
    codec.options = {"max_pixels": str(MAX_PIXELS)}  # in case the size changes mid-stream
    codec.thread_count = 2 if pixels > LARGE_PIXELS else min(MAX_THREADS, os.cpu_count() or 1)
    stream.thread_type = "AUTO"
    return stream


def reason_of(error: Exception) -> str:
    """Why FFmpeg failed: its error, and its last log message where PyAV recorded one."""
    log = getattr(error, "log", None)
    said = str(log[2]).strip() if log else ""
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
    return f"{reason}: {said}" if said and said.lower() not in reason else reason


def rgb(frame: av.VideoFrame, size: int | None = None) -> np.ndarray:
    """The frame upright as ``[H, W, 3]`` uint8, or its centre scaled to ``[size, size, 3]``."""
    image = _scaled(frame, size)
    return image if size is None else _centre(image, size)


def centre_and_whole(frame: av.VideoFrame, size: int) -> tuple[np.ndarray, bytes]:
    """The frame's centre, upright and scaled to ``[size, size, 3]`` uint8, and the whole of it as a small JPEG."""
    image = _scaled(frame, size)
    return _centre(image, size), encode_whole(Image.fromarray(image))


def _scaled(frame: av.VideoFrame, size: int | None) -> np.ndarray:
    """The frame upright as ``[H, W, 3]`` uint8, its shorter side scaled to ``size`` unless it is very oblong."""
    width, height = frame.width, frame.height
    if size is None or max(width, height) > MAX_ASPECT * min(width, height):
        image = frame.to_ndarray(format="rgb24")
    else:
        short = min(width, height)
        width, height = max(size, round(size * width / short)), max(size, round(size * height / short))
        shrink = frame.width > 2 * width
        image = frame.to_ndarray(
            format="rgb24",
            width=width,
            height=height,
            interpolation=Interpolation.AREA if shrink else Interpolation.BICUBIC,
        )
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90) % 4))


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    """The centre ``[size, size, 3]`` of an RGB picture ``[H, W, 3]``, whose shorter side is ``size``; else scaled."""
    height, width, _ = image.shape
    if min(height, width) != size:
        return _scaled_centre(image, size)
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def _scaled_centre(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of an RGB picture ``[H, W, 3]``, scaled to ``[size, size, 3]``."""
    height, width, _ = image.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    centre = Image.fromarray(np.ascontiguousarray(image[top : top + short, left : left + short]))
    return np.asarray(centre.resize((size, size), Image.Resampling.BICUBIC))
