"""Features of annotated pictures and clips, cached by ``flash-vstream train prepare``."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.models.sight import PEOPLE_CLASSES, PERSON
from flash_vstream.synthetic.annotations import Annotation, read_annotations, things_in
from flash_vstream.synthetic.closed_questions import ClosedQuestions


class AnnotatedPictures:
    """N annotated pictures or clips, in the order of ``keys``, as targets for training."""

    def __init__(self, annotations: dict[str, Annotation], captions: dict[str, list[str]]):
        self.annotations = annotations
        self.captions = captions
        self.keys = list(annotations)

    @functools.cached_property
    def closed_questions(self) -> ClosedQuestions:
        """Closed questions about them; made when first asked for, since it takes seconds."""
        return ClosedQuestions(self.annotations)

    def labels(self, things: Sequence[str]) -> Tensor:
        """Which things each picture has ``[N, V]``, 0 or 1."""
        index = {name: number for number, name in enumerate(things)}
        labels = torch.zeros(len(self.keys), len(things))
        for row, key in enumerate(self.keys):
            annotation = self.annotations[key]
            named = things_in([*annotation.texts, *self.captions[key]], set(things))
            named |= {PERSON} & set(things) if annotation.people else set()
            labels[row, [index[name] for name in named]] = 1
        return labels

    def people(self) -> Tensor:
        """The class of the number of people in each picture ``[N]``."""
        counts = [self.annotations[key].people for key in self.keys]
        return torch.tensor(counts).clamp(max=PEOPLE_CLASSES - 1)


class AnnotatedFeatures(AnnotatedPictures):
    """Features of annotated pictures or clips in memory, float16, from prepared folders.

    A picture has views and a clip has frames, each ``[P², D]``; their number may differ between folders.
    """

    def __init__(self, folders: Sequence[Path], split: str):
        super().__init__({}, {})
        parts: list[Tensor] = []
        for folder in folders:
            path = folder / f"{split}.safetensors"
            if not path.exists():
                continue
            annotations = read_annotations(folder / "annotations.jsonl")
            with safe_open(path, "pt") as file:
                keys = sorted(set(file.keys()) & set(annotations))
                parts += [file.get_tensor(key) for key in keys]
            self.keys += keys
            self.annotations |= {key: annotations[key] for key in keys}
            captions = json.loads((folder / "captions.json").read_text())
            self.captions |= {key: captions.get(key, []) for key in keys}
        if not parts:
            raise UserError(
                f"no annotated pictures of the split {split!r} in {', '.join(map(str, folders))};"
                " run: flash-vstream train prepare PICTURES FOLDER"
            )
        self.counts = torch.tensor([len(views) for views in parts])
        self.first = self.counts.cumsum(0) - self.counts
        self.maps = torch.cat(parts)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """One view of each of ``rows [n]`` at random, float32 ``[n, P², D]``."""
        views = torch.randint(0, 2**31, rows.shape, generator=generator) % self.counts[rows]
        return self.maps[self.first[rows] + views].float()

    def whole(self, rows: Tensor) -> Tensor:
        """The first view of each of ``rows [n]``, of the whole picture, float32 ``[n, P², D]``."""
        return self.maps[self.first[rows]].float()


def grid_sides(tokens: int) -> list[int]:
    """The grid sides to train on: as stored twice as often as halved, which is how temporal slots hold a frame."""
    side = round(tokens**0.5)
    return [side, side, side // 2] if side % 2 == 0 and side > 1 else [side]
