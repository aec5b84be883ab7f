"""Anything playable becomes timed RGB frames. Knows nothing of models."""

from flash_vstream.video.reader import Frame, VideoInfo, probe, read_frames

__all__ = ["Frame", "VideoInfo", "probe", "read_frames"]
