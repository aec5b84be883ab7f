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

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, Slots
from flash_vstream.models.answer import Prefix
from flash_vstream.models.generation import AnswerGenerator
from flash_vstream.models.grounding import ReadEvents
from flash_vstream.models.hints import Hinter
from flash_vstream.models.sight import PERSON

CONFIRMING_FRAMES = 3
"""The newest frames that a careful score reads."""
RARITY = 2.0
"""What the logit of a thing that is waited for must exceed beyond sight's bar.

That bar is for questions, which ask as often for what is there as for what is not. A thing that is waited for is rarely
there. On streams of ten of COCO's validation pictures with the thing in one, 41% of the alerts are right at the bar, of
92% of the events; with this margin, 70% of 70%.
"""
_THERE_IS = re.compile(r"^\W*(?:there(?:'s| is| are)|i see|we see)\s+", re.IGNORECASE)
_PEOPLE = re.compile(r"^(?:somebody|someone|anybody|anyone|some people|any people|people)$", re.IGNORECASE)


@dataclass(frozen=True)
class EventQuery:
    """An event as it was typed, as a question to be answered yes or no, and the thing that sight knows it by."""

    text: str
    question: str
    thing: int | None = None


class EventScorer:
    """Scores events with a model's own means."""

    def __init__(self, generator: AnswerGenerator):
        self.generator = generator
        self.hinter: Hinter | None = generator.hinter
        self._read: dict[str, ReadEvents] = {}

    @property
    def is_cheap(self) -> bool:
        """Whether ``score`` costs so little that every frame can be looked at."""
        return self.hinter is not None

    def event(self, text: str) -> EventQuery:
        """The event in a phrase (``a dog on a lawn``), a sentence (``somebody is at the door``) or a question."""
        text = " ".join(text.split())
        sight = self.hinter.sight if self.hinter is not None else None
        if text.endswith("?"):
            asked = sight.presence(text) if sight is not None else None
            return EventQuery(text, text, asked.thing if asked is not None else None)
        what = _THERE_IS.sub("", text).rstrip(" .!")
        if self.hinter is None:
            return EventQuery(what, f"Look at the newest frame. Is this true of it: {what}? Answer yes or no.")
        thing = None
        if sight is not None:
            thing = sight.find(PERSON if _PEOPLE.match(what) else what)
        return EventQuery(what, f"Is there {what}?" if thing is not None else f"Did you see {what}?", thing)

    @torch.inference_mode()
    def score(self, event: EventQuery, snapshot: MemorySnapshot) -> float:
        """How well the newest frame of a memory shows the event."""
        if self.hinter is None:
            return self.likelihood(event, self.read_newest(snapshot, 1))
        newest = newest_frames(snapshot, 1)
        sight = self.hinter.sight
        is_rare = sight is not None and event.thing not in (None, sight.find(PERSON))
        return float((self._above(event, newest.features, 1)[0] - RARITY * is_rare).sigmoid())

    @torch.inference_mode()
    def scores(self, event: EventQuery, slots: Slots, among: int) -> tuple[Tensor, bool]:
        """How well each of n slots shows the event ``[n]``, and whether above 0 means that it does; none is read.

        ``among`` is how many slots are compared in all. Without grounding, the scores only rank them. Raises
        ``UserError`` if the model has no means, or the event nothing to go by.
        """
        if self.hinter is not None:
            return self._above(event, slots.features, among), True
        if self.generator.fit is None:
            raise UserError(
                "this model cannot tell what frames show without reading them; choose another, such as nano"
            )
        found = self.generator.fit(event.text, slots)
        if found is None:
            raise UserError(f"{event.text!r} names nothing that a frame could show; name a thing or what happens")
        return found.float().cpu(), False

    def _above(self, event: EventQuery, features: Tensor, among: int) -> Tensor:
        """How far above the bar for ``among`` slots the small networks find feature maps ``[n, P², D]``, as logits."""
        assert self.hinter is not None
        sight, grounder = self.hinter.sight, self.hinter.grounder
        if event.thing is not None and sight is not None:
            return grounder.things(features)[0][:, event.thing] - sight.needed(among)
        if event.text not in self._read:
            self._read[event.text] = grounder.grounding.read(*grounder.words.embed([" " + event.text]))
        found = grounder.grounding.compare_sights(self._read[event.text], [grounder.sights(features)])
        return found[0] - grounder.grounding.needed(among)

    def confirm(self, event: EventQuery, snapshot: MemorySnapshot) -> tuple[float, Prefix]:
        """How likely the language model finds it that the newest frames show the event, and those frames, read."""
        prefix = self.read_newest(snapshot, CONFIRMING_FRAMES)
        return self.likelihood(event, prefix), prefix

    def read_newest(self, snapshot: MemorySnapshot, count: int) -> Prefix:
        """The newest ``count`` frames of a memory, read by the language model; all of a memory without real frames."""
        if not len(snapshot.spatial):  # such as that of Flash-VStream-Qwen
            return self.generator.read(snapshot)
        frames = newest_frames(snapshot, count)
        return self.generator.read(self.generator.model.snapshot_of(frames.features, frames.start.tolist(), True))

    def likelihood(self, event: EventQuery, prefix: Prefix) -> float:
        """How likely the language model finds it that frames which were read show the event."""
        logs = torch.tensor(self.generator.likelihoods(prefix, event.question, ["Yes", "No"]))
        return float(logs.softmax(0)[0])


def newest_frames(snapshot: MemorySnapshot, count: int) -> Slots:
    """The newest ``count`` frames of a memory that has seen one, oldest first; its newest slots if it keeps none."""
    frames = snapshot.spatial if len(snapshot.spatial) else snapshot.temporal
    return frames[torch.arange(max(0, len(frames) - count), len(frames))]
