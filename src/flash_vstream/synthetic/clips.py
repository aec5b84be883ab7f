"""Annotated real clips, in UCF101's naming: ``v_ACTION_gNN_cMM``. Clips of a group show the same people and place."""

import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from flash_vstream.errors import UserError
from flash_vstream.synthetic.annotations import Annotation
from flash_vstream.video import read_frames

UCF101_FPS = 25.0
MOST_FPS = 240.0
"""Clips that claim to have more frames per second were cut without their times."""


def held_out(annotations: Mapping[str, Annotation]) -> list[str]:
    """The clips for testing: those of every third group of each action. Train on the others only.

    Raises ``UserError`` for a clip without an action or a group.
    """
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, annotation in annotations.items():
        match = re.search(r"_(g\d+)_c\d+", key)
        if match is None or annotation.action is None:
            raise UserError(f"{key} has no group in its name (v_ACTION_g01_c01.mp4) or no action in its annotation")
        groups[annotation.action][match[1]].append(key)
    return sorted(key for own in groups.values() for group in sorted(own)[2::3] for key in own[group])


def frames_of_clips(folder: Path, keys: Iterable[str], fps: float, size: int) -> dict[str, list[np.ndarray]]:
    """Each clip's frames, ``[size, size, 3]`` RGB, at ``fps``; clips are files or in tar files in ``folder``.

    Raises ``UserError`` naming those that are not there.
    """
    wanted, frames = set(keys), {}
    for key in sorted(wanted):
        path = next((path for path in (folder / key, folder / "clips" / key) if path.is_file()), None)
        if path is not None:
            frames[key] = _frames(path, fps, size)
    for archive in sorted(folder.glob("*.tar")) if wanted - frames.keys() else ():
        with tarfile.open(archive) as tar, TemporaryDirectory() as scratch:
            for member in tar:
                key = Path(member.name).name
                if member.isfile() and key in wanted - frames.keys():
                    tar.extract(member, scratch, filter="data")
                    frames[key] = _frames(Path(scratch) / member.name, fps, size)
    missing = sorted(wanted - frames.keys())
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(wanted)} clips, {missing[0]} among them")
    return frames


def _frames(path: Path, fps: float, size: int) -> list[np.ndarray]:
    """A clip's frames at ``fps`` by its own times or, where these are impossible, at UCF101's frame rate."""
    shown = list(read_frames(path, None, size))
    if len(shown) > 1 and (len(shown) - 1) / max(shown[-1].time - shown[0].time, 1e-9) > MOST_FPS:
        times = [i / UCF101_FPS for i in range(len(shown))]
    else:
        times = [frame.time for frame in shown]
    kept: list[np.ndarray] = []
    for time, frame in zip(times, shown, strict=True):
        if time >= len(kept) / fps - 1e-6:
            kept.append(frame.image)
    return kept
