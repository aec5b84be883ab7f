"""Standing questions: every new frame is looked at for the events that somebody waits for.

``Lookout`` is one watch: it scores frames, and asks the language model once for each event before telling of it.
``Narrator`` describes a stream every so often instead.
``StandingQuestions`` runs the watches of many streams in turns within the question worker, next to the questions.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from flash_vstream.live.messages import Alert, Describe, Report, Watch
from flash_vstream.live.published import MEMORY, read_picture
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import memory_state, restored_snapshot
from flash_vstream.live.watch_rules import Change, WatchRule, WatchState, confirmed, step
from flash_vstream.memory import MemorySnapshot
from flash_vstream.models.answer import Prefix
from flash_vstream.models.event_score import CONFIRMING_FRAMES, EventScorer, newest_frames
from flash_vstream.pipeline import FlashVStream

SHARE = 0.25
"""The share of the question worker's time that all watches together take at most; beyond it, they miss frames."""
LEAST_CONFIRMATION = 0.4
"""The careful score that is enough, or the watch's threshold if that is lower.

nano's language model says yes with less certainty than no. On 20 held-out pictures, for "somebody", the score was below
0.32 on all 11 without people and above 0.46 on 7 of the 9 with people.
"""
ASKED_SECONDS = 1.0
"""The shortest interval between looks of a model that has to read a frame to look at it."""
CHANGED = 0.1
"""How far, relative to its size, a frame's features must move from those last read for such a model to read it."""
TOLD_TOKENS = 40
TOLD_QUESTION = "What is happening right now?"
REPORT_SECONDS = 1.0
"""How often a watch's state is reported while nothing happens."""
log = logging.getLogger("flash_vstream.live")


class Lookout:
    """Looks out for one event on one stream, going on from ``state``."""

    def __init__(self, scorer: EventScorer, event: str, rule: WatchRule, state: WatchState | None = None):
        self.scorer, self.rule, self.state = scorer, rule, state or WatchState()
        self.event = scorer.event(event)
        self._read: Tensor | None = None  # the features of the frame that was last read

    def is_due(self, now: float) -> bool:
        """Whether a frame at stream time ``now`` should be looked at."""
        before = self.state.time
        return before is None or now < before or self.scorer.is_cheap or now - before >= ASKED_SECONDS

    def look(self, snapshot: MemorySnapshot) -> Iterator[Alert | None]:
        """Look at the newest frame of a memory: Nones after pieces of work, then perhaps an alert, without picture."""
        change = step(self.rule, self.state, snapshot.time, self._score(snapshot))
        confirmation, sentence = None, ""
        if change is not None and change.kind == "proposed":
            yield None
            verdict, prefix = self.scorer.confirm(self.event, snapshot)
            confirmation = round(verdict, 4)
            yield None
            change = confirmed(self.rule, self.state, verdict >= min(LEAST_CONFIRMATION, self.rule.threshold))
            if change is not None:
                pieces = []
                for piece in _sentence(self.scorer, prefix):
                    pieces.append(piece)
                    yield None
                sentence = "".join(pieces).strip()
        if change is not None:
            yield self._alert(change, snapshot, confirmation, sentence)

    def _score(self, snapshot: MemorySnapshot) -> float:
        """A new score; the last one if reading a frame is expensive and little has changed since."""
        if self.scorer.is_cheap:
            return self.scorer.score(self.event, snapshot)
        features = newest_frames(snapshot, 1).features[0].float()
        known = self.state.confidence
        if known is not None and self._read is not None and _moved(features, self._read) < CHANGED:
            return known
        self._read = features
        return self.scorer.score(self.event, snapshot)

    def _alert(self, change: Change, snapshot: MemorySnapshot, confirmation: float | None, sentence: str) -> Alert:
        evidence = newest_frames(snapshot, 3).exemplar.tolist() if confirmation is not None else [snapshot.time]
        return Alert(
            change.kind, change.began, change.time, time.time(), change.confidence, confirmation, sentence,
            tuple(evidence),
        )  # fmt: skip


