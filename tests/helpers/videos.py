"""Small real video files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    frames: int = 30,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    times: list[float] | None = None,
) -> Path:
    """Write a video whose grey level rises by 8 per frame; the left half stays black."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.time_base = Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        if codec in ("mpeg4", "libx264"):
            stream.codec_context.gop_size = 5
        for i in range(frames):
            image = np.zeros((size[1], size[0], 3), np.uint8)
            image[:, size[0] // 2 :] = min(8 * i, 255)
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
            frame.pts = round(1000 * (times[i] if times else i / rate))
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
