"""Sight: which things a frame shows, and how many people, read off its feature map by a small network.

A language model of 135M parameters cannot tell from projected features whether there is a person; a two-layer network
on the same features can. It knows a fixed list of things, each by its singular, its plural and its synonyms. Grounding
takes its word for questions about the presence of one of them. The paper has nothing like it; models without
``sight_config`` go without.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PERSON = "person"
PEOPLE_CLASSES = 5
"""None, one, two, three, and four or more people."""
_DETERMINERS = re.compile(
    r"^(?:(?:at least one|a single|a|an|the|any|some|no|one|another|this|that|these|those|my|your|his|her)\s+)+",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_FUNCTION_WORDS = frozenset(
    _WORD.findall("""
    is are was were be been being am isn't aren't wasn't weren't there here a an the any some one no do does did don't
    didn't you i we he she it they see seen saw spot spotted notice noticed show shows shown showing have has had
    haven't can could now right currently just at this that these those moment in on of picture image photo video frame
    scene stream view visible present around anywhere somewhere ever yet so far until already still today please tell me
    whether if contain contains containing appear appears appeared look looks like and also even by chance
    """)
)
_POLITE = r"^\W*(?:please |tell me (?:if|whether) )*"
_PRESENT = re.compile(_POLITE + r"(?:is|are|do|does|can|isn't|aren't|don't)\b", re.IGNORECASE)
_YES_OR_NO = re.compile(
    _POLITE
    + r"(?:is|are|was|were|do|does|did|can|could|have|has|had|there|isn't|aren't|wasn't|weren't|don't|didn't)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Presence:
    """A question whether a thing is or was there: the thing's number, where the question names it, and the tense."""

    thing: int
    begin: int
    end: int
    is_about_now: bool


@dataclass(frozen=True)
class Seen:
    """What frames show: logits of things ``[n, V]`` and of the number of people ``[n, 5]``."""

    things: Tensor
    people: Tensor


def number_of_people(logits: Tensor) -> Tensor:
    """The classes ``[n]`` of the numbers of people, from logits ``[n, 5]``: none only if that is likelier than not."""
    somebody = logits[:, 1:].logsumexp(1) > logits[:, 0]
    return torch.where(somebody, 1 + logits[:, 1:].argmax(1), 0)


class Sight(nn.Module):
    """Logits of things and of the number of people from feature maps ``[n, P², channels]`` of any side P.

    ``things`` are the names in the order of the logits; ``aliases`` maps further wordings (plurals, synonyms), in lower
    case, to their numbers. A logit is relative to how frequent its thing is in the training pictures, so that one
    threshold serves all: what it must exceed is ``threshold[0] + threshold[1] · ln(number of frames compared)``.
    """

    prior: Tensor
    threshold: Tensor

    def __init__(self, channels: int, things: Sequence[str], aliases: Mapping[str, int], hidden: int = 512):
        super().__init__()
        self.names = list(things)
        self._singular = {name.lower(): number for number, name in enumerate(things)}
        self.aliases = {**self._singular, **aliases}
        self.tokens = nn.Sequential(
            nn.LayerNorm(channels), nn.Dropout(0.15), nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(0.3)
        )
        self.things = nn.Linear(2 * hidden, len(self.names))
        self.people = nn.Linear(2 * hidden, PEOPLE_CLASSES)
        self.register_buffer("prior", torch.zeros(len(self.names)))
        self.register_buffer("threshold", torch.zeros(2))

    def config(self) -> dict[str, Any]:
        """What the network's size depends on, as ``sight_config`` of a model."""
        plain = {wording: number for wording, number in self.aliases.items() if wording not in self._singular}
        return {"things": self.names, "aliases": plain, "hidden": self.things.in_features // 2}

    def forward(self, features: Tensor) -> Seen:
        """What feature maps ``[n, P², channels]`` show, relative to the things' frequency."""
        tokens = self.tokens(features.to(self.things.weight.dtype))
        state = torch.cat([tokens.mean(1), tokens.amax(1)], -1)
        return Seen(self.things(state) - self.prior, self.people(state))

    def shown(self, features: Tensor) -> Tensor:
        """Logits ``[n, V]`` of the things in feature maps, to be compared with ``needed``.

        They are those of ``forward``, except that a person is there where somebody is likelier than nobody.
        """
        seen = self(features)
        somebody = seen.people[:, 1:].logsumexp(1) - seen.people[:, 0]
        things: Tensor = seen.things.clone()
        if (person := self.find(PERSON)) is not None:
            things[:, person] = somebody + self.threshold[0]
        return things

    def find(self, text: str) -> int | None:
        """The number of the thing that a noun phrase names, None when it is none or more than a noun."""
        plain = " ".join(text.lower().replace("-", " ").split()).strip(" .?!,\"'")
        plain = _DETERMINERS.sub("", plain)
        return self.aliases.get(plain, self.aliases.get(plain.replace(" ", "-")))

    def presence(self, question: str) -> Presence | None:
        """The thing whose presence a question asks about; None for any other question.

        It is one if it can be answered yes or no, names one known thing, and is otherwise made of function words:
        ``Is there a dog?``, ``Did you see any people so far?``, but not ``Is the dog asleep?``.
        """
        if not _YES_OR_NO.match(question):
            return None
        words = [(match[0].lower(), match.start(), match.end()) for match in _WORD.finditer(question)]
        for length in (4, 3, 2, 1):  # of "at least one dog", say
            for first in range(len(words) - length + 1):
                rest = [word for word, _, _ in (*words[:first], *words[first + length :])]
                begin, end = words[first][1], words[first + length - 1][2]
                number = self.find(question[begin:end])
                if number is not None and all(word in _FUNCTION_WORDS for word in rest):
                    return Presence(number, begin, end, bool(_PRESENT.match(question)))
        return None

    def needed(self, frames: int) -> float:
        """What a thing's best logit among ``frames`` frames must exceed for it to count as seen."""
        base, slope = self.threshold.tolist()
        return float(base + slope * torch.log(torch.tensor(float(max(1, frames)))))
