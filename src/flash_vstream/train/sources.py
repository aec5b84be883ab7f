"""The ``data`` entries of a stage's config, as datasets."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from flash_vstream.errors import UserError
from flash_vstream.train.captions import PictureSet
from flash_vstream.train.chat import ChatSamples
from flash_vstream.train.data import LlavaSamples, Mixture, Sample, StreamSamples
from flash_vstream.train.events import Events
from flash_vstream.train.packing import Turn
from flash_vstream.train.questions import ASKERS, caption_questions, stream_questions
from flash_vstream.train.streams import StreamPlan, StreamStyle

Encode = Callable[[Path], tuple[Tensor, Tensor]]


def build_dataset(
    entries: tuple[dict[str, Any], ...], folder: Path, encode: Encode, samples: int, batch: int, seed: int
) -> Dataset[Sample]:
    """The mixture of a config's ``data``, as long as the ``samples`` that the run will see.

    Kinds: ``captions`` (stage 1 on a prepared picture set: ``split``, ``styles``,
    ``past_answers``), ``questions`` (stage 2 on one: ``split``, ``styles``, ``mix`` of kinds with
    weights, ``questions`` a stream), ``chat`` (``questions`` to a sample)
    and ``llava`` (``file``, ``independent``). ``share`` (default
    1) is a source's part of the batches.
    """
    shares: list[float] = []
    parts: list[Dataset[Sample]] = []
    for i, entry in enumerate(entries):
        settings = dict(entry)
        kind = settings.pop("kind", None)
        shares.append(float(settings.pop("share", 1.0)))
        try:
            if kind == "captions":
                parts.append(_captions(folder, samples, batch, f"{seed}/{i}", **settings))
            elif kind == "questions":
                parts.append(_questions(folder, samples, batch, f"{seed}/{i}", **settings))
            elif kind == "chat":
                parts.append(ChatSamples(settings.pop("questions"), samples, f"{seed}/{i}", **settings))
            elif kind == "llava":
                file = folder / settings.pop("file")
                parts.append(LlavaSamples(file, folder, encode, **settings))
            else:
                raise UserError(f"data source {i + 1} has kind {kind!r}; choose captions, questions, chat or llava")
        except (TypeError, KeyError) as error:
            raise UserError(f"data source {i + 1} ({kind}): {error}") from None
    return Mixture(parts, shares, samples, batch, seed)


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
    ask = partial(_ask_captions, Events(pictures.captions), past_answers)
    return StreamSamples(pictures, styles_of(styles), ask, length, seed, batch)


def _ask_captions(events: Events, past_answers: int, plan: StreamPlan, rng: random.Random) -> list[Turn]:
    return [question.turn for question in caption_questions(plan, events, rng, past_answers)]


def _questions(
    folder: Path,
    length: int,
    batch: int,
    seed: str,
    split: str,
    styles: list[dict[str, Any]],
    mix: dict[str, float],
    questions: int,
) -> StreamSamples:
    unknown = set(mix) - set(ASKERS)
    if unknown:
        raise UserError(f"no question kind is called {min(unknown)!r}; choose from {', '.join(ASKERS)}")
    pictures = PictureSet.load(folder, split)
    ask = partial(_ask_questions, Events(pictures.captions), mix, questions)
    return StreamSamples(pictures, styles_of(styles), ask, length, seed, batch)


def _ask_questions(
    events: Events, mix: dict[str, float], count: int, plan: StreamPlan, rng: random.Random
) -> list[Turn]:
    return [question.turn for question in stream_questions(plan, events, rng, mix, count)]
