"""Compare short texts in any script: words, word overlap, and yes or no."""

import unicodedata
from collections import Counter
from collections.abc import Set

import regex

ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {name: str(number) for number, name in enumerate(_NUMBER_NAMES)}
# Scripts without spaces between words are compared character by character.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
    rf"[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+(?:'[[\p{{L}}\p{{M}}]--[{_UNSPACED}]]+)?",
    regex.V1,
)
# Optional in Arabic and Hebrew: vowel points, and the tatweel that stretches words.
_OPTIONAL_MARKS = regex.compile(r"[\u0591-\u05C7\u0640\u064B-\u0652\u0670]")
_YES = ("yes", "yeah", "yep", "是的", "是", "对", "はい", "네", "예", "نعم", "да")
_NO = ("no", "nope", "nah", "不是", "不对", "不", "いいえ", "아니요", "아니오", "لا", "нет")
# "No parking" and "No one" do not answer a yes/no question; "No there is not" does.
_AFTER_NO = "i|you|he|she|it|we|they|there|this|that|these|those|the|not|because|never|sorry"
_SAID = regex.compile(
    rf"[^\p{{L}}\p{{N}}]*(?:(?P<yes>{'|'.join(_YES)})(?![\p{{L}}\p{{M}}\p{{N}}])"
    rf"|(?P<no>{'|'.join(_NO)})(?:\s*(?:$|[^\s\p{{L}}\p{{M}}\p{{N}}])|\s+(?:{_AFTER_NO})\b))"
)


def fold(text: str) -> str:
    """Normalize ``text`` with NFKC and case folding, and remove optional vowel points."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return str(_OPTIONAL_MARKS.sub("", folded.replace("’", "'")))  # noqa: RUF001 - typographic apostrophe


def words(text: str, ignored: Set[str] = ARTICLES) -> list[str]:
    """The folded words of a text or, in scripts without spaces, its characters.

    Number words up to ten become digits. Words in ``ignored`` are left out unless nothing else
    remains. Text that is only punctuation has no words.
    """
    found = [_NUMBERS.get(word, word) for word in _WORD.findall(fold(text))]
    return [word for word in found if word not in ignored] or found


def word_f1(text: str, other: str, ignored: Set[str] = ARTICLES) -> float:
    """Word F1 of two texts, 0 to 1, as SQuAD scores answers.

    Two texts without any words score 1.
    """
    first, second = Counter(words(text, ignored)), Counter(words(other, ignored))
    shared = (first & second).total()
    if not shared:
        return float(first == second)
    return 2 * shared / (first.total() + second.total())


def yes_or_no(text: str) -> str | None:
    """``"yes"`` or ``"no"`` when a text starts with it, otherwise None.

    A "no" that qualifies the next word, as in "No parking", does not count.
    """
    match = _SAID.match(fold(text))
    return None if match is None else "yes" if match["yes"] else "no"
