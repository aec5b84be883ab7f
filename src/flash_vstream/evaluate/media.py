"""Find a benchmark's media and turn them into features with times."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flash_vstream.errors import UserError
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

    A ``.safetensors`` file holds ``feature [T, P², D]`` at one frame per second, the format used by the
    papers' authors. Raises ``UserError`` when the medium cannot be read.
    """
    if path.suffix == ".safetensors":
        yield from _stored(path, until)
        return
    for times, features in pipeline.encode_file(path, fps, until):
        yield from zip(times, features, strict=True)


def _stored(path: Path, until: float | None) -> Iterator[tuple[float, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor("feature")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} does not hold stored features ({error})") from None
    for second, feature in enumerate(features.to(torch.float32)):
        if until is not None and second > until:
            return
        yield float(second), feature
