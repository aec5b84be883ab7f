"""How well a watch tells of events whose times are known: precision, recall and delay."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

TOLERANCE_SECONDS = 5.0
"""How long after an event's end an alert about it is still right."""


@dataclass(frozen=True)
class AlertScore:
    """``told`` alerts, of which ``right`` are the first within one of the ``expected`` events each.

    ``delays`` are seconds of stream time from each event found to its alert.
    """

    told: int
    right: int
    expected: int
    delays: tuple[float, ...] = ()

    @property
    def precision(self) -> float | None:
        """The share of alerts that are right; None without alerts."""
        return self.right / self.told if self.told else None

    @property
    def recall(self) -> float | None:
        """The share of events that were told; None without events."""
        return self.right / self.expected if self.expected else None

    @property
    def median_delay(self) -> float | None:
        """The median delay in seconds of stream time; None if no event was told."""
        return median(self.delays) if self.delays else None

    def __add__(self, other: "AlertScore") -> "AlertScore":
        return AlertScore(
            self.told + other.told,
            self.right + other.right,
            self.expected + other.expected,
            self.delays + other.delays,
        )


def score_alerts(
    told: Sequence[float], expected: Sequence[tuple[float, float]], at_end: bool = False, moment: float = 1.0
) -> AlertScore:
    """Score alerts at stream times ``told`` for events with the start and end times ``expected``.

    An alert is right if it is the first one between an event's begin and ``TOLERANCE_SECONDS`` after its end;
    ``at_end``: not before the event's end. ``moment`` is the interval between frames: an alert may be that early.
    """
    left = sorted(told)
    delays = []
    for begin, end in sorted(expected):
        due = end if at_end else begin
        fitting = [time for time in left if due - moment <= time <= end + TOLERANCE_SECONDS]
        if fitting:
            left.remove(fitting[0])
            delays.append(max(0.0, fitting[0] - due))
    return AlertScore(len(told), len(delays), len(expected), tuple(delays))
