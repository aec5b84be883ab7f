"""Video files as timed RGB frames, through FFmpeg (PyAV)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Interpolation

from flash_vstream.errors import UserError

FILE_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,mpegts,mpeg,mpegvideo,flv,live_flv,avi,ogg,gif,asf,mxf,nut,ivf,yuv4mpegpipe,"
    "h264,hevc,av1,obu,m4v,mjpeg,mpjpeg,apng,webp,jpeg_pipe,png_pipe,webp_pipe,bmp_pipe,gif_pipe,dv,rm,wtv,wav,mp3,aac,flac",
}
"""A file is read and nothing that it names: no playlist, no list of files, no address."""
MAX_BROKEN_FRAMES = 300
"""Consecutive packets that do not decode before a file counts as broken from there on."""


@dataclass(frozen=True)
class Frame:
    """An RGB picture ``[H, W, 3]`` uint8 and its stream time in seconds since the first frame."""

    time: float
    image: np.ndarray


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself; None where it does not say. ``rate`` is in frames a second."""

    width: int
    height: int
    rate: float | None
    duration: float | None
    codec: str


def probe(path: str | Path) -> VideoInfo:
    """What ``path`` says of its video; raises ``UserError`` when it has none that can be read."""
    with _opened(path) as (container, stream):
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
    """Frames of the file in order of time, at most ``fps`` of them a second (None: all).

    With ``size``, each is scaled and its centre cropped to ``size`` by ``size`` in one pass over
    the decoded picture. Rotation that the file asks for is applied. Times are the file's own, from
    0 at the first frame; where they are missing or run backwards, the nominal frame rate goes on.
    Begins at stream time ``begin`` and stops after ``until``. A file that breaks off ends there, with what was read.
    Raises ``UserError`` when the file cannot be opened or not one frame of it decodes.
    """
    if fps is not None and not fps > 0:
        raise UserError(f"the frame rate must be above 0, not {fps:g}")
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        due, count = 0.0, 0
        for time, frame in _timed(container, stream):
            if until is not None and time > until + 1e-6:
                break
            # A frame stands for its moment: the first at or after each tick of the wanted rate.
            if fps is not None:
                if time < due - 1e-6:
                    continue
                due = max(due + 1 / fps, time + 0.5 / fps)
            count += 1
            if time >= begin - 1e-6:
                yield Frame(time, rgb(frame, size))
        if not count:
            raise UserError(f"no frame of {path} could be decoded; it may be damaged or in an unknown format")


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    name = os.fspath(path)
    if not os.path.exists(name):
        raise UserError(f"no video at {name}; check the path")
    if os.path.isdir(name):
        raise UserError(f"{name} is a folder; name a video file in it")
    if os.path.getsize(name) == 0:
        raise UserError(f"{name} is empty")
    try:
        container = av.open(name, options=FILE_OPTIONS)
    except PermissionError:
        raise UserError(f"{name} may not be read; check its permissions") from None
    except (FFmpegError, ValueError, OSError) as error:
        raise UserError(f"{name} is not a video that FFmpeg can open ({_reason(error)})") from None
    with container:
        yield container, video_stream(container, name)


def video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The container's first moving picture; raises ``UserError`` when there is none to decode."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        what = "only sound" if container.streams.audio else "no video"
        raise UserError(f"{name} holds {what}; a video stream is needed")
    if streams[0].codec_context is None:
        raise UserError(f"{name} holds video in a format that this FFmpeg cannot decode")
    return streams[0]


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _timed(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decoded frames with never-decreasing times from 0."""
    step = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
    first: Fraction | float | None = None
    last = -step
    for frame in decoded(container, stream):
        time = last + step
        if frame.pts is not None and frame.time_base is not None:
            stamped = frame.pts * frame.time_base
            first = stamped - Fraction(max(time, 0.0)).limit_denominator(10**6) if first is None else first
            if float(stamped - first) > last:
                time = float(stamped - first)
        last = time
        yield time, frame


def decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames that decode; what does not is passed over, up to a bound."""
    broken = 0
    packets = container.demux(stream)
    while broken < MAX_BROKEN_FRAMES:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (FFmpegError, ValueError):
            return  # the container breaks off here
        try:
            frames = packet.decode()
        except (FFmpegError, ValueError):
            broken += 1
            continue
        for frame in frames:
            broken = 0
            if frame.width and frame.height:
                yield frame


def rgb(frame: av.VideoFrame, size: int | None = None) -> np.ndarray:
    """The frame upright as ``[H, W, 3]`` uint8, or its centre scaled to ``[size, size, 3]``."""
    quarter_turns = round(frame.rotation / 90) % 4
    width, height = frame.width, frame.height
    if size is not None:
        short = min(width, height)
        width, height = max(size, round(size * width / short)), max(size, round(size * height / short))
    shrink = frame.width > 2 * width
    image = frame.to_ndarray(
        format="rgb24",
        width=width,
        height=height,
        interpolation=Interpolation.AREA if shrink else Interpolation.BICUBIC,
    )
    if size is not None:
        top, left = (height - size) // 2, (width - size) // 2
        image = image[top : top + size, left : left + size]
    return np.ascontiguousarray(np.rot90(image, quarter_turns))
