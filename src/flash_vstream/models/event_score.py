"""How well a frame shows an event that somebody waits for, from 0 to 1.

A cheap score for every frame, and a careful one for the few that it lets through. A model with grounding has the cheap
one from its small networks: sight for a thing that it knows (``a dog``, ``people``), grounding for anything else. Other
models read the newest frame and a question to be answered yes or no, and compare the likelihoods of the two answers.
The careful score is that comparison for every model, over the newest few frames.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_vstream.memory import MemorySnapshot, Slots
from flash_vstream.models.generation import AnswerGenerator, Prefix
from flash_vstream.models.hints import Hinter

CONFIRMING_FRAMES = 3
"""The newest frames that a careful score reads."""
_THERE_IS = re.compile(r"^\W*(?:there(?:'s| is| are)|i see|we see)\s+", re.IGNORECASE)
_PEOPLE = re.compile(r"^(?:somebody|someone|anybody|anyone|some people|any people|people)$", re.IGNORECASE)


@dataclass(frozen=True)
class Event:
    """An event as it was typed, as a question to be answered yes or no, and the thing that sight knows it by."""

    text: str
    question: str
    thing: int | None = None


class EventScorer:
    """Scores events with a model's own means."""

    def __init__(self, generator: AnswerGenerator):
        self.generator = generator
        self.hinter: Hinter | None = generator.hinter
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def is_cheap(self) -> bool:
        """Whether ``score`` costs so little that every frame can be looked at."""
        return self.hinter is not None

    def event(self, text: str) -> Event:
        """The event in a phrase (``a dog on a lawn``), a sentence (``somebody is at the door``) or a question."""
        text = " ".join(text.split())
        sight = self.hinter.sight if self.hinter is not None else None
        if text.endswith("?"):
            asked = sight.presence(text) if sight is not None else None
            return Event(text, text, asked.thing if asked is not None else None)
        what = _THERE_IS.sub("", text).rstrip(" .!")
        if self.hinter is None:
            return Event(what, f"Look at the newest frame. Is this true of it: {what}? Answer yes or no.")
        thing = None
        if sight is not None:
            thing = sight.find("person" if _PEOPLE.match(what) else what)
        return Event(what, f"Is there {what}?" if thing is not None else f"Did you see {what}?", thing)

    @torch.inference_mode()
    def score(self, event: Event, snapshot: MemorySnapshot) -> float:
        """How well the newest frame of a memory shows the event."""
        newest = newest_frames(snapshot, 1)
        if self.hinter is None:
            return self._likelihood(event, newest)[0]
        sight, grounder = self.hinter.sight, self.hinter.grounder
        if event.thing is not None and sight is not None:
            logit = float(grounder.things(newest.features)[0][0, event.thing]) - sight.needed(1)
        else:
            if event.text not in self._embedded:
                self._embedded[event.text] = grounder.words.embed([" " + event.text])[:2]
            sights = [grounder.sights(newest.features)]
            found = grounder.grounding.compare_sights(*self._embedded[event.text], sights)
            logit = float(found[0, 0]) - grounder.grounding.needed(1)
        return float(torch.tensor(logit).sigmoid())

    def confirm(self, event: Event, snapshot: MemorySnapshot) -> tuple[float, Prefix]:
        """How likely the language model finds it that the newest frames show the event, and those frames, read."""
        return self._likelihood(event, newest_frames(snapshot, CONFIRMING_FRAMES))

    def _likelihood(self, event: Event, frames: Slots) -> tuple[float, Prefix]:
        shown = self.generator.model.snapshot_of(frames.features, frames.start.tolist(), True)
        prefix = self.generator.read(shown)
        logs = torch.tensor(self.generator.likelihoods(prefix, event.question, ["Yes", "No"]))
        return float(logs.softmax(0)[0]), prefix


def newest_frames(snapshot: MemorySnapshot, count: int) -> Slots:
    """The newest ``count`` real frames of a memory that has seen one, as far as it has them, oldest first."""
    frames = snapshot.spatial if len(snapshot.spatial) else snapshot.temporal
    return frames[torch.arange(max(0, len(frames) - count), len(frames))]
