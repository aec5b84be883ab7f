"""Questions about things that are not there: ``What color is the car?`` of a street without one.

Asked so, short answers name a color all the same, since their network has only learned questions about what its
pictures show. Sight knows whether there is a car. It must be rather sure, since a false "There is no car." is worse
than a wrong color: on COCO's 613 validation pictures it objects to 2.2% of the annotations' own questions, most of
which would be answered wrongly, and to 76% of those with a thing when they are asked about another picture, of which no
text names that thing.
"""

import re

from torch import Tensor

from flash_vstream.models.sight import PERSON, Sight

SURE = 1.5
"""How far a thing's logit must be below what sight needs for it to be surely absent.

Of people, and of animals of any kind, sight is sure enough below that.
"""
_WORD = re.compile(r"[a-z]+")
_PEOPLE = frozenset(
    _WORD.findall("""
    man woman boy girl child baby toddler player rider skateboarder skier surfer snowboarder cyclist hiker swimmer
    climber batter catcher pitcher pedestrian runner spectator biker umpire referee adult worker bride officer skater
    passenger driver kayaker dancer performer goalkeeper jockey racer
    """)
)
_GROUPS = ("crowd", "family", "team", "couple", "group of people", "crowd of people", "two people", "many people")
_ANIMALS = ("dog", "cat", "horse", "cow", "sheep", "elephant", "giraffe", "zebra", "bear", "bird", "pigeon")
_VEHICLES = ("car", "bus", "truck", "van", "train", "bicycle", "motorcycle", "scooter", "boat", "airplane")
_KINDS = {"animal": _ANIMALS, "vehicle": _VEHICLES} | dict.fromkeys(_PEOPLE, (PERSON,))
"""What else confirms a thing: a dog confirms an animal, and anybody confirms a man."""
_UNCERTAIN = frozenset(
    _WORD.findall("""
    photo screen frame line number letter object piece cover edge control stand can tan group view top back side
    figure text caption surface section block patch reflection shadow light lighting
    hand arm leg foot head face eye mouth nose ear neck chest lip tongue tail hair skin
    food fruit furniture toy clothes clothing outfit equipment machine drink vegetable meat structure building
    """)
)
"""Things that a question may name although no annotation would, or in another sense."""
_PHRASE = r"((?:(?!(?:of|in|on|at|with|from|to|by|the|a|an|and|or|is|are|was|were)\b)[a-z'-]+ ?){1,3})"
_DEFINITE = re.compile(rf"\bthe {_PHRASE}(?! ?of\b)", re.IGNORECASE)
_KIND = re.compile(
    r"\W*(?:what|which) (?:(?:kinds?|types?|sorts?) of )?([a-z'-]+) (?:(?:do|can|did) (?:you|we|i) see|"
    r"(?:is|are|was|were) (?:this|that|these|those|it|they|there|shown|visible))\b",
    re.IGNORECASE,
)
_SOMEBODY = re.compile(r"\b(?:he|she|him|her|his|who (?:is|are|was|were|do|did|can))\b|^\W*who's\b", re.IGNORECASE)
_NUMBER = re.compile(rf"\W*how many {_PHRASE}(?! ?of\b)", re.IGNORECASE)


def presupposed(question: str, sight: Sight) -> list[tuple[int, str]]:
    """The things that a question takes to be there: sight's number of each, and the noun that names it.

    They are those with the definite article, as far as sight knows them, that whose kind or number is asked for, and
    somebody where he or she is spoken of, or who is asked. Not the number of people, which may be none.
    """
    phrases = [match[1] for pattern in (_KIND, _DEFINITE) for match in pattern.finditer(question)]
    found = [_named(phrase.split(), sight) for phrase in phrases]
    counted = _NUMBER.match(question)
    if counted and (one := _named(counted[1].split(), sight)) is not None and sight.names[one[0]] != PERSON:
        found.append(one)
    if _SOMEBODY.search(question) and (person := sight.find(PERSON)) is not None:
        found.append((person, PERSON))
    return [one for one in found if one is not None and sight.names[one[0]] not in _UNCERTAIN]


def _named(words: list[str], sight: Sight) -> tuple[int, str] | None:
    """The thing that a noun phrase names, by its last words or, if they are no part of it, by those before."""
    for end in range(len(words), 0, -1):
        for begin in range(end):
            text = " ".join(words[begin:end])
            if (number := sight.find(text)) is not None:
                return number, text
    return None


def kind_logits(things: Tensor, thing: int, sight: Sight) -> Tensor:
    """The logits ``[n]`` of a thing in frames with those of all ``things [n, V]``: the best of its kind."""
    names = (sight.find(name) for name in _KINDS.get(sight.names[thing], ()))
    kind = [thing, *(number for number in names if number is not None)]
    return things[:, kind].amax(1)


def means_people(text: str, sight: Sight) -> bool:
    """Whether a noun phrase means people, by its last word."""
    named = _named(text.split()[-1:], sight)
    return text in _GROUPS or (named is not None and _is_human(sight.names[named[0]]))


def _is_human(name: str) -> bool:
    return name == PERSON or name in _PEOPLE


def doubt(thing: int, sight: Sight) -> float:
    """How far a thing's logit may fall below what sight needs before it counts as absent.

    It is ``SURE``, or 0 for people and animals.
    """
    name = sight.names[thing]
    return 0.0 if _is_human(name) or name in ("animal", *_ANIMALS) else SURE


_SINGULAR_IN_S = frozenset(("bus", "gas", "canvas", "tennis", "iris", "cactus", "octopus", "lens"))


def absence(noun: str) -> str:
    """What is said of a thing that is not there, by the noun that a question names it with."""
    noun = noun.lower()
    if noun in ("person", "people", "persons"):
        return "There is nobody."
    is_plural = (noun.endswith("s") and not noun.endswith("ss")) or noun in ("men", "women", "children")
    is_plural = is_plural and noun.split()[-1] not in _SINGULAR_IN_S
    return f"There {'are' if is_plural else 'is'} no {noun}."