class Narrator:
    """Describes one stream, going on from ``state``."""

    def __init__(self, scorer: EventScorer, rule: Describe, state: WatchState | None = None):
        self.scorer, self.rule, self.state = scorer, rule, state or WatchState()
        self._described: Tensor | None = None  # the features of the frame that was last described

    def is_due(self, now: float) -> bool:
        """Whether it is time for a description."""
        told = self.state.told
        return told is None or now < told or now - told >= self.rule.seconds

    def look(self, snapshot: MemorySnapshot) -> Iterator[Alert | None]:
        """Look at the newest frame of a memory: Nones after pieces of work, then a caption if it has changed."""
        newest = newest_frames(snapshot, CONFIRMING_FRAMES)
        self.state.time = snapshot.time
        self.state.looks += 1
        features = newest.features[-1].float()
        if self._described is not None and _moved(features, self._described) < CHANGED:
            return
        prefix = self.scorer.read_newest(snapshot, CONFIRMING_FRAMES)
        pieces = []
        for piece in _sentence(self.scorer, prefix):
            pieces.append(piece)
            yield None
        self._described, self.state.told = features, snapshot.time
        self.state.events += 1
        sentence, evidence = "".join(pieces).strip(), tuple(newest.exemplar.tolist())
        yield Alert("caption", snapshot.time, snapshot.time, time.time(), 1.0, None, sentence, evidence)


def _sentence(scorer: EventScorer, prefix: Prefix) -> Iterator[str]:
    """What is happening, piece by piece."""
    yield from scorer.generator.ask(prefix, TOLD_QUESTION, max_new_tokens=TOLD_TOKENS)


def _moved(features: Tensor, before: Tensor) -> float:
    """How far a frame's features are from those of another, relative to their size."""
    return float((features - before).norm() / before.norm().clamp(min=1e-6))


class _Stream:
    """A stream with watches: its shared state, the version last looked at, and when (monotonic seconds) that was."""

    def __init__(self, path: str):
        self.path = path
        self.shared = SharedTensors(path)
        self.memory_names = [name for name in self.shared.names if name.startswith(MEMORY)]
        self.version = 0
        self.looked_at = 0.0


