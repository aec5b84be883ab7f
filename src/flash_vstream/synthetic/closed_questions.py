"""Closed questions about an annotated picture: those answered by yes or no, or by one of two alternatives.

An annotation's own questions are open. With the answer put in, or that of another picture, they are closed: ``What is
the man holding?`` becomes ``Is the man holding a phone?`` or ``Is the man holding a phone or a cup?``. More follow from
objects, place, number of people and caption. A wrong answer is drawn as often as it is right elsewhere, so that nothing
but the picture tells; it never names what the annotation names.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flash_vstream.models.short_answers import NO, YES
from flash_vstream.synthetic import scenery
from flash_vstream.synthetic.annotations import Annotation, article, head_noun, is_person, is_plural, participle, thing
from flash_vstream.synthetic.short_questions import COLORS, number_name, object_questions, short_answer

ANYONE = ("anyone", "somebody", "anybody", "someone", "a person")
_PREPOSITION = r"on|in|at|under|behind|beside|near|next to|above|below|around|across|inside|between|over|against|by"
_POSITION = re.compile(rf"(?:{_PREPOSITION}) |\w+ing ")
_SUBJECT = re.compile(r"(?:the|this|these|that|those|he|she|they|it|people|a|an) ?\b", re.IGNORECASE)
_OPEN_END = re.compile(r"\b(?:\w+ing|of|with|at|on|in|by|to|from)$")
_KIND = re.compile(r"What (?:kind of |type of )?(\w+) (is|are) (.+)\?")
_IT = r"(?:this|these|that|it|shown|visible|pictured|seen)"


@dataclass(frozen=True)
class Fact:
    """Something known of a picture: ``ask`` makes a closed question of an answer, ``answer`` is the right one.

    Facts of one ``kind`` can have each other's answers.
    """

    kind: str
    ask: Callable[[str], str]
    answer: str


def facts(annotation: Annotation) -> Iterator[Fact]:
    """What closed questions can be made of."""
    for question, answer in annotation.qa:
        answer = answer.strip(" .")
        if (fact := _of_open(question, answer[:1].lower() + answer[1:])) is not None:
            yield fact
    for phrase in annotation.objects:
        yield from _of_object(phrase.lower())
    if annotation.place != "unknown":
        yield Fact("place", lambda x: f"Is this {article(x)}?", annotation.place.lower())
    if (event := event_parts(annotation.caption)) is not None:
        subject, predicate = event
        doer = subject.split()[-1]
        yield Fact(f"event of {thing(doer)}", lambda x: f"{_be(subject)} {subject} {x}?", predicate)
        if is_person(doer):
            yield Fact("event", lambda x: f"Is {ANYONE[len(x) % len(ANYONE)]} {x}?", predicate)


def _of_object(phrase: str) -> Iterator[Fact]:
    for question, answer in object_questions(phrase):
        if (fact := _of_open(question, answer)) is not None:
            yield fact
    yield Fact("thing", _is_there, phrase)
    worn = re.match(r"(?:.* )?(\w+) in ((?!front|the|a |an )[\w -]+)$", phrase)
    if worn is not None and is_person(worn[1]):
        yield Fact("worn", lambda x: f"Is anyone wearing {article(x)}?", worn[2])


def _be(subject: str) -> str:
    return "Are" if is_plural(subject) else "Is"


def _is_there(phrase: str) -> str:
    return f"{_be(phrase)} there {article(phrase)}?"


def _of_open(question: str, answer: str) -> Fact | None:
    """A closed form of an open question, None if it has none."""
    color = re.match(r"What color (is|are) (.+)\?", question)
    if color is not None:
        return Fact("color", lambda x: f"{color[1].title()} {color[2]} {x}?", answer)
    count = re.match(r"How many (.+?) are (?:there|visible|shown|in the (?:picture|photo))\?", question)
    if count is not None and answer != "one":
        return Fact("number", lambda x: f"Are there {x} {count[1]}?", answer)
    if question.startswith("What time of day"):
        return Fact("time", lambda x: f"Is it {x}?", answer)
    where = re.match(r"Where (is|are) (.+)\?", question)
    if where is not None and re.match(rf"(?:{_PREPOSITION})\b", answer):
        return Fact("where", lambda x: f"{where[1].title()} {where[2]} {x}?", answer)
    deed = re.match(r"What (covers|hangs|stands|lies|surrounds|fills|grows|lines) (.+)\?", question)
    if deed is not None:
        return Fact(deed[1], lambda x: f"{_be(x)} there {x} {participle(deed[1])} {deed[2]}?", answer)
    kind = _KIND.match(question)
    if kind is not None and kind[1] not in ("color", "time", "number", "word", "words", "letters", "name"):
        return _of_rest(kind[1], kind[2].title(), kind[3], answer)
    plain = re.match(r"What (is|are) (.+)\?", question)
    return None if plain is None else _of_rest("", plain[1].title(), plain[2], answer)


def _of_rest(kind: str, be: str, rest: str, answer: str) -> Fact | None:
    """A closed form of ``What kind is rest?``."""
    if re.fullmatch(_IT, rest):
        it = "these" if be == "Are" else "this"
        return Fact(f"{kind} this", lambda x: f"{be} {it} {x}?", answer)
    if _SUBJECT.match(rest):
        doing = rest.endswith(" doing")
        if doing and not re.match(r"\w+ing\b", answer):
            return None
        rest = rest.removesuffix(" doing")
        if not doing and not _OPEN_END.search(rest):
            return None
        return Fact("doing" if doing else rest.split()[-1], lambda x: f"{be} {rest} {x}?", answer)
    if _POSITION.match(rest):
        return Fact(rest.split()[0], lambda x: f"{_be(x)} there {x} {rest}?", answer)
    return None


def event_parts(caption: str) -> tuple[str, str] | None:
    """Subject and predicate of a caption, as ``a man`` and ``riding a bicycle`` of ``A man rides a bicycle.``.

    None if it has no verb that a caption usually has.
    """
    words = caption.rstrip(".").split()
    at = next((i for i in range(1, len(words)) if _is_verb(words[i], words[i - 1])), None)
    if at is None:
        return None
    subject = re.split(r"\b(?:in|with|on|at|of|and|near)\b|,", " ".join(words[:at]))[0].split()
    rest = re.split(r"\b(?:while|as|and|with|near|beside|behind)\b|,", " ".join(words[at + 1 :]))[0].split()[:5]
    while rest and rest[-1] in _DANGLING:
        rest.pop()
    if not subject:
        return None
    verb = scenery.verbs()[words[at].lower()]
    return " ".join([subject[0].lower(), *subject[1:]]), " ".join([verb, *rest])


def _is_verb(word: str, before: str) -> bool:
    """Whether a word of a caption is its verb: one in the third person, or one after a noun in the plural."""
    return word.lower() in scenery.verbs() and (word.endswith("s") or is_plural(before))


class ClosedQuestions:
    """Makes closed questions about the pictures of ``annotations``, whose facts are each other's wrong answers."""

    def __init__(self, annotations: Mapping[str, Annotation]):
        self.annotations = annotations
        self.rivals: dict[str, list[str]] = defaultdict(list)
        for annotation in annotations.values():
            for fact in facts(annotation):
                self.rivals[fact.kind].append(fact.answer)

    def of(self, key: str, rng: random.Random) -> list[tuple[str, str]]:
        """Questions with ``YES``, ``NO`` or, if there is a choice, the right one of two short answers."""
        annotation = self.annotations[key]
        named = {thing(word) for text in annotation.texts for word in _words(text)}
        made = []
        for fact in facts(annotation):
            rival = self._rival(fact, named, annotation.people > 0, rng)
            made.append((fact.ask(fact.answer), YES))
            if rival is None:
                continue
            made.append((fact.ask(rival), NO))
            if not fact.kind.startswith(("event", "thing")):
                two = rng.sample([fact.answer, rival], 2)
                made.append((fact.ask(" or ".join(two)), short_answer(fact.answer)))
        for phrase in annotation.objects:
            if (other := _recolored(phrase.lower(), named, rng)) is not None:
                made.append((_is_there(other), NO))
        return [*made, *_of_scene(annotation, rng), *_of_people(annotation, rng), *_of_colors(named, rng)]

    def draw(self, key: str, rng: random.Random, each: int) -> list[tuple[str, str]]:
        """Of each kind of answer (yes, no, and a choice) up to ``each`` questions about a picture."""
        kinds: dict[str, list[tuple[str, str]]] = {YES: [], NO: [], "": []}
        for question, answer in self.of(key, rng):
            kinds[answer if answer in kinds else ""].append((question, answer))
        return [pair for made in kinds.values() for pair in rng.sample(made, min(each, len(made)))]

    def _rival(self, fact: Fact, named: set[str], people: bool, rng: random.Random) -> str | None:
        """Another picture's answer, whose words are not all named here; None if there is none.

        Where there are people, it names none: the annotation may have others for them.
        """
        rivals = self.rivals[fact.kind]
        for _ in range(12):
            rival = rng.choice(rivals)
            noun = head_noun(rival)
            if people and fact.kind == "thing" and noun is not None and is_person(noun):
                continue
            if fact.kind.startswith("event") and rival.split()[0] == fact.answer.split()[0]:
                continue  # whoever is standing at a plate is standing
            if not {thing(word) for word in _words(rival)} - _COMMON <= named:
                return rival
        return None


