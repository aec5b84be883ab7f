"""Human-readable stream times (``1:05``)."""

import re

from flash_vstream.errors import UserError


def parse_time(text: str) -> float:
    """Seconds in ``"35"``, ``"35s"``, ``"2m"``, ``"1:05"`` (also ``"90:30"``) or ``"1:02:03.5"``.

    Raises ``UserError`` for anything else.
    """
    text = text.strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", text):
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 1}[match[2]]
    if re.fullmatch(r"\d+(:[0-5]?\d)?:[0-5]\d(\.\d+)?", text):
        seconds = 0.0
        for part in text.split(":"):
            seconds = seconds * 60 + float(part)
        return seconds
    raise UserError(f"{text!r} is not a time; write it as 35s, 2m or 1:05")


def format_time(seconds: float) -> str:
    """Whole seconds, cut off as in a model's answers: ``"35 s"`` below a minute, ``"1:05"`` or ``"1:02:03"`` above."""
    minutes, rest = divmod(int(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
