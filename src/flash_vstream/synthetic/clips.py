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
            frames[key] = [frame.image for frame in read_frames(path, fps, size)]
    for archive in sorted(folder.glob("*.tar")) if wanted - frames.keys() else ():
        with tarfile.open(archive) as tar, TemporaryDirectory() as scratch:
            for member in tar:
                key = Path(member.name).name
                if member.isfile() and key in wanted - frames.keys():
                    tar.extract(member, scratch, filter="data")
                    frames[key] = [frame.image for frame in read_frames(Path(scratch) / member.name, fps, size)]
    missing = sorted(wanted - frames.keys())
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(wanted)} clips, {missing[0]} among them")
    return frames
