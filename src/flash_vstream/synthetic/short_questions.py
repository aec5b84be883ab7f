"""Questions with short answers about an annotated picture or clip.

An annotation brings three such questions. More follow from what it lists: the colors and numbers of its objects, the
place, the number of people, and for clips the action.
"""

import random
import re
from collections.abc import Sequence

from flash_vstream.models.short_answers import without_article
from flash_vstream.synthetic.annotations import (
    MANY_PEOPLE,
    Annotation,
    head_noun,
    is_person,
    is_plural,
    without_complements,
)
from flash_vstream.synthetic.captions import sentence
from flash_vstream.synthetic.questions import NOW, Turn

COLORS = frozenset(
    "white black red blue green yellow orange pink brown gray grey purple tan beige gold silver blond".split()  # noqa: SIM905
)
_NUMBER_NAMES = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "many")
_NUMBERS = {str(number): name for number, name in enumerate(_NUMBER_NAMES[:11])} | {
    name: name for name in _NUMBER_NAMES[1:]
}
WHERE = (
    "Where is this?",
    "What place is this?",
    "What kind of place is this?",
    "Where are you?",
    "What kind of place do you see?",
)
HOW_MANY_PEOPLE = (
    "How many people are there?",
    "How many people do you see?",
    "How many people can be seen?",
    "How many persons are in the picture?",
    "How many people are visible?",
)
ACTION = (
    "What is the person doing?",
    "What are they doing?",
    "What action is this?",
    "What is being done?",
    "What activity is shown?",
)


def number_name(count: int) -> str:
    """A count as an answer says it: ``"none"``, ``"two"``, ``"many"`` from eleven on."""
    return _NUMBER_NAMES[min(count, MANY_PEOPLE)] if count else "none"


def action_name(action: str) -> str:
    """UCF101's class as a phrase: ``"ApplyLipstick"`` is ``"applying lipstick"``."""
    words = [word.lower() for word in re.findall(r"[A-Z][a-z]*", action)]
    return " ".join([_VERBS.get(words[0], words[0]), *words[1:]])


_VERBS = {"apply": "applying", "blow": "blowing", "clean": "cleaning"}


def short_questions(annotation: Annotation, rng: random.Random) -> list[tuple[str, str]]:
    """Questions with short answers, without capitals and articles, in no particular order."""
    pairs = [(question, short_answer(answer)) for question, answer in annotation.qa]
    if annotation.place != "unknown":
        pairs.append((rng.choice(WHERE), short_answer(annotation.place)))
    pairs.append((rng.choice(HOW_MANY_PEOPLE), number_name(annotation.people)))
    if annotation.action is not None:
        pairs.append((rng.choice(ACTION), action_name(annotation.action)))
    for phrase in annotation.objects:
        pairs += object_questions(phrase)
    return pairs


def object_questions(phrase: str) -> Sequence[tuple[str, str]]:
    """Questions about color and number of an object, when its phrase tells them: ``"3 white cups on a tray"``."""
    words = re.findall(r"[a-z0-9'-]+", without_complements(phrase))
    if len(words) < 2 or head_noun(phrase) is None:
        return ()
    noun, pairs = words[-1], []
    plural = is_plural(noun)
    colors = [word for word in words[:-1] if word in COLORS]
    if len(colors) == 1 and not is_person(noun):
        pairs.append((f"What color {'are' if plural else 'is'} the {noun}?", colors[0]))
    if words[0] in _NUMBERS and plural:
        pairs.append((f"How many {noun} are there?", _NUMBERS[words[0]]))
    return pairs


def short_answer(text: str) -> str:
    """An answer in its shortest form: lower case, no full stop, no article."""
    return without_article(text.lower().strip(" ."))


def picture_turns(annotation: Annotation, captions: Sequence[str], rng: random.Random, count: int) -> list[Turn]:
    """What to train on about the picture that is seen: up to two descriptions, and up to ``count`` short questions."""
    different = sorted({*captions, sentence(annotation.caption)})
    described = rng.sample(different, min(2, len(different)))
    short = short_questions(annotation, rng)
    asked = rng.sample(short, min(count, len(short)))
    answered = [Turn(question, (sentence(answer),)) for question, answer in asked]
    return [Turn(rng.choice(NOW), tuple(described)), *answered]
