"""Writes frames to a small video file."""

from collections.abc import Iterable
from typing import BinaryIO

import av
import numpy as np


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
