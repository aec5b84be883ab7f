"""How well watches tell of events in held-out pictures and clips, beside a baseline that asks every second.

Streams are composed by a seed of annotated pictures (a camera that drifts over each) or of annotated clips, scene by
scene. Events are things, people, and whole scenes by their short description; when they are there is known from the
annotations. Both methods obey the same rule and the same scores (``evaluate/watching.py``).

The baseline reads the newest frames every second, once for all events, and asks the language model whether each is
there; it is there if "yes" is the likelier answer. A watch looks at every frame with its cheap score and asks the
language model once.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flash_vstream.errors import UserError
from flash_vstream.evaluate.pictures import LEAST_PICTURES, read_json
from flash_vstream.evaluate.watching import AlertScore, score_alerts
from flash_vstream.live.standing_questions import Lookout
from flash_vstream.live.watch_rules import WatchRule, WatchState, confirmed, step
from flash_vstream.memory import MemorySnapshot
from flash_vstream.models.answer import Prefix
from flash_vstream.models.event_score import CONFIRMING_FRAMES, EventScorer
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.annotations import Annotation, article, read_annotations
from flash_vstream.synthetic.captions import pictures_in
from flash_vstream.synthetic.clips import frames_of_clips, held_out
from flash_vstream.synthetic.plans import scene_views
from flash_vstream.synthetic.presence import Things
from flash_vstream.synthetic.views import picture_views

FPS = 1.0
SCENES = 10
FRAMES = (5, 12)
"""Fewest and most frames of a scene made of a picture; a clip is shown in full."""
SIZE = 256
EACH = 2
"""How many things and how many scenes are waited for in a stream."""
RULE = WatchRule(when="starts", min_seconds=1.0, cooldown_seconds=0.0)
"""Told of each event once it has been there for a second, however soon after another."""
METHODS = ("watch", "asking every second")
KINDS = ("thing", "people", "scene")


@dataclass(frozen=True)
class WatchedEvent:
    """An event of a stream: its ``kind``, how it is put, and when it is there (seconds of stream time)."""

    kind: str
    text: str
    times: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class WatchedStream:
    """A composed stream: a frame a second, and the events that are waited for."""

    frames: list[Image.Image]
    events: list[WatchedEvent]


def compose(
    keys: Sequence[str], shown: Callable[[str], list[Image.Image]], made: Things, rng: random.Random
) -> WatchedStream:
    """A stream that shows ``keys`` one after the other, and its events: ``EACH`` things and scenes, and people."""
    frames: list[Image.Image] = []
    spans = []
    for key in keys:
        own = shown(key)
        spans.append((len(frames) / FPS, (len(frames) + len(own) - 1) / FPS))
        frames += own
    listed = [made.listed[key] for key in keys]
    events = []
    # Of a thing that a text merely mentions, nobody knows whether it is seen.
    sure = sorted(
        thing
        for thing in set().union(*listed)
        if all(thing in own or thing not in made.named[key] for own, key in zip(listed, keys, strict=True))
    )
    for thing in rng.sample(sure, min(EACH, len(sure))):
        events.append(WatchedEvent("thing", article(thing), _joined(spans, [thing in own for own in listed])))
    people = [made.annotations[key].people > 0 for key in keys]
    if any(people) and not all(people):
        events.append(WatchedEvent("people", "somebody", _joined(spans, people)))
    for chosen in rng.sample(range(len(keys)), EACH):
        text = made.annotations[keys[chosen]].short.strip().rstrip(".")
        events.append(WatchedEvent("scene", text[:1].lower() + text[1:], (spans[chosen],)))
    return WatchedStream(frames, events)


def _joined(spans: Sequence[tuple[float, float]], there: Sequence[bool]) -> tuple[tuple[float, float], ...]:
    """The times at which something is there; scenes that follow each other are one time."""
    found: list[tuple[float, float]] = []
    before = False
    for (begin, end), now in zip(spans, there, strict=True):
        if now and before:
            found[-1] = found[-1][0], end
        elif now:
            found.append((begin, end))
        before = now
    return tuple(found)


class Asking:
    """The baseline: a lookout that asks the language model at every frame, under the same rule."""

    def __init__(self, scorer: EventScorer, event: str):
        self._scorer, self._event, self._state = scorer, scorer.event(event), WatchState()

    def look(self, prefix: Prefix, time: float) -> Iterator[float]:
        """The stream time, if the event is told now; ``prefix`` are the newest frames, read."""
        change = step(RULE, self._state, time, self._scorer.likelihood(self._event, prefix))
        if change is not None and change.kind == "proposed":
            change = confirmed(RULE, self._state, True)
        if change is not None and change.kind == "start":
            yield change.time


class Watching:
    """A watch as users have it."""

    def __init__(self, scorer: EventScorer, event: str):
        self._lookout = Lookout(scorer, event, RULE)

    def look(self, snapshot: MemorySnapshot) -> Iterator[float]:
        """The stream time, if the event is told now."""
        for alert in self._lookout.look(snapshot):
            if alert is not None and alert.kind == "start":
                yield alert.time


def watch_stream(
    pipeline: FlashVStream, scorer: EventScorer, composed: WatchedStream, seconds: dict[str, float]
) -> dict[tuple[str, str], AlertScore]:
    """Both methods' scores by (method, kind); adds the seconds of work of each to ``seconds``."""
    watches = [(event, Watching(scorer, event.text), list[float]()) for event in composed.events]
    askings = [(event, Asking(scorer, event.text), list[float]()) for event in composed.events]
    stream = pipeline.new_stream()
    for number, frame in enumerate(composed.frames):
        stream.write([frame], [number / FPS])
        snapshot = stream.snapshot()
        started = time.perf_counter()
        for _, watching, told in watches:
            told += watching.look(snapshot)
        between = time.perf_counter()
        prefix = scorer.read_newest(snapshot, CONFIRMING_FRAMES)
        for _, asking, told in askings:
            told += asking.look(prefix, snapshot.time)
        seconds[METHODS[0]] += between - started
        seconds[METHODS[1]] += time.perf_counter() - between
    scores: dict[tuple[str, str], AlertScore] = {}
    heard = [(METHODS[0], event, told) for event, _, told in watches]
    heard += [(METHODS[1], event, told) for event, _, told in askings]
    for name, event, told in heard:
        score = score_alerts(told, event.times, moment=1 / FPS)
        scores[name, event.kind] = scores.get((name, event.kind), AlertScore(0, 0, 0)) + score
    return scores