class StandingQuestions:
    """The watches of many streams, worked on in turns.

    ``turns`` is endless: it yields None when there is nothing to do, an empty list after a piece of work, and
    a list of reports when there are any. A watch's error is reported in its state and concerns no other.
    """

    def __init__(self, pipeline: FlashVStream, share: float = SHARE):
        self._pipeline, self._share = pipeline, share
        self._scorer = EventScorer(pipeline.generator)
        self._watches: dict[str, tuple[Watch, Lookout | Narrator]] = {}
        self._streams: dict[str, _Stream] = {}
        self._reported: dict[str, tuple[str, float]] = {}
        self._rest_until = 0.0
        self.look_seconds = 0.0
        """How long the newest look took for each watch, the reading of the frame included."""

    def set(self, watch: Watch) -> None:
        """Add a watch, or replace the one with its id."""
        state = WatchState.from_dict(watch.state)
        if isinstance(watch.rule, Describe):
            self._watches[watch.id] = watch, Narrator(self._scorer, watch.rule, state)
        else:
            self._watches[watch.id] = watch, Lookout(self._scorer, watch.event, watch.rule, state)
        self._reported.pop(watch.id, None)
        self._drop_unused()
        if watch.shared_path in self._streams:
            self._streams[watch.shared_path].version = 0  # the newest frame is news to this watch

    def drop(self, watch: str) -> None:
        """Forget a watch; do nothing if there is none with this id."""
        self._watches.pop(watch, None)
        self._reported.pop(watch, None)
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Release streams without watches: the system cannot free shared memory that is mapped."""
        used = {watch.shared_path for watch, _ in self._watches.values()}
        for path in self._streams.keys() - used:
            del self._streams[path]

    def turns(self) -> Iterator[list[Report] | None]:
        """Work without end, in pieces of at most one look at a frame, one reading of a few frames, or one token."""
        while True:
            stream = self._next() if time.monotonic() >= self._rest_until else None
            if stream is None:
                yield None
            else:
                yield from self._look(stream)

    def _next(self) -> _Stream | None:
        """Of the streams with a new frame, the one that was looked at the longest time ago."""
        found = []
        for path in {watch.shared_path for watch, _ in self._watches.values()}:
            try:
                stream = self._streams.get(path) or self._streams.setdefault(path, _Stream(path))
            except OSError:  # removed; its watches follow or are dropped
                continue
            if stream.shared.version not in (0, stream.version):
                found.append(stream)
        return min(found, key=lambda stream: stream.looked_at, default=None)

    def _look(self, stream: _Stream) -> Iterator[list[Report]]:
        """Look at a stream's newest frame for each of its watches; then rest, so that the share is kept."""
        started, stream.looked_at = time.perf_counter(), time.monotonic()
        try:
            snapshot, kept = self._read(stream)
        except Exception as error:  # its next version may be readable
            log.warning("a stream cannot be looked at: %s: %s", type(error).__name__, error)
            snapshot, kept = None, 0
        busy = time.perf_counter() - started
        watches = [(watch, lookout) for watch, lookout in self._watches.values() if watch.shared_path == stream.path]
        for watch, lookout in watches:
            if snapshot is None or not lookout.is_due(snapshot.time):
                continue
            turns = self._look_for(watch, lookout, snapshot, kept, stream.shared)
            while True:
                started = time.perf_counter()
                try:
                    reports = next(turns)
                except StopIteration:
                    break
                finally:
                    busy += time.perf_counter() - started
                yield reports
        self.look_seconds = busy / max(1, len(watches))
        self._rest_until = time.monotonic() + busy * (1 / self._share - 1)

    def _read(self, stream: _Stream) -> tuple[MemorySnapshot | None, int]:
        """A stream's newest memory, and the number of frames kept with it."""
        stream.version = stream.shared.version
        published = stream.shared.read(stream.memory_names)
        if published is None:
            return None, 0
        state, notes = published
        return restored_snapshot(memory_state(state), self._pipeline), int(notes.get("kept", 0))

    def _look_for(
        self, watch: Watch, lookout: Lookout | Narrator, snapshot: MemorySnapshot, kept: int, shared: SharedTensors
    ) -> Iterator[list[Report]]:
        state = lookout.state
        if state.kept == kept:
            return  # looked at before a restart
        if state.kept is not None and self._scorer.is_cheap:
            state.missed += max(0, kept - state.kept - 1)
        state.kept = kept
        try:
            error, state.error = state.error, None
            for alert in lookout.look(snapshot):
                if alert is None:
                    yield []
                else:
                    picture = read_picture(shared)
                    told = replace(alert, picture=picture.jpeg if picture is not None else None)
                    if self._is_current(watch):
                        yield [self._report(watch, state, told)]
        except Exception as failed:  # the others go on
            state.error = f"{type(failed).__name__}: {failed}"[:500]
            if state.phase == "asking":
                state.phase = "coming"
            if state.error != error:
                log.warning("watch %r failed: %s", watch.id, state.error, exc_info=failed)
        phase, reported = self._reported.get(watch.id, ("", 0.0))
        due = state.phase != phase or time.monotonic() - reported > REPORT_SECONDS
        yield [self._report(watch, state)] if due and self._is_current(watch) else []

    def _is_current(self, watch: Watch) -> bool:
        """Whether the watch has been neither replaced nor dropped in the meantime."""
        return watch.id in self._watches and self._watches[watch.id][0] is watch

    def _report(self, watch: Watch, state: WatchState, alert: Alert | None = None) -> Report:
        self._reported[watch.id] = state.phase, time.monotonic()
        values = state.to_dict() | {"look_seconds": round(self.look_seconds, 5)}
        return Report(watch.id, values, alert)
