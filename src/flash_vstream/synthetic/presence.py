"""Questions whether things and people are or were there, about annotated pictures and streams composed of them.

Annotations are not exhaustive, so what is absent from a picture are things that none of its texts names.
"""

import random
from collections.abc import Iterable, Mapping, Sequence

from flash_vstream.models.prompts import stamp
from flash_vstream.synthetic.annotations import Annotation, article, frequent_things, head_noun, is_person, things_in
from flash_vstream.synthetic.plans import StreamPlan
from flash_vstream.synthetic.questions import Turn

IS_THERE = ("Is there {x}?", "Do you see {x}?", "Can you see {x} now?", "Is {x} there?", "Is there {x} in the picture?")
WAS_THERE = ("Was there {x}?", "Did you see {x}?", "Have you seen {x} so far?", "Has there been {x}?")
SOMEBODY = ("a person", "anyone", "somebody", "anybody", "a human")
PEOPLE_SHARE = 0.25
"""The share of questions that are about people."""


class Things:
    """Which things annotated pictures have, of those that at least ``least`` of them have; people are left out.

    ``listed`` are those among a picture's objects, ``named`` those that any of its texts names. ``captions`` are
    further texts.
    """

    def __init__(self, annotations: Mapping[str, Annotation], captions: Mapping[str, Sequence[str]], least: int):
        self.annotations = annotations
        known = set(frequent_things(list(annotations.values()), least))
        self.listed = {key: _listed(annotation, known) for key, annotation in annotations.items()}
        self.named = {
            key: things_in([*annotation.texts, *captions.get(key, ())], known)
            for key, annotation in annotations.items()
        }
        self._drawn = [name for names in self.listed.values() for name in sorted(names)]
        self._known = set(self._drawn)

    def absent(self, keys: Iterable[str], rng: random.Random) -> str | None:
        """A thing that no text of these pictures names, as frequent among what is absent as among what is listed.

        None if they name everything.
        """
        named = set().union(*(self.named[key] for key in keys))
        if named >= self._known:
            return None
        while (name := rng.choice(self._drawn)) in named:
            pass
        return name


def _listed(annotation: Annotation, known: set[str]) -> set[str]:
    nouns = {head_noun(phrase) for phrase in annotation.objects}
    return {noun for noun in nouns if noun in known and not is_person(noun)}


class PresenceTurns:
    """Makes questions about presence with their answers, half of them yes, for training."""

    def __init__(self, annotations: Mapping[str, Annotation], captions: Mapping[str, Sequence[str]], least: int = 4):
        self.things = Things(annotations, captions, least)

    def now(self, key: str, rng: random.Random) -> Turn:
        """Whether a thing or anybody is in the picture ``key``."""
        form = rng.choice(IS_THERE)
        listed, absent = sorted(self.things.listed[key]), self.things.absent([key], rng)
        if rng.random() < PEOPLE_SHARE or (not listed and absent is None):
            answer = "Yes." if self.things.annotations[key].people else "No."
            return Turn(form.format(x=rng.choice(SOMEBODY)), (answer,))
        if absent is None or (listed and rng.random() < 0.5):
            return Turn(form.format(x=article(rng.choice(listed))), ("Yes.",))
        return Turn(form.format(x=article(absent)), ("No.",))

    def ever(self, plan: StreamPlan, rng: random.Random) -> Turn | None:
        """Whether a thing has been in the stream, and when; one that is there is named in a single scene.

        None if the stream gives nothing to ask.
        """
        keys = [scene.key for scene in plan.scenes if scene.key in self.things.annotations]
        form, scene = rng.choice(WAS_THERE), rng.choice(plan.scenes)
        others = set().union(*(self.things.named[key] for key in keys if key != scene.key))
        listed, absent = sorted(self.things.listed.get(scene.key, set()) - others), self.things.absent(keys, rng)
        if listed and (absent is None or rng.random() < 0.5):
            return Turn(form.format(x=article(rng.choice(listed))), (f"Yes, at {stamp(scene.start)}.",))
        return None if absent is None else Turn(form.format(x=article(absent)), ("No.",))
