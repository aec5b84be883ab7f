"""When a standing question is told: the state machine alone, in stream time."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_vstream.live.watch_rules import ASK_AGAIN_SECONDS, WatchRule, WatchState, confirmed, step


def told(rule: WatchRule, looks: list[tuple[float, float]], verdict=True, state: WatchState | None = None):
    """What a watch tells: ``kind at time`` for each change, given looks as (time, confidence)."""
    state = state if state is not None else WatchState()
    found = []
    for time, confidence in looks:
        change = step(rule, state, time, confidence)
        if change is not None and change.kind == "proposed":
            change = confirmed(rule, state, verdict)
        if change is not None:
            found.append(f"{change.kind} {change.time:g}")
    return found


def seconds(*spans: tuple[int, int], until: int) -> list[tuple[float, float]]:
    """A look a second, at an event that is there in ``spans``, ends included."""
    return [(float(t), 0.9 if any(a <= t <= b for a, b in spans) else 0.1) for t in range(until)]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("starts", ["start 7", "start 42"]),
        ("ends", ["end 13", "end 48"]),
        ("every", ["start 7", "end 13", "start 42", "end 48"]),
        ("lasts", ["start 7", "end 13", "start 42", "end 48"]),
    ],
)
def test_what_is_told_of_two_events(when, expected):
    rule = WatchRule(when, min_seconds=2, cooldown_seconds=20)
    assert told(rule, seconds((5, 11), (40, 46), until=60)) == expected


def test_what_lasts_is_told_again_while_it_does():
    rule = WatchRule("lasts", min_seconds=10, cooldown_seconds=15)
    assert told(rule, seconds((5, 50), until=70)) == ["start 15", "update 30", "update 45", "end 55"]
    assert told(WatchRule("lasts", 10, 0), seconds((5, 50), until=70)) == ["start 15", "end 55"]
    assert told(rule, seconds((5, 13), until=70)) == []


def test_a_flicker_is_neither_an_event_nor_the_end_of_one():
    rule = WatchRule("every", min_seconds=3, cooldown_seconds=0)
    assert told(rule, seconds((5, 5), (20, 21), until=40)) == []
    assert told(rule, seconds((5, 10), (13, 20), until=40)) == ["start 8", "end 23"]


def test_a_stream_that_starts_over_is_told_of_at_once():
    rule, state = WatchRule("starts", min_seconds=2, cooldown_seconds=60), WatchState()
    assert told(rule, [(t + 80_000, c) for t, c in seconds((5, 11), until=20)], state=state) == ["start 80007"]
    assert told(rule, seconds((5, 11), until=20), state=state) == ["start 7"]


def test_a_memory_restored_from_a_save_ten_seconds_old_tells_nothing_twice():
    rule, state = WatchRule("starts", min_seconds=2, cooldown_seconds=60), WatchState()
    looks = seconds((5, 30), until=40)
    assert told(rule, looks[:15], state=state) == ["start 7"]
    assert told(rule, looks[5:], state=state) == []


def test_an_event_ends_only_below_the_hysteresis():
    rule = WatchRule("every", min_seconds=0, cooldown_seconds=0, threshold=0.5)
    assert told(rule, [(0, 0.49), (1, 0.5), (2, 0.4), (3, 0.36), (4, 0.34)]) == ["start 1", "end 4"]


def test_the_cooldown_keeps_events_quiet_and_counts_them():
    state = WatchState()
    looks = seconds((5, 11), (20, 26), (80, 86), until=100)
    rule = WatchRule("every", min_seconds=2, cooldown_seconds=60)
    assert told(rule, looks, state=state) == ["start 7", "end 13", "start 82", "end 88"]
    assert (state.events, state.suppressed) == (2, 1)
    state = WatchState()
    assert told(WatchRule("ends", 2, 60), looks, state=state) == ["end 13", "end 88"]
    assert (state.events, state.suppressed) == (3, 1)


def test_a_refused_event_is_told_of_neither_at_its_start_nor_at_its_end():
    state = WatchState()
    rule = WatchRule("every", min_seconds=2, cooldown_seconds=0)
    assert told(rule, seconds((5, 20), until=40), verdict=False, state=state) == []
    assert (state.phase, state.refused) == ("away", 1)
    state = WatchState()
    told(rule, seconds((5, 70), until=90), verdict=False, state=state)
    assert state.refused == 1 + (70 - 7) // int(ASK_AGAIN_SECONDS)


def test_time_that_nobody_looked_at_counts_for_nothing():
    rule = WatchRule("every", min_seconds=5, cooldown_seconds=0, longest_gap=10)
    looks = [*seconds((0, 3), until=4), *((time + 100, 0.9) for time in range(4))]
    assert told(rule, looks) == []
    looks = [*seconds((0, 9), until=10), (100.0, 0.1), (102.0, 0.9), (103.0, 0.9)]
    assert told(rule, looks) == ["start 5"]  # it may have been there all along


@given(
    st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.0, 1.0)), max_size=60),
    st.sampled_from(["starts", "ends", "every", "lasts"]),
    st.sampled_from([0.0, 2.0, 30.0]),
    st.sampled_from([0.0, 15.0]),
    st.integers(0, 60),
)
def test_a_restart_changes_nothing_and_starts_and_ends_alternate(steps, when, least, cooldown, restart):
    rule = WatchRule(when, least, cooldown)
    looks, time = [], 0.0
    for pause, confidence in steps:
        time += pause
        looks.append((time, confidence))
    whole = told(rule, looks)
    state = WatchState()
    first = told(rule, looks[:restart], state=state)
    assert first + told(rule, looks[restart:], state=WatchState.from_dict(state.to_dict())) == whole
    kinds = [entry.split()[0] for entry in whole if not entry.startswith("update")]
    if when in ("every", "lasts"):
        assert kinds == ["start", "end"] * (len(kinds) // 2) + ["start"] * (len(kinds) % 2)
    starts = [float(entry.split()[1]) for entry in whole if not (entry.startswith("end") and when != "ends")]
    assert all(later - earlier >= cooldown for earlier, later in pairwise(starts))


def test_a_proposal_whose_verdict_was_lost_is_made_again():
    rule, state = WatchRule(min_seconds=0), WatchState()
    assert step(rule, state, 1.0, 0.9).kind == "proposed"
    again = WatchState.from_dict(state.to_dict())
    assert step(rule, again, 2.0, 0.9).kind == "proposed"
    assert confirmed(rule, again, True).began == 1.0