def run_watches(data: Path, model: str, split: str, streams: int, seed: int) -> dict[str, Any]:
    """Precision, recall and delay on ``streams`` composed streams of the held-out pictures or clips in ``data``.

    Raises ``UserError`` for a folder with too few of them.
    """
    annotations = read_annotations(data / "annotations.jsonl")
    is_clips = not (data / "splits.json").exists()
    keys = held_out(annotations) if is_clips else read_json(data / "splits.json").get(split, [])
    known: Mapping[str, Annotation] = {key: annotations[key] for key in keys if key in annotations}
    if len(known) < SCENES:
        raise UserError(f"{data} has {len(known)} annotated pictures or clips held out; a stream takes {SCENES}")
    rngs = [random.Random(f"watches/{seed}/{number}") for number in range(streams)]
    chosen = [rng.sample(sorted(known), SCENES) for rng in rngs]
    wanted = {key for own in chosen for key in own}
    shown = _clips(data, known, wanted) if is_clips else _pictures(data, wanted)
    captions = read_json(data / "captions.json") if (data / "captions.json").exists() else {}
    made = Things(known, captions, LEAST_PICTURES)
    pipeline = FlashVStream.from_pretrained(model)
    scorer = EventScorer(pipeline.generator)
    seconds, looks = dict.fromkeys(METHODS, 0.0), 0
    scores: dict[tuple[str, str], AlertScore] = {}
    pairs = list(zip(chosen, rngs, strict=True))
    for own, rng in track(pairs, "streams", console=Console(stderr=True)):
        composed = compose(own, lambda key, rng=rng: shown(key, rng), made, rng)  # type: ignore[misc]
        looks += len(composed.frames) * len(composed.events)
        for key, score in watch_stream(pipeline, scorer, composed, seconds).items():
            scores[key] = scores.get(key, AlertScore(0, 0, 0)) + score
    rows = [_row(name, kind, scores) for name in METHODS for kind in (*KINDS, "all")]
    costs = {name: round(1000 * value / max(1, looks), 2) for name, value in seconds.items()}
    return {"model": model, "streams": streams, "seed": seed, "looks": looks, "rows": rows, "milliseconds": costs}


def _row(name: str, kind: str, scores: Mapping[tuple[str, str], AlertScore]) -> dict[str, Any]:
    found = [score for (method, own), score in scores.items() if method == name and kind in (own, "all")]
    score = sum(found, AlertScore(0, 0, 0))
    values = {"precision": score.precision, "recall": score.recall, "median_delay": score.median_delay}
    return {"method": name, "kind": kind, "events": score.expected, "alerts": score.told, **values}


def _pictures(data: Path, wanted: set[str]) -> Callable[[str, random.Random], list[Image.Image]]:
    views = {key: picture_views(picture, key, SIZE) for key, picture in pictures_in(data, wanted)}
    if missing := wanted - views.keys():
        raise UserError(f"{data} does not have the picture {min(missing)}")
    return lambda key, rng: [views[key][view] for view in scene_views(rng.randint(*FRAMES), rng)]


def _clips(
    data: Path, known: Mapping[str, Annotation], wanted: set[str]
) -> Callable[[str, random.Random], list[Image.Image]]:
    clips = frames_of_clips(data, {key: known[key] for key in wanted}, FPS, SIZE)
    return lambda key, rng: [Image.fromarray(np.asarray(frame)) for frame in clips[key]]


def print_watches(report: Mapping[str, Any]) -> None:
    """The report as a table."""
    table = Table("method", "event", "events", "alerts", "precision", "recall", "median delay")
    for row in report["rows"]:
        shares = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("precision", "recall")]
        delay = "-" if row["median_delay"] is None else f"{row['median_delay']:.0f} s"
        table.add_row(row["method"], row["kind"], str(row["events"]), str(row["alerts"]), *shares, delay)
    console = Console(highlight=False)
    console.print(table)
    costs = ", ".join(f"{name} {value:g} ms" for name, value in report["milliseconds"].items())
    console.print(f"for each event and frame: {costs}, alerts' sentences included")
