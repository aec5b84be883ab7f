"""Build datasets from the ``data`` entries of a stage's config."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from flash_vstream.errors import UserError
from flash_vstream.synthetic.captions import PictureSet
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.plans import StreamPlan, StreamStyle
from flash_vstream.synthetic.questions import ASKERS, Turn, caption_questions, stream_questions
from flash_vstream.train.chat import ChatSamples
from flash_vstream.train.datasets import LlavaSamples, Mixture, Sample, StreamSamples

Encode = Callable[[Path], tuple[Tensor, Tensor]]
Ask = Callable[[StreamPlan, Events, random.Random], list[Turn]]


def build_dataset(
    entries: tuple[dict[str, Any], ...], folder: Path, encode: Encode, samples: int, batch: int, seed: int
) -> Dataset[Sample]:
    """Build the mixture described by a config's ``data``, with as many ``samples`` as the run will see.

    Each entry has a ``kind``:

    - ``captions``: stage 1 on a prepared picture set (``split``, ``styles``, ``past_answers``)
    - ``questions``: stage 2 on a prepared picture set (``split``, ``styles``, ``mix`` of question kinds
      with weights, ``questions`` per stream)
    - ``chat``: plain chat (``questions`` per sample)
    - ``llava``: LLaVA-format JSON (``file``, ``independent``)

    ``share`` (default 1) is the source's relative share of the batches.
    """
    shares: list[float] = []
    parts: list[Dataset[Sample]] = []
    for i, entry in enumerate(entries):
        settings = dict(entry)
        kind = settings.pop("kind", None)
        shares.append(float(settings.pop("share", 1.0)))
        try:
            if kind in COMPOSED:
                split, styles = settings.pop("split"), settings.pop("styles")
                ask = COMPOSED[kind](**settings)
                parts.append(_composed(ask, folder, samples, batch, f"{seed}/{i}", split, styles))
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


def _captions(past_answers: int = 2) -> Ask:
    def ask(plan: StreamPlan, events: Events, rng: random.Random) -> list[Turn]:
        return [question.turn for question in caption_questions(plan, events, rng, past_answers)]

    return ask


def _questions(mix: dict[str, float], questions: int) -> Ask:
    unknown = set(mix) - set(ASKERS)
    if unknown:
        raise UserError(f"no question kind is called {min(unknown)!r}; choose from {', '.join(ASKERS)}")

    def ask(plan: StreamPlan, events: Events, rng: random.Random) -> list[Turn]:
        return [question.turn for question in stream_questions(plan, events, rng, mix, questions)]

    return ask


COMPOSED: dict[str, Callable[..., Ask]] = {"captions": _captions, "questions": _questions}
"""Data kinds that compose streams from a prepared picture set."""


def _composed(
    ask: Ask, folder: Path, length: int, batch: int, seed: str, split: str, styles: list[dict[str, Any]]
) -> StreamSamples:
    pictures = PictureSet.load(folder, split)
    events = Events(pictures.captions)
    return StreamSamples(pictures, styles_of(styles), lambda plan, rng: ask(plan, events, rng), length, seed, batch)
