"""Parse which option a reply chose. An unreadable reply is an abstention, never a guess."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flash_vstream.evaluate.items import LETTERS
from flash_vstream.synthetic.texts import fold, words

MASK = "\0"
"""Replaces option texts before the search for letters, so that their words are not read as letters."""
LONG = 4
"""Options of at least this many words are recognised anywhere in a reply; shorter ones must stand alone."""

_OPENERS = r"[\s\"'`*_\[({<]*"
# A letter at the start of the reply, marked as one: "B", "(b)", "B. …", "B - …", "**B**".
_OPENING = re.compile(rf"^{_OPENERS}([A-Ha-h])(?:[])}}>\"*_`]|'(?!\w)|[.):;](?!\w)|\s*(?:$|\n|{MASK}|\s[-–—]\s))")  # noqa: RUF001
_OPENING_WITH_COMMA = re.compile(rf"^{_OPENERS}([A-Ha-h]),(?!\w)")
# A named letter must be followed by the end of a clause, a reason, or its option's text.
_LETTER_ENDS = rf"(?=[\"'`*_\])}}>]*\s*(?:$|[.,;:!?\n]|{MASK}|(?:because|since|as|or|and)\b))"
_FILLERS = r"(?:\s+(?:is|was|would be|should be|must be|it'?s|it is|that|one|option|choice|letter|the|answer))*"
_NAMED = re.compile(
    r"\b(?:answer|option|choice|choose|chose|select|selected|pick|picked|letter|(?:best|correct|right) one|say|think"
    rf"|guess|believe|go with)\b{_FILLERS}\s*[:=-]?\s*{_OPENERS}([A-H])(?![A-Za-z0-9]|'[a-z]){_LETTER_ENDS}",
    re.IGNORECASE,
)
_TITLED = re.compile(r"\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer) ([B-H])(?![\w'])")
_BRACKETED = re.compile(r"[(\[{]\s*([A-H])\s*[)\]}]")
# A letter that begins a line or a clause as an option's label does: "A. …", "(b) …".
_LABEL = re.compile(rf"(?:^|[\n.,;!?]|{MASK}){_OPENERS}(?:([A-H])[])}}.:]|([a-h])[])}}])")
_SEVERAL = re.compile(r"(?<![A-Za-z])[A-H]\W{0,3}\s*(?:\b(?:or|and)\b|/|,|&)\s*\W{0,3}[A-H](?![A-Za-z'])")
_DENIED = re.compile(
    r"\b(?:not|isn't|never|nor|neither|without|than|instead of|except)\s+"
    r"(?:(?:option|choice|letter|the|answer)\s+)*[(\[{]?[A-H]\b"
    r"|(?<![A-Za-z])[A-H][)\]}.]?\s+(?:is|was|isn't|wasn't)\s*(?:not\b|wrong|incorrect|false|out\b)"
)
_CLAUSE_END = re.compile(r"[!?;\n]|[.,:…](?!\d)|\s[-–—]\s|\b(?=but\b)", re.IGNORECASE)  # noqa: RUF001
_NEGATION_WORDS = (
    "not no never neither nor without except cannot isn't aren't wasn't weren't don't doesn't didn't can't"
)
_COPULA_WORDS = "is are was were be it's that's they're he's she's there's"
_LEAD_IN_WORDS = (
    "i i'd think believe guess say would could should might may must see clearly probably likely maybe surely it this"
    " that these those they he she there here answer option choice correct right best shows show seems looks like to"
    " so and in on video picture image scene seen shown final my our but"
)
_NEGATIONS = frozenset(_NEGATION_WORDS.split())
_COPULAS = frozenset(_COPULA_WORDS.split())
_LEAD_IN = _COPULAS | frozenset(_LEAD_IN_WORDS.split())


@dataclass(frozen=True)
class Reading:
    """The chosen option and the rule that matched: ``letter``, ``named``, ``text``, ``truncated text`` or ``none``."""

    index: int | None
    rule: str


ABSTAINED = Reading(None, "none")


def read_choice(reply: str, choices: Sequence[str]) -> Reading:
    """Parse a reply with the first rule that matches; it abstains when the reply chose none or several.

    1. a bare letter
    2. exactly one option's text, or the beginning of it when the reply was truncated
    3. a letter at the start of the reply
    4. a letter named or bracketed as the answer
    5. the text of exactly one option within the reply, neither denied nor part of a longer phrase

    Letters inside option texts do not count ("C is cooking", "a man picked a card").
    """
    text = reply.strip()
    if bare := re.fullmatch(r"\W*([A-Ha-h])\W*", text):
        return _chosen({bare[1]}, choices, "letter")
    exact = [i for i, choice in enumerate(choices) if text and fold(text) == fold(choice.strip())]
    if len(exact) == 1:
        return Reading(exact[0], "text")
    if _OPENING.match(text) is None:
        said = words(text)
        if whole := [i for i, choice in enumerate(choices) if said and words(choice) == said]:
            return Reading(whole[0], "text") if len(whole) == 1 else ABSTAINED
        said = words(text, frozenset())  # keep articles: the truncated last word may be part of one
        if cut := [i for i, choice in enumerate(choices) if len(said) >= LONG and _starts(choice, said)]:
            return Reading(cut[0], "truncated text") if len(cut) == 1 else ABSTAINED
    if (lettered := _by_letter(text, choices)) is not None:
        return lettered
    stated = _by_text(text, choices)
    return ABSTAINED if stated is None else Reading(stated, "text")


def _starts(choice: str, reply: list[str]) -> bool:
    """Whether an option starts with the words of ``reply``, the last of which may be truncated."""
    option, last = words(choice, frozenset()), len(reply) - 1
    return len(option) > last and option[:last] == reply[:last] and option[last].startswith(reply[last])


def _by_letter(text: str, choices: Sequence[str]) -> Reading | None:
    """The reading of a letter that the reply gives as its answer; None when there is none."""
    masked = _mask_options(text, choices)
    if _SEVERAL.search(masked):
        return ABSTAINED
    masked = _DENIED.sub(" ", masked)
    # If options refer to a person by a letter (EgoSchema's "C"), that letter before a comma is not an answer.
    names = {name.upper() for choice in choices for name in re.findall(r"(?<![\w'])([B-Hb-h])(?!\w)", choice)}
    # A reply that lists the options begins with one that it does not choose.
    labels = {(label[1] or label[2]).upper() for label in _LABEL.finditer(masked)}
    is_list = len(labels.union(_BRACKETED.findall(masked))) > 1
    opening = None if is_list else _OPENING.match(masked)
    comma = None if is_list else _OPENING_WITH_COMMA.match(masked)
    if opening is None and comma is not None and comma[1].upper() not in names:
        opening = comma
    if opening is not None:
        reading = _chosen({opening[1]}, choices, "letter")
        rest = words(text[opening.end() :])
        same = [i for i, choice in enumerate(choices) if rest and words(choice) == rest]
        return ABSTAINED if same and reading.index not in same else reading
    for pattern in (_NAMED, _TITLED, _BRACKETED):
        found = list(pattern.finditer(masked))
        named = {match[1] for match in found if not _is_denied(masked[: match.start()])}
        if pattern is _BRACKETED and named:  # "(A) No (B) Yes" denies nothing
            named = {match[1] for match in found}
        if named:
            return _chosen(named, choices, "named")
    plain = _DENIED.sub(" ", text)
    paired = {LETTERS[i] for i, choice in enumerate(choices) if words(choice) and _pair(i, choice).search(plain)}
    return _chosen(paired, choices, "named") if paired else None


def _is_denied(before: str) -> bool:
    """Whether the clause that ``before`` ends with denies what follows: "I don't think it is …"."""
    return bool(_NEGATIONS & set(words(re.split(r"\bso\b", _CLAUSE_END.split(before)[-1])[-1])))


def _chosen(letters: set[str], choices: Sequence[str], rule: str) -> Reading:
    """The option for the single letter in ``letters``, which are spelled as in the reply.

    A letter that is also the whole text of another option ("a" among "c", "a", "t") is an abstention.
    """
    valid = LETTERS[: len(choices)]
    found = {letter.upper() for letter in letters}
    if len(found) != 1 or not found <= set(valid):
        return ABSTAINED
    index = valid.index(min(found))
    others = {choice.strip(" .()") for i, choice in enumerate(choices) if i != index}
    return ABSTAINED if letters & others else Reading(index, rule)


def _pair(index: int, choice: str) -> re.Pattern[str]:
    """Matches a letter directly followed by its own option's text at the end of a clause."""
    text = r"\W+".join(map(re.escape, re.findall(r"\w+", choice)))
    return re.compile(rf"(?<!\w){LETTERS[index]}[\W_]+{text}(?=\W*(?:$|[.,;!?\n]))", re.IGNORECASE)


