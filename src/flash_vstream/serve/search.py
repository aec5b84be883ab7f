"""One question to many cameras: which streams of a state folder have shown something, and when.

Searches the long-term memories as they were saved last, and the transcript. A server may be using the folder.
"""

import logging
import math
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from flash_vstream.errors import UserError
from flash_vstream.live.published import THUMBNAILS, all_thumbnails
from flash_vstream.live.stream_state import load_state, memory_state, restored_snapshot
from flash_vstream.memory import Slots
from flash_vstream.models.event_score import EventScorer
from flash_vstream.pipeline import FlashVStream
from flash_vstream.serve.transcript import FILE, Caption

APART_SECONDS = 10.0
"""Of frames that are nearer to each other than this, the best one stands for all."""
log = logging.getLogger("flash_vstream.serve")


@dataclass(frozen=True)
class Found:
    """A frame that may show what was searched: seen at ``time``, one of a stretch from ``start`` to ``end``.

    Times are in seconds of stream time; ``clock`` is the Unix time, as far as the stream played without a break since.
    ``score`` ranks; ``seen`` is whether the model counts it as shown, None if it cannot tell. ``picture`` is a JPEG.
    """

    stream: str
    time: float
    start: float
    end: float
    clock: float | None
    score: float
    seen: bool | None
    picture: bytes | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the picture."""
        return {name: value for name, value in asdict(self).items() if name != "picture"}


@dataclass(frozen=True)
class _Saved:
    """A stream's saved long-term memory, the pictures of its frames by time, and when its newest frame was seen."""

    stream: str
    slots: Slots
    pictures: dict[float, bytes]
    time: float
    clock: float | None


def search_memories(folder: Path, text: str, pipeline: FlashVStream, limit: int) -> list[Found]:
    """The ``limit`` frames of all streams that show ``text`` best, best first.

    A memory that is damaged or another model's is left out and logged. Raises ``UserError`` if there is none.
    """
    saved = _saved_memories(folder, pipeline)
    scorer = EventScorer(pipeline.generator)
    event, among = scorer.event(text), sum(len(own.slots) for own in saved)
    found = []
    for own in saved:
        scores, is_certain = scorer.scores(event, own.slots, among)
        for at in _apart(scores, own.slots):
            start, end, time = (float(times[at]) for times in (own.slots.start, own.slots.end, own.slots.exemplar))
            clock = own.clock - (own.time - time) if own.clock is not None else None
            score = float(scores[at].sigmoid()) if is_certain else float(scores[at])
            seen = score > 0.5 if is_certain else None
            found.append(Found(own.stream, time, start, end, clock, round(score, 4), seen, own.pictures.get(time)))
    return sorted(found, key=lambda own: -own.score)[:limit]


def search_transcript(folder: Path, text: str, limit: int) -> list[Caption]:
    """The newest ``limit`` captions of all streams that hold every word of ``text``, newest first."""
    path = folder / FILE
    if not path.exists():
        return []
    words = text.lower().split()
    where = " and ".join(["instr(lower(text), ?)"] * len(words)) or "1"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            rows = db.execute(
                f"select id, stream, time, clock, text from captions where {where} order by id desc limit ?",
                (*words, limit),
            ).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    return [Caption(*row) for row in rows]


def _saved_memories(folder: Path, pipeline: FlashVStream) -> list[_Saved]:
    found = []
    paths = sorted((folder / "memories").glob("*.safetensors"))
    for path in paths:
        stream = unquote(path.stem)
        try:
            state, notes = load_state(path)
            snapshot = restored_snapshot(memory_state(state), pipeline)
        except Exception as error:  # the others can be searched
            log.warning("the memory of %r cannot be searched: %s", stream, error)
            continue
        if snapshot is None:
            continue
        slots = snapshot.longterm if len(snapshot.longterm) else snapshot.retrieved
        if len(slots):
            time = notes.get("time")
            pictures = {name: state[name].numpy() for name in THUMBNAILS}
            newest = float(time if time is not None else snapshot.time)
            found.append(_Saved(stream, slots, all_thumbnails(pictures), newest, notes.get("clock")))
    if not found:
        why = "none of its memories can be searched" if paths else "there are no memories in it"
        raise UserError(f"{folder}: {why}; name a folder that flash-vstream serve --state has filled")
    return found


def _apart(scores: torch.Tensor, slots: Slots) -> list[int]:
    """The slots that are the best within ``APART_SECONDS``, best first."""
    chosen: list[int] = []
    times = slots.exemplar.tolist()
    for at in scores.argsort(descending=True).tolist():
        if all(math.fabs(times[at] - times[other]) >= APART_SECONDS for other in chosen):
            chosen.append(at)
    return chosen
