"""Turns anything playable into timed RGB frames. Independent of models.

Public names are loaded on first use: encoded frames and stored features need no FFmpeg.
"""

from typing import TYPE_CHECKING

from flash_vstream.imports import lazily

if TYPE_CHECKING:
    from flash_vstream.video.reader import Frame, VideoInfo, probe, read_frames

__all__ = ["Frame", "VideoInfo", "probe", "read_frames"]

__getattr__ = lazily(__name__, dict.fromkeys(__all__, "reader"))