def _mask_options(text: str, choices: Sequence[str]) -> str:
    """Replace every option text of two or more words in ``text`` by ``MASK``, longest first."""
    for choice in sorted(choices, key=len, reverse=True):
        parts = re.findall(r"\w+", choice)
        if len(parts) > 1:
            text = re.sub(r"(?<!\w)" + r"\W+".join(map(re.escape, parts)) + r"(?!\w)", MASK, text, flags=re.IGNORECASE)
    return text


@dataclass(frozen=True)
class _Word:
    """A word of a reply and the number of its clause."""

    text: str
    clause: int


def _by_text(text: str, choices: Sequence[str]) -> int | None:
    """The one option whose text the reply states; when options contain each other, the longest."""
    reply = [
        _Word(word, number) for number, clause in enumerate(_CLAUSE_END.split(fold(text))) for word in words(clause)
    ]
    options = [words(choice) for choice in choices]
    found = {i: places for i, option in enumerate(options) if option and (places := _places(reply, option))}
    covered = {
        i: [place for place in places if not any(_covers(found, options, j, i, place) for j in found if j != i)]
        for i, places in found.items()
    }
    stated = [i for i, places in covered.items() if any(_is_stated(reply, place, options[i]) for place in places)]
    return stated[0] if len(stated) == 1 else None


