"""Turns anything playable into timed RGB frames. Independent of models.

Public names are loaded on first use: encoded frames and stored features need no FFmpeg.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_vstream.video.reader import Frame, VideoInfo, probe, read_frames

__all__ = ["Frame", "VideoInfo", "probe", "read_frames"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.reader"), name)
