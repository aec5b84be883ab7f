"""``train prepare``: encode the views of captioned pictures once."""

import json
import shutil
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from flash_vstream.errors import UserError
from flash_vstream.files import atomic_write
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.captions import pictures_in
from flash_vstream.synthetic.views import picture_views


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
        features = {}
        for key, picture in track(pictures_in(pictures, set(keys)), f"encoding {split}", total=len(keys)):
            features[key] = pipeline.encode(picture_views(picture, key)).to(torch.float16).contiguous()
        if len(features) < len(keys):
            raise UserError(f"{pictures} lacks {len(keys) - len(features)} of the {len(keys)} pictures of {split}")
        with atomic_write(target) as scratch:
            save_file(features, scratch)
