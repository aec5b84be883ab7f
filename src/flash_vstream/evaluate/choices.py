"""Which option a reply chose. A reply that cannot be read is an abstention, never a guess."""

import re
from collections.abc import Sequence

from flash_vstream.evaluate.items import LETTERS

_OPENING = re.compile(r"^[\s\"'`*_\[({<]*([A-Ha-h])\s*(?:[])}>\"'`*_]|[.):,;](?!\w)|$|\n|\s-\s)")
_NAMED = re.compile(
    r"\b(?:answer|option|choice|choose|select|pick|letter|one)(?:ed|s)?\b"
    r"(?:\s+(?:is|was|would be|should be|option|choice|letter|the))*"
    r"\s*[:=-]?\s*[\"'`*_\[({<]*([A-H])(?![A-Za-z'])",
    re.IGNORECASE,
)
_SEVERAL = re.compile(r"(?<![A-Za-z])[A-H]\W{0,3}\s*(?:or|and|/|,|&)\s*\W{0,3}[A-H](?![A-Za-z'])")
_BRACKETED = re.compile(r"[(\[{]\s*([A-H])\s*[)\]}]")
_ALONE = re.compile(r"(?<![A-Za-z'])([B-H])(?![A-Za-z'])")


def parse_choice(reply: str, choices: Sequence[str]) -> int | None:
    """The index of the option that ``reply`` chose, None when it chose none or several.

    Read in this order: a letter that opens the reply, a letter named as the answer, one letter in
    brackets, the text of exactly one option, one capital letter standing alone (not ``A``, which
    is an article).
    """
    text = reply.strip()
    valid = LETTERS[: len(choices)]
    if _SEVERAL.search(text):
        return None
    if match := _OPENING.match(text):
        letter = match[1].upper()
        return valid.index(letter) if letter in valid else None
    for pattern in (_NAMED, _BRACKETED):
        named = {letter.upper() for letter in pattern.findall(text)}
        if named:
            return valid.index(named.pop()) if len(named) == 1 and named <= set(valid) else None
    if (said := _by_text(text, choices)) is not None:
        return said
    alone = set(_ALONE.findall(text)) & set(valid)
    return valid.index(alone.pop()) if len(alone) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _by_text(text: str, choices: Sequence[str]) -> int | None:
    """The one option whose words stand in the reply; of options within options, the longest."""
    reply = f" {_plain(text)} "
    found = [i for i, choice in enumerate(choices) if _plain(choice) and f" {_plain(choice)} " in reply]
    whole = [
        i for i in found if not any(i != j and f" {_plain(choices[i])} " in f" {_plain(choices[j])} " for j in found)
    ]
    return whole[0] if len(whole) == 1 else None


def letter_bias(chosen: Sequence[int | None], correct: Sequence[int]) -> dict[str, dict[str, float]]:
    """For each letter how often it was chosen and how often it was right, as shares."""
    letters = sorted({i for i in [*chosen, *correct] if i is not None})
    total = max(1, len(correct))
    return {LETTERS[i]: {"chosen": chosen.count(i) / total, "right": correct.count(i) / total} for i in letters}
