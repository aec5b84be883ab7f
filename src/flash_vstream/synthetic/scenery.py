"""Inside or outside, day or night, and verbs: what closed questions need to know of words (``scenery.yaml``)."""

import functools
import re
from importlib.resources import files

import yaml

from flash_vstream.synthetic.annotations import Annotation, participle

IS_INSIDE = ("Is this {x}?", "Are we {x}?", "Is it {x}?", "Was this picture taken {x}?", "Does this happen {x}?")
INSIDE_WORDS = ("inside", "indoors", "in a room", "in a building")
OUTSIDE_WORDS = ("outside", "outdoors", "outdoors", "out in the open")
INSIDE_OR_OUTSIDE = (("indoors", "outdoors"), ("inside", "outside"))
NIGHT_WORDS = ("night", "dark", "nighttime", "dark outside", "night now")
DAY_WORDS = ("day", "daytime", "light outside", "bright", "daytime now")
DAY_OR_NIGHT = (("day", "night"), ("daytime", "nighttime"), ("light", "dark"))
EMPTY = ("Is this place empty?", "Is the place empty?", "Is nobody there?", "Is there nobody?", "Is it deserted?")
SEVERAL = ("Is there more than one person?", "Are there several people?", "Are there at least two people?")
ALONE = ("Is there only one person?", "Is somebody alone?", "Is the person alone?")
CROWD = ("Is there a crowd?", "Is it crowded?", "Are there many people?", "Are there a lot of people?")
ANYTHING = ("Is there anything {x}?", "Is there something {x}?", "Do you see anything {x}?", "Is anything {x}?")


@functools.cache
def _words() -> dict[str, frozenset[str]]:
    lists = yaml.safe_load((files("flash_vstream.synthetic") / "scenery.yaml").read_text())
    return {name: frozenset(words.split()) for name, words in lists.items()}


def _third_person(verb: str) -> str:
    if re.search(r"(?:s|x|z|ch|sh)$", verb):
        return verb + "es"
    return re.sub(r"([^aeiou])y$", r"\1ie", verb) + "s"


@functools.cache
def verbs() -> dict[str, str]:
    """The present participles of verbs in the forms that captions have: ``rides`` and ``ride`` are ``riding``."""
    third = {verb: _third_person(verb) for verb in sorted(_words()["verbs"])}
    return {form: participle(third[verb]) for verb in third for form in (verb, third[verb])}


def is_inside(annotation: Annotation) -> bool | None:
    """Whether a picture was taken inside; None if its place does not tell."""
    words = set(re.findall(r"[a-z]+", annotation.place.lower()))
    if words & {"indoor", "indoors", "inside", "interior"}:
        return True
    if words & {"outdoor", "outdoors", "outside"}:
        return False
    inside, outside = bool(words & _words()["inside"]), bool(words & _words()["outside"])
    return inside if inside != outside else None


def is_night(annotation: Annotation) -> bool | None:
    """Whether it is night; None if the annotation does not tell, as inside, or at dusk."""
    words = set(re.findall(r"[a-z]+", " ".join(annotation.texts).lower()))
    if "night" in words:
        return True
    return False if is_inside(annotation) is False and not words & _words()["dark"] else None
