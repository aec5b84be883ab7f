"""The ``data`` entries of a stage's config, as datasets."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from flash_vstream.errors import UserError
from flash_vstream.train.captions import PictureSet
from flash_vstream.train.data import LlavaSamples, Sample, StreamSamples
from flash_vstream.train.packing import Turn
from flash_vstream.train.questions import caption_turns
from flash_vstream.train.streams import StreamPlan, StreamStyle

Encode = Callable[[Path], tuple[Tensor, Tensor]]


def build_dataset(
    entries: tuple[dict[str, Any], ...], folder: Path, encode: Encode, samples: int, batch: int, seed: int
) -> Dataset[Sample]:
    """The datasets of a config's ``data``, one after the other.

    Kinds: ``captions`` (stage 1 on a prepared picture set: ``split``, ``styles``,
    ``past_answers``) and ``llava`` (``file``, ``independent``). Sources that are drawn rather than
    read share ``samples``, the number that the run will see, by their ``share`` (default 1).
    """
    drawn = sum(entry.get("share", 1.0) for entry in entries if entry.get("kind") != "llava")
    parts: list[Dataset[Sample]] = []
    for i, entry in enumerate(entries):
        settings = dict(entry)
        kind = settings.pop("kind", None)
        length = round(samples * settings.pop("share", 1.0) / drawn) if drawn else 0
        try:
            if kind == "captions":
                parts.append(_captions(folder, length, batch, f"{seed}/{i}", **settings))
            elif kind == "llava":
                file = folder / settings.pop("file")
                parts.append(LlavaSamples(file, folder, encode, **settings))
            else:
                raise UserError(f"data source {i + 1} has kind {kind!r}; choose captions or llava")
        except (TypeError, KeyError) as error:
            raise UserError(f"data source {i + 1} ({kind}): {error}") from None
    return ConcatDataset(parts)


def styles_of(entries: list[dict[str, Any]]) -> list[tuple[float, StreamStyle]]:
    """Stream styles with their shares, from a config's ``styles``."""
    styles = []
    for entry in entries:
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
        }
        styles.append((float(settings.pop("share", 1.0)), StreamStyle(**settings)))
    return styles


def _captions(
    folder: Path, length: int, batch: int, seed: str, split: str, styles: list[dict[str, Any]], past_answers: int = 2
) -> StreamSamples:
    pictures = PictureSet.load(folder, split)
    return StreamSamples(
        pictures, styles_of(styles), partial(_ask_captions, pictures, past_answers), length, seed, batch
    )


def _ask_captions(pictures: PictureSet, past_answers: int, plan: StreamPlan, rng: random.Random) -> list[Turn]:
    return caption_turns(plan, pictures.captions, rng, past_answers)
