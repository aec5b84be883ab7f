"""When a standing question is told: a state machine over confidences in stream time, with no model and no clock.

``step`` takes one look at a frame. An event that the looks show for ``min_seconds`` is proposed; whoever runs the
machine confirms it with care, and says the verdict with ``confirmed``. The machine then tells of its start, its end,
or both, as its rule asks.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

When = Literal["starts", "ends", "every", "lasts"]
HYSTERESIS = 0.15
"""An event that is there counts as gone only this far below its threshold."""
SLACK_SECONDS = 5.0
"""The longest break that does not end an event; shorter for events that need to last less."""
ASK_AGAIN_SECONDS = 30.0
"""How long after a refusal the same event, still there, is proposed again."""
_TOLD = {"starts": {"start"}, "ends": {"end"}, "every": {"start", "end"}, "lasts": {"start", "update", "end"}}


@dataclass(frozen=True)
class WatchRule:
    """What is told of an event, all durations in seconds of stream time.

    - ``starts``: when it has been there for ``min_seconds``;
    - ``ends``: when it was there that long, and is gone;
    - ``every``: both, each time;
    - ``lasts``: as ``every``, and again each ``cooldown_seconds`` while it lasts.

    After an alert, no event is told for ``cooldown_seconds``; those in between are counted. An event is there from a
    confidence of ``threshold``. Time that nobody looked at for more than ``longest_gap`` counts for nothing.
    """

    when: When = "starts"
    min_seconds: float = 2.0
    cooldown_seconds: float = 60.0
    threshold: float = 0.5
    longest_gap: float = 10.0

    @property
    def slack(self) -> float:
        """How long an event may be out of sight without having ended."""
        return min(self.min_seconds, SLACK_SECONDS)


@dataclass
class WatchState:
    """What a watch remembers between looks; plain values, so that it survives a restart.

    ``phase`` is ``away``, ``coming`` (seen, not for long enough), ``asking`` (proposed), ``there``, or ``refused``.
    Times are in stream time: of the newest look, of the event's first and newest appearance, of the last alert.
    """

    phase: str = "away"
    time: float | None = None
    confidence: float | None = None
    began: float = 0.0
    seen: float = 0.0
    asked: float = 0.0
    told: float | None = None
    quiet: bool = False
    events: int = 0
    suppressed: int = 0
    refused: int = 0
    looks: int = 0
    missed: int = 0
    kept: int | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "WatchState":
        """The state that ``to_dict`` returned. A proposal whose verdict was lost is made again."""
        known = {field.name for field in fields(cls)}
        state = cls(**{name: value for name, value in values.items() if name in known})
        if state.phase == "asking":
            state.phase = "coming"
        return state


@dataclass(frozen=True)
class Change:
    """What happened to an event: ``kind`` is ``proposed``, ``start``, ``update`` or ``end``."""

    kind: str
    began: float
    time: float
    confidence: float


def step(rule: WatchRule, state: WatchState, time: float, confidence: float) -> Change | None:
    """Take a look at stream time ``time`` that shows the event with ``confidence`` from 0 to 1.

    Returns what there is to tell, or a proposal, which ``confirmed`` must follow before the next look.
    """
    if state.time is not None and time < state.time - rule.longest_gap:  # the stream has started over
        state.phase, state.told, state.quiet = "away", None, False
    unseen = state.time is not None and time - state.time > rule.longest_gap
    if unseen and state.phase == "coming":
        state.phase = "away"
    elif unseen:
        state.seen = time
    state.time, state.confidence = time, confidence
    state.looks += 1
    is_on = state.phase in ("coming", "there")
    present = confidence >= rule.threshold - (HYSTERESIS if is_on else 0.0)
    if present:
        if state.phase == "away":
            state.phase, state.began = "coming", time
        state.seen = time
        return _present(rule, state)
    if state.phase != "away" and time - state.seen >= rule.slack:
        return _gone(rule, state)
    return None


def _present(rule: WatchRule, state: WatchState) -> Change | None:
    time = state.seen
    if state.phase == "coming" and time - state.began >= rule.min_seconds:
        return _propose(rule, state)
    if state.phase == "refused" and time - state.asked >= ASK_AGAIN_SECONDS:
        return _propose(rule, state)
    if state.phase == "there" and rule.cooldown_seconds > 0 and not _is_cooling(rule, state):
        return _tell(rule, state, "update")
    return None


def _propose(rule: WatchRule, state: WatchState) -> Change | None:
    if rule.when != "ends" and _is_cooling(rule, state):  # nobody would be told, so nobody is asked
        state.phase, state.quiet = "there", True
        state.suppressed += 1
        return None
    state.phase, state.asked = "asking", state.seen
    return _change(state, "proposed")


def confirmed(rule: WatchRule, state: WatchState, verdict: bool) -> Change | None:
    """Take the verdict on a proposal; returns the start, if it is told."""
    if not verdict:
        state.phase = "refused"
        state.refused += 1
        return None
    state.phase, state.quiet = "there", False
    state.events += 1
    return _tell(rule, state, "start")


def _gone(rule: WatchRule, state: WatchState) -> Change | None:
    phase, state.phase = state.phase, "away"
    if phase != "there" or state.quiet:
        return None
    if rule.when == "ends" and _is_cooling(rule, state):
        state.suppressed += 1
        return None
    return _tell(rule, state, "end")


def _tell(rule: WatchRule, state: WatchState, kind: str) -> Change | None:
    if kind not in _TOLD[rule.when] or (state.quiet and kind != "start"):
        return None
    if kind != "end" or rule.when == "ends":  # an end that follows its start keeps nothing else quiet
        state.told = state.time
    return _change(state, kind)


def _is_cooling(rule: WatchRule, state: WatchState) -> bool:
    assert state.time is not None
    return state.told is not None and state.time - state.told < rule.cooldown_seconds


def _change(state: WatchState, kind: str) -> Change:
    assert state.time is not None
    assert state.confidence is not None
    return Change(kind, state.began, state.time, round(state.confidence, 4))
