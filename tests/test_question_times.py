"""The times in a question."""

import pytest

from flash_vstream.models.question_times import in_stream_times, split_window


@pytest.mark.parametrize(
    ("asked", "read"),
    [
        ("What happened at 5 seconds?", "What happened at 5s?"),
        ("What happened at 1:05?", "What happened at 65s?"),
        ("What happened at 1:00:10?", "What happened at 3610s?"),
        ("What happened at 90:30?", "What happened at 5430s?"),
        ("What happened ten seconds ago?", "What happened at 190s?"),
        ("Who was there about 2 minutes ago?", "Who was there at 80s?"),
        ("What happened an hour ago?", "What happened at 0s?"),
        ("What has changed since a minute ago?", "What has changed since 140s?"),
        ("What happened in the last minute?", "What happened in the last 60s?"),
        ("What happened at 12s?", "What happened at 12s?"),
        ("What did you see at 3:05 pm?", "What did you see at 3:05 pm?"),
        ("What happened at 2m?", "What happened at 120s?"),
        ("Was there a wall 3 m high?", "Was there a wall 3 m high?"),
        ("Did you see two men and a second dog?", "Did you see two men and a second dog?"),
    ],
)
def test_times_are_seconds_of_the_stream(asked, read):
    assert in_stream_times(asked, 200.0) == read


@pytest.mark.parametrize(
    ("asked", "rest", "window"),
    [
        ("What happened in the last 60s?", "What happened?", (140.0, 200.0)),
        ("In the past 500s, what happened?", ", what happened?", (0.0, 200.0)),
        ("What have I missed since 12s?", "What have I missed?", (12.0, 200.0)),
        ("What happened between 3s and 9s?", "What happened?", (3.0, 9.0)),
        ("Tell me what happened from 3s to 9s.", "Tell me what happened.", (3.0, 9.0)),
        ("What happened at 3s?", "What happened at 3s?", None),
    ],
)
def test_a_stretch_of_time_is_taken_out(asked, rest, window):
    assert split_window(asked, 200.0) == (rest, window)
