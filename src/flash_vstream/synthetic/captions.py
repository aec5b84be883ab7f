"""Captioned picture sets with cached features, and composed streams played from them."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.synthetic.plans import StreamPlan


def sentence(caption: str) -> str:
    """A caption as a sentence: initial capital, final full stop, no stray spaces."""
    text = " ".join(caption.replace(" ,", ",").split()).strip(" .\"'")
    return text[:1].upper() + text[1:] + "."


def pictures_in(folder: Path, keys: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """The named pictures, loose in ``folder`` or in tar files there."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name in keys and (file := archive.extractfile(member)) is not None:
                    yield member.name, Image.open(io.BytesIO(file.read()))
    for key in sorted(keys):
        if (folder / key).is_file():
            yield key, Image.open(folder / key)


@dataclass
class PictureSet:
    """One split of captioned pictures with their features, cached by ``flash-vstream train prepare``.

    ``captions`` maps a picture's key to its sentences; ``features(key)`` reads its views
    ``[VIEWS, P², D]`` on demand.
    """

    captions: dict[str, list[str]]
    path: Path

    @classmethod
    def load(cls, folder: Path, split: str) -> "PictureSet":
        """Load the split ``train``, ``val`` or ``test`` of a prepared folder."""
        captions, path = folder / "captions.json", folder / f"{split}.safetensors"
        if not (captions.exists() and path.exists()):
            raise UserError(
                f"{folder} is not prepared for training; run: flash-vstream train prepare PICTURES {folder}"
            )
        sentences = json.loads(captions.read_text())
        with safe_open(path, "pt") as file:
            keys = sorted(file.keys())
        return cls({key: [sentence(caption) for caption in sentences[key]] for key in keys}, path)

    def features(self, key: str) -> Tensor:
        """The feature maps of a picture's views, float16 ``[VIEWS, P², D]``."""
        if not hasattr(self, "_file"):
            self._file: Any = safe_open(self.path, "pt")
        features: Tensor = self._file.get_tensor(key)
        return features


def play(plan: StreamPlan, pictures: PictureSet) -> tuple[Tensor, Tensor]:
    """The plan's frames as features ``[T, P², D]`` and times ``[T]``; blank frames are zero."""
    views = {key: pictures.features(key) for key in {shot.key for shot in plan.shots if shot.key}}
    blank = torch.zeros_like(next(iter(views.values()))[0])
    frames = [views[shot.key][shot.view % len(views[shot.key])] if shot.key else blank for shot in plan.shots]
    return torch.stack(frames).float(), torch.tensor([shot.time for shot in plan.shots], dtype=torch.float64)
