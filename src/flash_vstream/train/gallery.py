"""Annotated pictures as a tower's first blocks see them, encoded once and kept on disk."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flash_vstream.errors import UserError
from flash_vstream.models.grounding import Words
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.synthetic.annotations import Annotation, read_annotations
from flash_vstream.synthetic.captions import pictures_in, sentence
from flash_vstream.synthetic.views import VIEWS, picture_crops, picture_views
from flash_vstream.train.annotated import AnnotatedPictures
from flash_vstream.train.grounding import DescribedPictures

TOGETHER = 8
"""Pictures that are encoded together."""
PER_WORKER = 64
"""A process of its own draws views if it has at least so many pictures to draw."""
Encode = Callable[[Tensor], Tensor]
"""From square frames ``[n, size, size, 3]`` uint8 to what the first blocks make of them, ``[n, C, h, w]``."""


class Gallery(AnnotatedPictures):
    """The annotated pictures of a split, with what the tower's first blocks make of them.

    ``middle [N, VIEWS + crops, C, h, w]`` float16 is on disk, in the order of ``keys``: first the views of
    ``picture_views``, then ``crops`` of ``picture_crops``.
    """

    def __init__(self, folder: Path, split: str, frames: FrameProcessor, crops: int, encode: Encode, kept: Path):
        captions = json.loads((folder / "captions.json").read_text())
        annotations = read_annotations(folder / "annotations.jsonl")
        keys = sorted(set(json.loads((folder / "splits.json").read_text())[split]) & set(annotations))
        if not keys:
            raise UserError(f"{folder} has no annotated pictures of the split {split!r}")
        super().__init__({key: annotations[key] for key in keys}, {key: captions.get(key, []) for key in keys})
        views = Views(folder, {key: row for row, key in enumerate(keys)}, frames, crops)
        self.middle = torch.from_numpy(_encoded(views, encode, kept / f"{split}-views.npy"))

    def described(self, words: Words) -> DescribedPictures:
        """The same pictures by all of their sentences, and the objects in them."""
        texts = {key: [*self.captions[key], *_sentences(self.annotations[key])] for key in self.keys}
        return DescribedPictures(texts, words, {key: self.annotations[key].objects for key in self.keys})


def _sentences(annotation: Annotation) -> list[str]:
    return [sentence(annotation.caption), sentence(annotation.short)]


class Views(IterableDataset[tuple[int, Tensor]]):
    """Each picture's row, with its views and crops ``[VIEWS + crops, size, size, 3]`` uint8.

    Workers draw a share of the pictures each.
    """

    def __init__(self, folder: Path, rows: Mapping[str, int], frames: FrameProcessor, crops: int):
        self.folder, self.rows, self.frames, self.crops = folder, dict(rows), frames, crops

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        worker = get_worker_info()
        rank, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for key, picture in pictures_in(self.folder, set(sorted(self.rows)[rank::workers])):
            drawn = [*picture_views(picture, key), *picture_crops(picture, key, self.crops)]
            yield self.rows[key], torch.from_numpy(np.stack([self.frames.square(view) for view in drawn]))


def _encoded(views: Views, encode: Encode, path: Path) -> np.ndarray:
    """All pictures' views, encoded into the array at ``path``; goes on where an earlier run was stopped."""
    done, count, each = path.with_suffix(".done.npy"), len(views.rows), VIEWS + views.crops
    if done.exists():
        middle, filled = np.load(path, mmap_mode="r+"), np.load(done)
    else:
        shape = encode(torch.zeros(1, views.frames.size, views.frames.size, 3, dtype=torch.uint8)).shape[1:]
        middle = np.lib.format.open_memmap(path, "w+", np.float16, (count, each, *shape))
        filled = np.zeros(count, bool)
    wanted = {key: row for key, row in views.rows.items() if not filled[row]}
    workers = min(os.cpu_count() or 1, len(wanted) // PER_WORKER)
    loader = DataLoader(Views(views.folder, wanted, views.frames, views.crops), TOGETHER, num_workers=workers)
    batches, console = -(-len(wanted) // TOGETHER), Console(stderr=True)
    for number, (rows, drawn) in enumerate(track(loader, f"encoding {path.stem}", batches, console=console), 1):
        features = encode(drawn.flatten(0, 1))
        middle[rows.numpy()] = features.half().cpu().numpy().reshape(len(rows), each, *features.shape[1:])
        filled[rows.numpy()] = True
        if number % 8 == 0:
            np.save(done, filled)
    np.save(done, filled)
    if not filled.all():
        raise UserError(f"{views.folder} lacks {int((~filled).sum())} of {count} annotated pictures")
    return np.asarray(middle)
