"""``train prepare``: encode the views of captioned pictures once."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_write
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.captions import pictures_in
from flash_vstream.synthetic.views import picture_views

Item = TypeVar("Item")
TOGETHER = 16
"""Pictures that are encoded together."""


def prepare(pictures: Path, output: Path, model_name: str) -> None:
    """Write ``captions.json`` and, for each split, the view features as ``{split}.safetensors`` to ``output``.

    ``pictures`` holds ``captions.json`` (key to captions) and ``splits.json`` (split to keys).
    Existing splits are skipped, so an interrupted run resumes. Raises ``UserError`` when files are
    missing.
    """
    try:
        captions = json.loads((pictures / "captions.json").read_text())
        splits = json.loads((pictures / "splits.json").read_text())
    except OSError as error:
        raise UserError(
            f"{pictures} lacks {Path(error.filename).name}; it needs captions.json and splits.json"
        ) from None
    output.mkdir(parents=True, exist_ok=True)
    (output / "captions.json").write_text(json.dumps(captions))
    if (annotations := pictures / "annotations.jsonl").exists():
        shutil.copyfile(annotations, output / "annotations.jsonl")
    pipeline = FlashVStream.from_pretrained(model_name)
    for split, keys in splits.items():
        target = output / f"{split}.safetensors"
        if target.exists():
            continue
        found, console = pictures_in(pictures, set(keys)), Console(stderr=True)
        shown = track(found, f"encoding {split}", total=len(keys), console=console)
        features = {key: views for part in batched(shown, TOGETHER) for key, views in _encode(pipeline, part)}
        if len(features) < len(keys):
            raise UserError(f"{pictures} lacks {len(keys) - len(features)} of the {len(keys)} pictures of {split}")
        with atomic_write(target) as scratch:
            save_file(features, scratch)


def _encode(pipeline: FlashVStream, pictures: Sequence[tuple[str, Image.Image]]) -> Iterator[tuple[str, Tensor]]:
    """The features of the pictures' views, float16 ``[VIEWS, P², D]``."""
    with ThreadPoolExecutor() as pool:
        views = list(pool.map(lambda pair: picture_views(pair[1], pair[0]), pictures))
    features = pipeline.encode([view for own in views for view in own]).to("cpu", torch.float16)
    for (key, _), own in zip(pictures, features.split(len(views[0])), strict=True):
        yield key, own.contiguous().clone()


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of ``size``, the last one perhaps shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
