"""Events of a composed stream in words, and distractor events that did not happen."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from flash_vstream.errors import UserError
from flash_vstream.synthetic.plans import Scene, StreamPlan

NEIGHBOURS = 24
_STOP = frozenset(
    "a an the is are was of in on at to and with his her their its for from by while that it as".split()  # noqa: SIM905
)


def as_event(caption: str) -> str:
    """A caption as used inside a question: no initial capital, no full stop."""
    text = caption.rstrip(".")
    first, _, rest = text.partition(" ")
    # Drop a sentence-initial capital, but keep words such as acronyms.
    lowered = first.lower() if first[1:].islower() or len(first) == 1 else first
    return f"{lowered} {rest}".strip()


class Events:
    """The captions of a picture set and, for each picture, the most similar other pictures.

    ``likely(key)`` gives hard negatives: other pictures ordered by caption similarity (cosine of
    tf-idf over content words).
    """

    def __init__(self, captions: Mapping[str, Sequence[str]]):
        self.captions = {key: list(texts) for key, texts in captions.items()}
        self.keys = sorted(self.captions)
        self._nearest: list[list[int]] | None = None
        self._index = {key: i for i, key in enumerate(self.keys)}

    def describe(self, key: str, rng: random.Random) -> str:
        """One of the picture's captions."""
        return rng.choice(self.captions[key])

    def likely(self, key: str) -> list[str]:
        """Up to ``NEIGHBOURS`` other pictures, most similar captions first."""
        if self._nearest is None:
            self._nearest = self._rank()
        return [self.keys[i] for i in self._nearest[self._index[key]]]

    def _rank(self) -> list[list[int]]:
        bags = [Counter(content_words(" ".join(self.captions[key]))) for key in self.keys]
        document_counts = Counter(word for bag in bags for word in bag)
        shared = sorted(word for word, count in document_counts.items() if count > 1)
        vocabulary = {word: i for i, word in enumerate(shared)}
        matrix = torch.zeros(len(bags), len(vocabulary) or 1)
        for row, bag in enumerate(bags):
            for word, count in bag.items():
                if word in vocabulary:
                    weight = math.log(len(bags) / document_counts[word])
                    matrix[row, vocabulary[word]] = (1 + math.log(count)) * weight
        matrix = torch.nn.functional.normalize(matrix, dim=1)
        count = min(NEIGHBOURS, len(bags) - 1)
        nearest: list[list[int]] = []
        for rows in torch.arange(len(bags)).split(512):
            similar = matrix[rows] @ matrix.T
            similar[torch.arange(len(rows)), rows] = -1
            nearest += similar.topk(count, dim=1).indices.tolist()
        return nearest

    def absent(self, plan: StreamPlan, rng: random.Random, hard: bool) -> str:
        """A picture that the stream has not shown; with ``hard``, one similar to a picture it has shown.

        Raises ``UserError`` if it has shown them all.
        """
        shown = {scene.key for scene in plan.scenes}
        if shown.issuperset(self.keys):
            raise UserError(
                f"a stream shows all {len(self.keys)} pictures, so nothing is left to ask about that it does not show;"
                " use more pictures, or streams of fewer scenes"
            )
        if hard:
            like = rng.choice(plan.scenes).key
            candidates = [key for key in self.likely(like) if key not in shown]
            if candidates:
                return rng.choice(candidates[: NEIGHBOURS // 2])
        while True:  # drawn again, since benchmarks are composed by these draws
            key = rng.choice(self.keys)
            if key not in shown:
                return key


def content_words(text: str) -> list[str]:
    """Lower-case words of a text, without stop words."""
    cleaned = "".join(c if c.isalnum() else " " for c in text.lower())
    return [word for word in cleaned.split() if word not in _STOP]


def first_visits(plan: StreamPlan) -> list[Scene]:
    """Scenes in order, keeping only the first appearance of each picture."""
    visits: dict[str, Scene] = {}
    for scene in plan.scenes:
        visits.setdefault(scene.key, scene)
    return list(visits.values())
