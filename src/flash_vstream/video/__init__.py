"""Turns anything playable into timed RGB frames. Independent of models."""

from flash_vstream.video.reader import Frame, VideoInfo, probe, read_frames

__all__ = ["Frame", "VideoInfo", "probe", "read_frames"]