def _places(reply: Sequence[_Word], option: Sequence[str]) -> list[int]:
    texts = [word.text for word in reply]
    return [at for at in range(len(texts) - len(option) + 1) if texts[at : at + len(option)] == list(option)]


def _covers(found: dict[int, list[int]], options: list[list[str]], longer: int, shorter: int, place: int) -> bool:
    """Whether an occurrence of a longer option contains the shorter one at ``place``."""
    end = place + len(options[shorter])
    return len(options[longer]) > len(options[shorter]) and any(
        at <= place and end <= at + len(options[longer]) for at in found[longer]
    )


def _is_stated(reply: Sequence[_Word], place: int, option: Sequence[str]) -> bool:
    """Whether the reply states the option at ``place``, rather than denying it or using it in another phrase."""
    end = place + len(option)
    before = [word.text for word in reply[:place] if word.clause == reply[place].clause]
    if _NEGATIONS & set(before) or before[-2:] in (["rather", "than"], ["instead", "of"], ["other", "than"]):
        return False
    if len(option) >= LONG:
        return True
    ends = end == len(reply) or reply[end].clause != reply[end - 1].clause
    after_copula = bool(before) and before[-1] in _COPULAS
    if after_copula and all(word.isdigit() for word in option):
        return True  # "there are 3 people"
    return ends and (after_copula or set(before) <= _LEAD_IN)


def letter_bias(chosen: Sequence[int | None], correct: Sequence[int]) -> dict[str, dict[str, float]]:
    """For each letter, the shares of questions where it was chosen and where it was right."""
    letters = sorted({i for i in [*chosen, *correct] if i is not None})
    total = max(1, len(correct))
    return {LETTERS[i]: {"chosen": chosen.count(i) / total, "right": correct.count(i) / total} for i in letters}
