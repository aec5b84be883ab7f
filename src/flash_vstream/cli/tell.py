"""``watch --tell`` and ``--describe``: say when something happens, and what, live or as it would have been said.

The latter is ``--dry-run``, which reads a recording as fast as it can.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.markup import escape

from flash_vstream.errors import UserError
from flash_vstream.timecode import format_time, parse_time

if TYPE_CHECKING:
    from flash_vstream.live.messages import Alert
    from flash_vstream.live.streams import LiveStreams
    from flash_vstream.live.watch_rules import WatchRule
    from flash_vstream.pipeline import FlashVStream, Stream
    from flash_vstream.video import Frame

IDLE_SECONDS = 0.02


@dataclass(frozen=True)
class Tell:
    """What ``--tell``, ``--describe`` (seconds) and the options beside them ask for."""

    events: tuple[str, ...]
    when: str = "starts"
    min_seconds: float = 2.0
    cooldown_seconds: float = 60.0
    threshold: float = 0.5
    expected: tuple[str, ...] = ()
    as_json: bool = False
    describe: float | None = None

    def rule(self, fps: float) -> "WatchRule":
        """The rule; raises ``UserError`` for an option that makes no sense."""
        from flash_vstream.live.watch_rules import WatchRule, When

        if not 0 < fps <= 1000:
            raise UserError(f"--fps is {fps:g}; it must be above 0 and at most 1000")
        if self.when not in get_args(When):
            raise UserError(f"--when is {self.when!r}; it must be one of {', '.join(get_args(When))}")
        if not (self.min_seconds >= 0 and self.cooldown_seconds >= 0):
            raise UserError("--min-seconds and --cooldown must not be negative")
        if not 0 < self.threshold < 1:
            raise UserError(f"--threshold is {self.threshold:g}; it must lie between 0 and 1")
        if not all(event.strip() for event in self.events):
            raise UserError('--tell is empty; say what to look out for, such as "a dog"')
        rule = WatchRule("starts", self.min_seconds, self.cooldown_seconds, self.threshold, max(10.0, 3 / fps))
        return replace(rule, when=self.when)  # type: ignore[arg-type]

    def intervals(self) -> list[tuple[float, float]]:
        """The times in ``--expect``; raises ``UserError`` for one that is malformed."""
        found = []
        for text in self.expected:
            begin, dash, end = text.partition("-")
            first = parse_time(begin)
            last = parse_time(end) if dash else first
            if last < first:
                raise UserError(f"--expect {text} ends before it begins")
            found.append((first, last))
        return found


def dry_run(source: str, fps: float, pipeline: "FlashVStream", tell: Tell) -> None:
    """Print when the events in a recording would have been told; with ``--expect``, how well that is."""
    from flash_vstream.evaluate.watching import score_alerts

    rule, expected = tell.rule(fps), tell.intervals()
    console = Console(highlight=False, emoji=False)
    told: list[float] = []
    kind = "end" if tell.when == "ends" else "start"
    seconds: list[float] = []
    for event, alert in _alerts(source, fps, pipeline, tell, rule, seconds):
        _print(event, alert, console, tell.as_json)
        if alert.kind == kind:
            told.append(alert.time)
    if not tell.events:
        return
    summary = f"{len(told)} alerts; {sum(seconds) / max(1, len(seconds)) * 1000:.1f} ms a look"
    scored: dict[str, float | int | None] = {"alerts": len(told)}
    if expected:
        score = score_alerts(told, expected, tell.when == "ends", 1 / fps)
        scored |= {"precision": score.precision, "recall": score.recall, "median_delay": score.median_delay}
        summary += f"; precision {_share(score.precision)}, recall {_share(score.recall)}"
        if score.median_delay is not None:
            summary += f", median delay {score.median_delay:.1f} s"
    print(json.dumps(scored) if tell.as_json else summary, flush=True)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _alerts(
    source: str, fps: float, pipeline: "FlashVStream", tell: Tell, rule: "WatchRule", seconds: list[float]
) -> "Iterator[tuple[str, Alert]]":
    """The alerts in a recording, in order; adds the seconds that each look for an event takes to ``seconds``."""
    from flash_vstream.live.messages import Describe
    from flash_vstream.live.standing_questions import Lookout, Narrator
    from flash_vstream.models.event_score import EventScorer
    from flash_vstream.video import read_frames

    scorer = EventScorer(pipeline.generator)
    lookouts: list[tuple[str, Lookout | Narrator]] = [(event, Lookout(scorer, event, rule)) for event in tell.events]
    if tell.describe is not None:
        lookouts.append(("", Narrator(scorer, Describe(tell.describe))))
    found: list[tuple[str, Alert]] = []

    def look(stream: "Stream", frame: "Frame") -> None:
        snapshot = stream.snapshot()
        for event, lookout in lookouts:
            if not lookout.is_due(frame.time):
                continue
            started, asked = time.perf_counter(), lookout.state.events + lookout.state.refused
            found.extend((event, alert) for alert in lookout.look(snapshot) if alert is not None)
            if (
                event and lookout.state.events + lookout.state.refused == asked
            ):  # else the language model was asked, too
                seconds.append(time.perf_counter() - started)

    stream = pipeline.new_stream()
    for frame in read_frames(source, fps, pipeline.processor.image_processor.size):
        pipeline.watch([frame], stream=stream, on_frame=look)
        yield from found
        found.clear()


def tell_live(live: "LiveStreams", name: str, fps: float, pipeline: "FlashVStream", tell: Tell) -> None:
    """Print alerts about the live stream ``name`` until it ends; raises ``UserError`` if it fails."""
    from flash_vstream.live.messages import Describe, Watch
    from flash_vstream.live.standing_questions import StandingQuestions

    rule = tell.rule(fps)
    standing = StandingQuestions(pipeline, share=1.0)  # this process has nothing else to do
    for event in tell.events:
        standing.set(Watch(event, live.shared_state(name).path, event, rule))
    if tell.describe is not None:
        standing.set(Watch("", live.shared_state(name).path, "", Describe(tell.describe)))
    console = Console(highlight=False, emoji=False)
    ended = False
    for reports in standing.turns():
        for report in reports or ():
            if report.alert is not None:
                _print(report.watch, report.alert, console, tell.as_json)
        if reports is None:
            if ended:  # and its last frame has been looked at
                return
            status = live.status(name)
            if status.state == "failed":
                raise UserError(status.error or f"{status.source} cannot be watched any more")
            ended = status.state == "ended"
            time.sleep(IDLE_SECONDS)


def _print(event: str, alert: "Alert", console: Console, as_json: bool) -> None:
    if alert.kind == "caption":
        if as_json:
            said = {"state": alert.kind, "time": alert.time, "clock": alert.clock, "text": alert.sentence}
            print(json.dumps(said), flush=True)
            return
        console.print(f"[bold]{format_time(alert.time)}[/bold]  {escape(alert.sentence)}", soft_wrap=True)
        return
    if as_json:
        print(json.dumps({"event": event, **alert.to_dict()}), flush=True)
        return
    sentence = f": {escape(alert.sentence)}" if alert.sentence else ""
    line = f"[bold]{format_time(alert.time)}[/bold]  {alert.kind}  {escape(event)} ({alert.confidence:.0%}){sentence}"
    console.print(line, soft_wrap=True)
