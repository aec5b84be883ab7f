"""Find a benchmark's media and turn them into features with times."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from flash_vstream.pipeline import FlashVStream

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".safetensors")


def find_medium(data: Path, folders: Sequence[str], video: str) -> Path | None:
    """The file (or picture folder) of a video under ``data``, or None if there is none."""
    for folder in folders:
        for ending in ENDINGS:
            path = data / folder / f"{video}{ending}"
            if path.is_file():
                return path
        if (data / folder / video).is_dir():
            return data / folder / video
    return None


def features_of(pipeline: FlashVStream, path: Path, fps: float, until: float | None) -> Iterator[tuple[float, Tensor]]:
    """Yield the times and feature maps ``[P², D]`` of a medium in order, up to ``until`` seconds.

    Raises ``UserError`` when the medium cannot be read.
    """
    for times, features in pipeline.encode_file(path, fps, until):
        yield from zip(times, features, strict=True)
