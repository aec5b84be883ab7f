"""Writes frames to small video files."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image

_MILLISECOND = Fraction(1, 1000)


def write_video(file: BinaryIO, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write RGB frames ``[H, W, 3]`` uint8, all of one size with even sides, to ``file`` as MP4 at ``fps``."""
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_500_000
        for i, image in enumerate(frames):
            if i == 0:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_clip(path: Path, frames: Iterable[tuple[float, Image.Image]]) -> None:
    """Write RGB pictures with rising times in seconds to ``path`` as MP4 (H.264), which browsers play.

    All are scaled to the size of the first, of which an odd side loses a pixel. The last is shown for as long as the
    one before it, but for a second at most. Raises ``OSError`` or ``FFmpegError``.
    """
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        # One thread, so that the same pictures give the same file.
        stream = container.add_stream("libx264", options={"preset": "superfast", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = _MILLISECOND
        last, hold = 0.0, 1.0
        picture: Image.Image | None = None
        for time, shown in frames:
            if picture is None:
                stream.width, stream.height = (max(2, side - side % 2) for side in shown.size)
            picture = shown
            if time > last:
                last, hold = time, min(time - last, 1.0)
            container.mux(stream.encode(_video_frame(shown, time)))
        if picture is not None:
            container.mux(stream.encode(_video_frame(picture, last + hold)))
        container.mux(stream.encode())


def _video_frame(picture: Image.Image, seconds: float) -> av.VideoFrame:
    """A frame to encode; the encoder scales it if it has to."""
    frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
    frame.pts, frame.time_base = round(1000 * seconds), _MILLISECOND
    return frame