def _of_scene(annotation: Annotation, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Inside or outside, day or night."""
    inside = scenery.is_inside(annotation)
    if inside is not None:
        word = rng.choice(scenery.INSIDE_WORDS + scenery.OUTSIDE_WORDS)
        yield rng.choice(scenery.IS_INSIDE).format(x=word), _said((word in scenery.INSIDE_WORDS) == inside)
        two = rng.choice(scenery.INSIDE_OR_OUTSIDE)
        yield rng.choice(scenery.IS_INSIDE).format(x=" or ".join(rng.sample(two, 2))), two[0 if inside else 1]
    night = scenery.is_night(annotation)
    if night is not None:
        word = rng.choice(scenery.NIGHT_WORDS + scenery.DAY_WORDS)
        yield f"Is it {word}?", _said((word in scenery.NIGHT_WORDS) == night)
        two = rng.choice(scenery.DAY_OR_NIGHT)
        yield f"Is it {' or '.join(rng.sample(two, 2))}?", two[1 if night else 0]


def _of_people(annotation: Annotation, rng: random.Random) -> Iterator[tuple[str, str]]:
    """How many people there are, as yes or no."""
    count = annotation.people
    yield rng.choice(scenery.EMPTY), _said(count == 0)
    yield rng.choice(scenery.SEVERAL), _said(count > 1)
    yield rng.choice(scenery.ALONE), _said(count == 1)
    yield rng.choice(scenery.CROWD), _said(count > 4)
    other = rng.choice([n for n in (1, 2, 3, 4) if n != count])
    for number in {count, other} - {0} if count < 5 else {other}:
        phrase = f"{number_name(number)} {'person' if number == 1 else 'people'}"
        # Of two people one may say that there is one person.
        bounds = ("exactly ", "only ") if number == 1 else ("", "exactly ", "only ")
        yield f"{_be(phrase)} there {rng.choice(bounds)}{phrase}?", _said(number == count)


def _recolored(phrase: str, named: set[str], rng: random.Random) -> str | None:
    """An object phrase in a color that is not named; None if it has no color, or several."""
    words = phrase.split()
    at = [i for i, word in enumerate(words) if word in _COLORS]
    others = sorted(_COLORS - named)
    if len(at) != 1 or not others:
        return None
    words[at[0]] = rng.choice(others)
    return " ".join(words)


def _of_colors(named: set[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Whether anything has a color."""
    for group, answer in ((named & _COLORS, YES), (_COLORS - named, NO)):
        if group:
            yield rng.choice(scenery.ANYTHING).format(x=rng.choice(sorted(group))), answer


def _said(truth: bool) -> str:
    return YES if truth else NO


def _words(text: str) -> Sequence[str]:
    return re.findall(r"[a-z0-9'-]+", text.lower())


_DANGLING = frozenset("a an the of in on at to from along toward past through under over and his her their its".split())  # noqa: SIM905
_COLORS = COLORS - {"grey", "blond", "beige", "silver", "gold", "tan"}
_COMMON = frozenset("a an the of in on at to and with his her their its some one two is are up down".split())  # noqa: SIM905
