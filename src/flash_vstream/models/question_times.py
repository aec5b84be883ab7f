"""The times in a question, in seconds of the stream: ``ten seconds ago`` and ``0:12`` as the ``12s`` of a prompt."""

import re

from flash_vstream.models.prompts import stamp
from flash_vstream.timecode import parse_time

_UP_TO_TEN = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: number for number, word in enumerate(_UP_TO_TEN, 1)}
_NUMBERS |= {"a": 1, "an": 1, "twenty": 20, "thirty": 30, "sixty": 60}
_UNIT = r"\s?(?:s|secs?|seconds?|mins?|minutes?|hours?)|m|h"
_AMOUNT = re.compile(  # but not "a second dog", or "3 m high"
    rf"\b(?!(?:a|one) second\b(?! ago))(\d+(?:\.\d+)?|(?:{'|'.join(_NUMBERS)})\b)({_UNIT})\b", re.IGNORECASE
)
_LAST_UNIT = re.compile(r"\b(last|past) (second|minute|hour)\b", re.IGNORECASE)
_CLOCK = re.compile(r"\b\d+:[0-5]\d(?::[0-5]\d)?\b(?! ?[ap]\.?m\b)", re.IGNORECASE)
_AGO = re.compile(r"\b(?:(at|since|from) )?(?:about |around )?(\d+)s ago\b", re.IGNORECASE)
_WINDOWS = tuple(
    re.compile(rf",? ?\b(?:{pattern})\b", re.IGNORECASE)
    for pattern in (
        r"(?:in|during|over|within|for) the (?:last|past) (?P<last>\d+)s",
        r"since (?P<since>\d+)s",
        r"(?:between|from) (?P<begin>\d+)s (?:and|to|until|till) (?P<end>\d+)s",
    )
)


def in_stream_times(question: str, now: float) -> str:
    """The question with its times as the language model reads them; ``now`` is the stream's, in seconds.

    >>> in_stream_times("What happened ten seconds ago?", 31.0)
    'What happened at 21s?'
    >>> in_stream_times("What was there at 1:05?", 90.0)
    'What was there at 65s?'
    """
    text = _LAST_UNIT.sub(r"\1 1 \2", question)
    text = _AMOUNT.sub(lambda match: stamp(_seconds(*match.groups())), text)
    text = _CLOCK.sub(lambda match: stamp(parse_time(match[0])), text)
    return _AGO.sub(lambda match: f"{match[1] or 'at'} {stamp(max(0.0, now - int(match[2])))}", text)


def split_window(question: str, now: float) -> tuple[str, tuple[float, float] | None]:
    """A question in stream times without the stretch of time that it names, and that stretch; None if it names none.

    >>> split_window("What happened in the last 5s?", 31.0)
    ('What happened?', (26.0, 31.0))
    """
    for pattern in _WINDOWS:
        if match := pattern.search(question):
            named = {name: float(value) for name, value in match.groupdict().items()}
            begin = now - named["last"] if "last" in named else named.get("since", named.get("begin", 0.0))
            rest = question[: match.start()] + question[match.end() :]
            return rest, (max(0.0, begin), named.get("end", now))
    return question, None


def _seconds(number: str, unit: str) -> float:
    return parse_time(f"{_NUMBERS.get(number.lower(), number)}{unit.strip()[0].lower()}")
