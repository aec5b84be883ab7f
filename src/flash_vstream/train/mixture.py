"""Build datasets from the ``data`` entries of a stage's config."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from flash_vstream.errors import UserError
from flash_vstream.synthetic.annotations import Annotation, read_annotations
from flash_vstream.synthetic.captions import PictureSet
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.plans import StreamPlan, StreamStyle
from flash_vstream.synthetic.presence import PresenceTurns
from flash_vstream.synthetic.questions import ASKERS, Turn, caption_questions, stream_questions
from flash_vstream.synthetic.short_questions import picture_turns
from flash_vstream.train.chat import ChatSamples
from flash_vstream.train.datasets import Mixture, Sample, StreamSamples
from flash_vstream.train.llava import LlavaSamples

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
    - ``pictures``: descriptions, short ``questions`` and questions about ``presence`` on the scene that an annotated
      picture set shows last (``split``, ``styles``)
    - ``chat``: plain chat (``questions`` per sample)
    - ``llava``: LLaVA-format JSON (``file``, ``independent``; ``images`` and ``videos``, the folders of its media)

    ``share`` (default 1) is the source's relative share of the batches.
    """
    shares = [float(entry.get("share", 1.0)) for entry in entries]
    parts = [_part(i, entry, folder, encode, samples, batch, seed) for i, entry in enumerate(entries)]
    return Mixture(parts, shares, samples, batch, seed)


def finite_dataset(
    entries: tuple[dict[str, Any], ...], folder: Path, encode: Encode, seed: int
) -> ConcatDataset[Sample]:
    """All samples of the given sources, one after the other: for epochs and for validation.

    ``llava`` sources end by themselves; the others need ``samples``, how many to draw. Raises ``UserError``
    for a ``share``, which would contradict using everything.
    """
    parts = []
    for i, entry in enumerate(entries):
        settings = dict(entry)
        drawn = settings.pop("samples", None)
        if "share" in settings:
            raise UserError(f"data source {i + 1}: share has no meaning where every sample is used; leave it out")
        if settings.get("kind") != "llava" and drawn is None:
            raise UserError(f"data source {i + 1} ({settings.get('kind')}) has no end; say how many: samples: 1000")
        parts.append(_part(i, settings, folder, encode, drawn or 0, 1, seed))
    return ConcatDataset(parts)


def _part(
    i: int, entry: dict[str, Any], folder: Path, encode: Encode, samples: int, batch: int, seed: int
) -> Dataset[Sample]:
    """The source described by entry ``i`` of a config's data."""
    settings = dict(entry)
    kind = settings.pop("kind", None)
    settings.pop("share", None)
    try:
        if kind in COMPOSED:
            split, styles = settings.pop("split"), settings.pop("styles")
            pictures = PictureSet.load(folder, split)
            if kind == "pictures":
                settings |= {"annotations": _annotations(folder, pictures), "captions": pictures.captions}
            return _composed(COMPOSED[kind](**settings), pictures, samples, batch, f"{seed}/{i}", styles)
        if kind == "chat":
            return ChatSamples(settings.pop("questions"), samples, f"{seed}/{i}", **settings)
        if kind == "llava":
            return LlavaSamples(folder / settings.pop("file"), folder, encode, **settings)
    except (TypeError, KeyError) as error:
        raise UserError(f"data source {i + 1} ({kind}): {error}") from None
    raise UserError(f"data source {i + 1} has kind {kind!r}; choose captions, questions, pictures, chat or llava")


def _annotations(folder: Path, pictures: PictureSet) -> dict[str, Annotation]:
    """The annotations of a split's pictures: no question may come from those of another."""
    every = read_annotations(folder / "annotations.jsonl")
    return {key: annotation for key, annotation in every.items() if key in pictures.captions}


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


def _pictures(
    annotations: Mapping[str, Annotation], captions: Mapping[str, Sequence[str]], questions: int, presence: int = 0
) -> Ask:
    turns = PresenceTurns(annotations, captions) if presence else None

    def ask(plan: StreamPlan, events: Events, rng: random.Random) -> list[Turn]:
        key = plan.scenes[-1].key
        if key not in annotations:
            return [question.turn for question in caption_questions(plan, events, rng)]
        asked = picture_turns(annotations[key], events.captions[key], rng, questions)
        if turns is not None:
            about_past = [number % 2 == 1 and len(plan.scenes) > 1 for number in range(presence)]
            made = [turns.ever(plan, rng) if past else turns.now(key, rng) for past in about_past]
            asked += [turn for turn in made if turn is not None]
        return asked

    return ask


COMPOSED: dict[str, Callable[..., Ask]] = {"captions": _captions, "questions": _questions, "pictures": _pictures}
"""Data kinds that compose streams from a prepared picture set."""


def _composed(
    ask: Ask, pictures: PictureSet, length: int, batch: int, seed: str, styles: list[dict[str, Any]]
) -> StreamSamples:
    events = Events(pictures.captions)
    return StreamSamples(pictures, styles_of(styles), lambda plan, rng: ask(plan, events, rng), length, seed, batch)
