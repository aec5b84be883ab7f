"""Annotated pictures: what is in them, how many people, where it is, and short questions with answers.

One JSON object a line, with ``image`` (or ``clip``), ``caption``, ``short``, ``place``, ``people`` (0 to 10 or "many"),
``objects`` and ``qa``. A picture's *things* are the nouns that its texts name, in the singular and under one name for
each kind of thing. Annotations are not exhaustive: a thing that no text names may still be there.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from flash_vstream.errors import UserError
from flash_vstream.models.sight import PERSON

MANY_PEOPLE = 11
"""The count that "many" stands for."""


@dataclass(frozen=True)
class Annotation:
    """What is known of one picture or clip.

    ``people`` is their number, ``MANY_PEOPLE`` for a crowd. ``action`` is given for clips alone.
    """

    key: str
    caption: str
    short: str
    place: str
    people: int
    objects: tuple[str, ...]
    qa: tuple[tuple[str, str], ...]
    action: str | None = None

    @property
    def texts(self) -> list[str]:
        """Everything that names things of the picture."""
        return [self.caption, self.short, self.place, *self.objects, *(text for pair in self.qa for text in pair)]


def read_annotations(path: Path) -> dict[str, Annotation]:
    """The annotations of a JSON-lines file by key; raises ``UserError`` that names a line it cannot read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read annotations from {path} ({error})") from None
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            annotation = _annotation(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}, is no annotation ({type(error).__name__}: {error})") from None
        found[annotation.key] = annotation
    return found


def _annotation(row: dict[str, Any]) -> Annotation:
    return Annotation(
        key=str(row.get("image") or row["clip"]),
        caption=str(row["caption"]),
        short=str(row["short"]),
        place=str(row["place"]),
        people=MANY_PEOPLE if row["people"] == "many" else int(row["people"]),
        objects=tuple(map(str, row["objects"])),
        qa=tuple((str(question), str(answer)) for question, answer in row["qa"]),
        action=row.get("action"),
    )


@functools.cache
def _nouns() -> dict[str, Any]:
    """The word lists of ``nouns.yaml``: strings as sets of words."""
    lists = yaml.safe_load((files("flash_vstream.synthetic") / "nouns.yaml").read_text())
    kinds = {kind: frozenset(members.split()) for kind, members in lists.pop("kinds").items()}
    synonyms = lists.pop("synonyms")
    return {name: frozenset(words.split()) for name, words in lists.items()} | {"kinds": kinds, "synonyms": synonyms}


@functools.cache
def _inflect() -> Any:
    try:
        import inflect
    except ImportError:
        raise UserError("annotated pictures need the package inflect; install flash-vstream[train]") from None
    return inflect.engine()


@functools.lru_cache(maxsize=65536)
def thing(word: str) -> str:
    """The one name under which a noun is counted: in lower case, singular, the usual one of its synonyms."""
    word = word.lower()
    if word not in _nouns()["invariant"] and not word.endswith("ss"):
        word = _inflect().singular_noun(word) or word
    return str(_nouns()["synonyms"].get(word, word))


def participle(verb: str) -> str:
    """The present participle of a verb in the third person: ``"rides"`` is ``"riding"``."""
    return str(_inflect().present_participle(verb))


def is_person(word: str) -> bool:
    """Whether a noun names people."""
    return word.lower() in _nouns()["people"] or thing(word) in _nouns()["people"]


def is_plural(phrase: str) -> bool:
    """Whether a noun phrase is in the plural: ``"white cups on a tray"``."""
    noun = _head(phrase)
    regular = noun.endswith("s") and not noun.endswith("ss") and noun not in _nouns()["singular_in_s"]
    return regular or noun in ("people", "men", "women", "children")


def article(phrase: str) -> str:
    """``"a dog"``, ``"an umbrella"``, ``"grass"``: a noun phrase as a question about its presence names it."""
    noun = _head(phrase)
    if noun in _nouns()["uncountable"] or is_plural(phrase) or noun.endswith("ing") or not phrase[0].isalpha():
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def head_noun(phrase: str) -> str | None:
    """The thing that an object phrase is about: ``"white coffee cups on a tray"`` is about a cup."""
    noun = _head(phrase)
    return thing(noun) if noun and noun not in _nouns()["not_things"] else None


def without_complements(phrase: str) -> str:
    """An object phrase up to its first preposition, in lower case: ``"white cups "`` of ``"white cups on a tray"``."""
    return re.split(r"\b(?:of|on|in|with|at|under|behind|near|from|beside|for|over|and)\b", phrase.lower())[0]


def _head(phrase: str) -> str:
    words = re.findall(r"[a-z][a-z'-]*", without_complements(phrase)) or re.findall(r"[a-z][a-z'-]*", phrase.lower())
    return words[-1] if words else ""


def things_in(texts: Iterable[str], known: Collection[str]) -> set[str]:
    """Which of the ``known`` things texts name, with the kinds that they belong to."""
    words = {word for text in texts for word in re.findall(r"[A-Za-z][A-Za-z'-]*", text)}
    named = {thing(word) for word in words}
    if any(is_person(word) for word in words):
        named.add(PERSON)
    named |= {kind for kind, members in _nouns()["kinds"].items() if named & members}
    return named & set(known)


def frequent_things(annotations: Iterable[Annotation], least: int) -> list[str]:
    """Things that head object phrases of at least ``least`` pictures, the most frequent first."""
    counts = Counter(name for a in annotations for name in {head_noun(phrase) for phrase in a.objects} if name)
    return sorted((name for name, count in counts.items() if count >= least), key=lambda name: (-counts[name], name))


def wordings(things: Sequence[str]) -> dict[str, int]:
    """Plurals and synonyms, in lower case, to the numbers of ``things``."""
    number = {name: i for i, name in enumerate(things)}
    found = {_plural(name): i for name, i in number.items()}
    for word, name in _nouns()["synonyms"].items():
        if name in number:
            found[word] = found[_plural(word)] = number[name]
    if PERSON in number:
        people = ("people", "anyone", "anybody", "someone", "somebody", "everyone", "human", "humans", "persons")
        found |= dict.fromkeys(people, number[PERSON])
    return {word: i for word, i in found.items() if word not in number}


def _plural(noun: str) -> str:
    return noun if noun in _nouns()["invariant"] else str(_inflect().plural_noun(noun))
