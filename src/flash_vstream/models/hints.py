"""Hints: what small networks tell a small language model about a memory and a question.

nano's language model has 135M parameters. It follows what it reads far more surely than what it is shown, so three
networks look for it: grounding finds the events that a question names, sight the things and the number of people in a
frame, and short answers what a few words can answer. Their findings stand in the prompt as text:

- a cue after the newest frame, and after each recalled one: ``2 people; dog, grass``;
- a note after each event of a question: ``Did you see a dog run (12s)?``;
- a short answer after the question: ``What color is the bus? (red)``. A question to be answered by yes or no, or by
  one of two alternatives, is put into a form that the language model answers by the note.

A question recalls frames of the long-term memory: those at the times it names, those that show its events, or
those just before or after an event.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flash_vstream.memory import MemorySnapshot, Slots
from flash_vstream.memory.pooling import grid_side
from flash_vstream.models.direct_question import direct_question, in_present
from flash_vstream.models.grounding import IS_THERE, Grounder, Mention, annotate, looked_at
from flash_vstream.models.guidance import Guide, Guided
from flash_vstream.models.interface import Layout, StreamProcessor
from flash_vstream.models.presupposition import SURE, absence, doubt, kind_logits, means_people, presupposed
from flash_vstream.models.prompts import stamp
from flash_vstream.models.question_times import in_stream_times, split_window
from flash_vstream.models.short_answers import NO, NONE, YES, ShortAnswers
from flash_vstream.models.sight import PERSON, Sight, number_of_people
from flash_vstream.models.story import asks_for_story
from flash_vstream.timecode import parse_time

RECALLED = 2
"""The most frames that a question recalls."""
LEAST_CONFIDENCE = 0.04
"""A short answer below this probability is no hint."""
SUGGESTED = 0.3
"""The power of what a question alone suggests that is taken off a choice: else almost everybody would be sitting.

Contextual calibration (Zhao et al. 2021, arXiv 2102.09690), but not all of it: that it is rather day than night is so.
"""
YES_NO_SHARE = 0.5
"""A question is one to be answered by yes or no if short answers give the two at least this probability."""
_CHOICE = "Is it {answer} or something else? ({answer})"
_FORMS = {YES: IS_THERE.format(thing="it", note=" (0s)"), NO: IS_THERE.format(thing="it", note=" (0s?)")}
"""How the language model reads a closed question, whatever its wording.

It was not trained on closed questions and often does not follow a note after one, but it follows these.
"""
CUE_THINGS = 5
CUE_PROBABILITY = 0.35
"""A cue names up to so many things that are at least so likely."""
_PEOPLE = ("nobody", "1 person", "2 people", "3 people", "many people")
MOST_PEOPLE = len(_PEOPLE) - 1
"""As many or more are one class of sight's."""
_NUMBERS = (("none",), ("one",), ("two",), ("three",), ("four", "five", "six", "seven", "eight", "nine", "ten", "many"))
"""How short answers call each number of people that sight tells."""
_HOW_MANY_PEOPLE = re.compile(
    r"\W*how many (?:people|persons|humans)"
    r"(?: (?:are|is|there|here|now|right|currently|visible|present|can|be|do|you|we|see|seen|"
    r"in|the|this|picture|image|photo|frame|view|video|scene))*\W*",
    re.IGNORECASE,
)
_SO_MANY = {"a": 1, "one": 1, "1": 1, "a single": 1, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
_SO_MANY_PEOPLE = re.compile(
    r"\W*(?:is|are|do you see|can you see) (?:there )?(?P<bound>more than |at least )?"
    rf"(?P<number>{'|'.join(sorted(_SO_MANY, key=len, reverse=True))}) (?:person|people|persons|humans)"
    r"(?: (?:there|here|now|right|visible|present|in|the|this|picture|image|photo|frame|view|video|scene))*\W*",
    re.IGNORECASE,
)
_WHO = re.compile(r"\W*(?:and |so )?who(?:'s)?\b", re.IGNORECASE)
_TIME = re.compile(r"\b(\d+:[0-5]\d(?::[0-5]\d)?|\d+(?:\.\d+)?\s?s)\b")
_BEFORE = re.compile(r"\bbefore\b", re.IGNORECASE)
_AFTER = re.compile(r"\bafter\b", re.IGNORECASE)
_BEGINNING = re.compile(r"\b(?:first|begin|began|start|started|beginning)\b", re.IGNORECASE)
_SHORT = re.compile(r"\W*(?:and |so )?(?:what|which|who|whose|where|how)\b", re.IGNORECASE)
_CLOSED = re.compile(  # "Can you describe it?" and "Are you a robot?" are no questions about a frame
    r"\W*(?:please |tell me (?:if|whether) )*"
    r"(?:is|isn't|does|doesn't|(?:are|aren't)(?! you\b)|(?:do|can) (?:you|we|i) see|"
    r"do (?:the|these|those|they|people)|(?:was|were)(?! there)(?=.* or ))\b",
    re.IGNORECASE,
)
_OF_THE_STREAM = re.compile(
    r"\b(?:happen\w*|going on|first|last|before|after|earlier|later|beg[aiu]n|end|ended|far)\b", re.IGNORECASE
)
_DESCRIPTION = re.compile(
    r"\W*(?:(?:please|tell me|show me),? )*(?:describe\b|how did it\b|"
    r"what\b.*\b(?:happen\w*|going on|see|saw|seen|scene|picture|shown|there|first|last)\b)",
    re.IGNORECASE,
)
_OF_THE_MODEL = re.compile(  # "Who are you?" is no question about a frame
    r"\b(?:are|were|can|do|did|could|will) you\b(?! (?:see|saw|seen|notice|spot|think))|\byour\b", re.IGNORECASE
)
_LENGTH = re.compile(
    r"\W*(?:for )?how long (?:(?:is|was) (?:the|this) (?:video|stream|clip|recording|film)|have you been watching|"
    r"has (?:the|this) (?:video|stream|clip|recording) (?:lasted|been (?:running|going on)))\b.*",
    re.IGNORECASE,
)
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_SUBJECT = re.compile(r"^(?!an? ).*\b(?=(?:a|an|the) )", re.IGNORECASE)
_PLACE = re.compile(r"\s(?:next|on|in|at|to|of|behind|beside|near|under|above|over|with)\b.*", re.IGNORECASE)
_SOMEBODY = frozenset(("he", "she", "they", "him", "her", "them", "who", "anyone", "anybody", "someone", "somebody"))
_PRESENT = re.compile(r"\b(?:is|are|am|do|does|has|have|now|currently)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Hints:
    """What was found for one question: its events, a short answer, and the frames it recalls with their cues.

    ``direct`` is the question as it was looked up, in its direct form and in stream times; the events' places are those
    in it. ``scenes`` are the slots that a story is about, in time order, if the question asks for one. ``frame``
    ``[1, P², D]`` is what is to be described, if it asks for the description of one frame. ``objection`` is the whole
    answer, if the question takes something for granted that is not there.
    """

    mentions: list[Mention] = field(default_factory=list)
    short_answer: str | None = None
    recalled: Slots | None = None
    cues: tuple[str, ...] = ()
    direct: str | None = None
    scenes: Slots | None = None
    frame: Tensor | None = None
    objection: str | None = None

    @property
    def verdict(self) -> str | None:
        """The words that an answer begins with where they are decided: yes or no, or the one of two alternatives.

        Sight tells whether a thing is there, a short answer the rest. A language model of 135M parameters answers one
        of twelve such questions against its note.
        """
        if len(self.mentions) == 1 and self.mentions[0].thing is not None:
            return YES if self.mentions[0].seen else NO
        return self.short_answer if _CLOSED.match(self.direct or "") else None

    def annotate(self, question: str) -> str:
        """The question as the language model reads it."""
        question = self.direct or question
        if self.short_answer is None:
            return annotate(question, self.mentions)
        if _CLOSED.match(question):
            return _FORMS.get(self.short_answer, _CHOICE).format(answer=self.short_answer)
        return f"{question} ({self.short_answer})"

    def lay_out_recalled(self, processor: StreamProcessor, first_slot: int, time_stamps: bool = True) -> Layout:
        """The recalled frames as the beginning of the question's part of a prompt; empty if there are none."""
        if self.recalled is None:
            return Layout([], None, torch.zeros(0, dtype=torch.long))
        return processor.lay_out_recalled(self.recalled, first_slot, time_stamps, self.cues)


class Hinter:
    """Finds hints with the networks of a model, as far as it has them."""

    def __init__(self, grounder: Grounder, short_answers: ShortAnswers | None = None):
        self.grounder = grounder
        self.sight: Sight | None = grounder.sight
        self.short_answers = short_answers
        self._guide: Guide | None = None

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any) -> "Hinter | None":
        """The hinter of a model; None if the model has no grounding."""
        grounder = Grounder.from_model(model, tokenizer)
        return None if grounder is None else cls(grounder, model.short_answers)

    @torch.inference_mode()
    def cue(self, snapshot: MemorySnapshot) -> str:
        """What the newest frame shows, in words; empty without sight."""
        newest = _newest(snapshot)
        return self._cues(newest)[0] if len(newest) else ""

    def guidance(self, hints: Hints) -> Guided | None:
        """What guides the description that a question asks for; None if it asks for none, or grounding has no words."""
        if hints.frame is None or not self.grounder.grounding.vocabulary:
            return None
        if self._guide is None:
            self._guide = Guide(self.grounder)
        return self._guide.about(hints.frame)

    @torch.inference_mode()
    def hints(self, questions: Sequence[str], snapshot: MemorySnapshot) -> list[Hints]:
        """The hints for each question about a memory."""
        questions = [in_stream_times(direct_question(text), snapshot.time) for text in questions]
        located = self.grounder.locate(questions, snapshot)
        # A question about presence is sight's alone, and one about the order of things grounding's. One that a few
        # words can answer names no event, whatever grounding says.
        asked = [
            bool(_SHORT.match(text) or _CLOSED.match(text))
            and not _OF_THE_STREAM.search(text)
            and not _OF_THE_MODEL.search(text)
            and not any(m.thing is not None for m, _ in own)
            for text, own in zip(questions, located, strict=True)
        ]
        objections = [
            self._objection(text, snapshot) if own else None for text, own in zip(questions, asked, strict=True)
        ]
        asked = [own and objection is None for own, objection in zip(asked, objections, strict=True)]
        short = self._short_answers(questions, asked, snapshot)
        for i, wanted in enumerate(asked):
            if wanted and short[i] is None:
                short[i] = self._alternative(questions[i], [mention for mention, _ in located[i]], snapshot)
        found = []
        for question, own, answer, objection in zip(questions, located, short, objections, strict=True):
            if objection is not None:
                found.append(Hints(direct=question, objection=objection))
                continue
            own = own if answer is None else []
            recalled = recall(question, own, snapshot.longterm)
            cues = self._cues(recalled.features) if recalled is not None else ()
            scenes = _scenes(question, snapshot, bool(own))
            frame = _described(question, len(own), recalled, snapshot) if answer is None else None
            found.append(Hints([mention for mention, _ in own], answer, recalled, tuple(cues), question, scenes, frame))
        return found

    def _cues(self, features: Tensor) -> list[str]:
        """What each frame ``[n, P², D]`` shows: how many people, and its likeliest things."""
        if self.sight is None:
            return [""] * len(features)
        self.sight.eval()
        seen = self.sight(features)
        likely = (seen.things + self.sight.prior).sigmoid()
        values, numbers = likely.topk(min(CUE_THINGS, likely.shape[1]), 1)
        counts, cues = number_of_people(seen.people).tolist(), []
        for count, own, chances in zip(counts, numbers.tolist(), values.tolist(), strict=True):
            names = [self.sight.names[i] for i, p in zip(own, chances, strict=True) if p >= CUE_PROBABILITY]
            things = ", ".join(name for name in names if name != PERSON)
            cues.append(f" {_PEOPLE[count]}" + (f"; {things}" if things else ""))
        return cues

    def _short_answers(
        self, questions: Sequence[str], asked: Sequence[bool], snapshot: MemorySnapshot
    ) -> list[str | None]:
        """The likeliest short answer to each question that is ``asked``, None if none is likely enough."""
        answers = [stamp(snapshot.time) if _LENGTH.fullmatch(text) else None for text in questions]
        rows = [i for i, wanted in enumerate(asked) if wanted and answers[i] is None]
        if self.short_answers is None or not rows or not len(snapshot.spatial):
            return answers
        self.short_answers.eval()
        asked_now = [in_present(questions[i]) for i in rows]
        embeddings, there = self.grounder.words.embed(asked_now)
        frames = torch.cat([self._asked_about(questions[i], snapshot) for i in rows])
        found = self.short_answers(embeddings, there, frames).softmax(1)
        choices = [row for row, text in enumerate(asked_now) if _is_choice(text)]
        if choices:
            empty = torch.zeros_like(frames[choices])
            suggested = self.short_answers(embeddings[choices], there[choices], empty).softmax(1)
            found[choices] /= suggested**SUGGESTED
        for i, text, frame, chances in zip(rows, asked_now, frames, found, strict=True):
            numbers = self._numbers_of_people(text, frame)
            answer = self._counted(text, frame) or _likeliest(self.short_answers, text, chances, numbers)
            answers[i] = answer if self._suits(text, answer) else None
        return answers

    def _alternative(self, question: str, mentions: Sequence[Mention], snapshot: MemorySnapshot) -> str | None:
        """The one of two alternatives that the newest frame shows, as grounding sees it; None if there are not two.

        It is for ``Is there a gate or a hill behind the man?``, where short answers do not know both.
        """
        if len(mentions) != 2 or not _CLOSED.match(question) or not len(snapshot.spatial):
            return None
        left, right = mentions
        if question[left.end : right.begin].strip(" ,").lower() != "or":
            return None
        # "the man riding a horse" or "a bike on the street": what is between the subject and the place.
        named = [_SUBJECT.sub("", left.text), _PLACE.sub("", right.text)]
        scores, _ = self.grounder.compared(named, [snapshot.spatial[torch.tensor([len(snapshot.spatial) - 1])]])
        return named[int(scores[:, 0].argmax())]

    def _suits(self, question: str, answer: str | None) -> bool:
        """Whether a short answer means people where a question asks who."""
        return answer is None or self.sight is None or not _WHO.match(question) or means_people(answer, self.sight)

    def _numbers_of_people(self, question: str, frame: Tensor) -> list[int]:
        """The answers to a question for the number of people that agree with sight; empty for any other question.

        Sight answers whether anybody is there, too, so both questions get the same answer.
        """
        if self.sight is None or self.short_answers is None or not _HOW_MANY_PEOPLE.fullmatch(question):
            return []
        numbers = self.short_answers.numbers
        return [numbers[name] for name in _NUMBERS[self._people(frame)] if name in numbers]

    def _counted(self, question: str, frame: Tensor) -> str | None:
        """Whether there are as many people as a question says, by sight; None for any other question."""
        asked = _SO_MANY_PEOPLE.fullmatch(question)
        if asked is None or self.sight is None:
            return None
        there, number = self._people(frame), _SO_MANY[asked["number"].lower()]
        bound = (asked["bound"] or "").strip().lower()
        if number == MOST_PEOPLE and bound != "at least":
            return None  # sight does not tell four from more
        is_exact = there == number or there > number == 1  # "Is there a single person?" may be said of two
        return YES if {"more than": there > number, "at least": there >= number, "": is_exact}[bound] else NO

    def _people(self, frame: Tensor) -> int:
        """The number of people in a frame ``[P², D]`` as sight sees it; four or more count as four."""
        assert self.sight is not None
        self.sight.eval()
        return int(number_of_people(self.sight(frame[None]).people))

    def _objection(self, question: str, snapshot: MemorySnapshot) -> str | None:
        """What is to be said of a thing that a question takes for granted and no frame shows; None if there is none."""
        is_yes_or_no = _CLOSED.match(question) and not _is_choice(question)
        if self.sight is None or is_yes_or_no or not looked_at(snapshot):
            return None
        for thing, noun in presupposed(question, self.sight):
            if self._beyond_needed(thing, looked_at(snapshot)) < -doubt(thing, self.sight):
                return absence(noun)
        return None

    def _beyond_needed(self, thing: int, parts: Sequence[Slots]) -> float:
        """How far the logit of a thing, at its best in ``parts``, is beyond what sight needs."""
        assert self.sight is not None
        things, times = self.grounder.shown(parts)
        return float(kind_logits(things, thing, self.sight).max()) - self.sight.needed(len(set(times)))

    def _asked_about(self, question: str, snapshot: MemorySnapshot) -> Tensor:
        """The frame ``[1, P², D]`` that a question is about: the newest, or the one that shows best what it names.

        In the present tense, it is the newest unless that surely lacks something which another one shows.
        """
        newest_slot = snapshot.spatial[torch.tensor([len(snapshot.spatial) - 1])]
        newest = newest_slot.features
        if self.sight is None:
            return newest
        if _PRESENT.search(question):
            things = [
                thing
                for thing, _ in presupposed(question, self.sight)
                if self._beyond_needed(thing, [newest_slot]) < -SURE
                and self._beyond_needed(thing, looked_at(snapshot)) > 0
            ]
        else:
            words = re.findall(r"[A-Za-z][A-Za-z'-]*", question)
            named = [PERSON if word.lower() in _SOMEBODY else word for word in words]
            things = [number for word in named if (number := self.sight.find(word)) is not None]
        if not things:
            return newest
        best, frame = -torch.inf, newest
        for slots in looked_at(snapshot):
            (seen,) = self.grounder.things(slots.features)
            score, at = seen[:, things].sum(1).max(0)
            if float(score) > best:
                best, frame = float(score), slots.features[int(at)][None]
        return _at_size(frame, newest.shape[1])


def _at_size(frame: Tensor, tokens: int) -> Tensor:
    """A feature map ``[1, P², D]`` at the size ``[1, tokens, D]`` of another: each token several times."""
    times = math.isqrt(tokens // frame.shape[1])
    side = grid_side(frame)
    grid = frame.reshape(1, side, side, -1)
    return grid.repeat_interleave(times, 1).repeat_interleave(times, 2).reshape(1, tokens, -1)


def _is_choice(question: str) -> bool:
    """Whether a question is to be answered by one of two alternatives that it names."""
    return bool(_CLOSED.match(question) and _OR.search(question))


def _likeliest(network: ShortAnswers, question: str, chances: Tensor, allowed: Sequence[int] = ()) -> str | None:
    """The likeliest of the answers that a question allows, by their probabilities ``[V]``; None if it is no hint.

    Those may be given as ``allowed``. A closed question allows yes and no, or the two answers that it names.
    """
    if allowed:
        return network.answers[allowed[int(chances[list(allowed)].argmax())]]
    if _CLOSED.match(question):
        is_choice = _is_choice(question)
        yes_or_no = [network.numbers[word] for word in (YES, NO) if word in network.numbers]
        allowed = network.choice(question) if is_choice else yes_or_no
        if not allowed or (not is_choice and chances[allowed].sum() < YES_NO_SHARE):
            return None
        return network.answers[allowed[int(chances[allowed].argmax())]]
    chance, best = chances.max(0)
    answer = network.answers[int(best)]
    return answer if answer != NONE and chance >= LEAST_CONFIDENCE else None


def _described(question: str, events: int, recalled: Slots | None, snapshot: MemorySnapshot) -> Tensor | None:
    """The frame that a question asks to describe: the one that it recalls, or the newest; None if there is none."""
    is_beside = bool(_BEFORE.search(question) or _AFTER.search(question))
    if not _DESCRIPTION.match(question) or events > int(is_beside):
        return None
    if recalled is not None:
        return recalled.features if len(recalled) == 1 else None
    newest = _newest(snapshot)
    is_past = is_beside or _BEGINNING.search(question) or _TIME.search(question)
    return newest if len(newest) and not is_past else None


def _newest(snapshot: MemorySnapshot) -> Tensor:
    """The newest frame ``[1, P², D]`` of a memory; ``[0, P², D]`` of an empty one."""
    return (snapshot.spatial if len(snapshot.spatial) else snapshot.temporal).features[-1:]


def _scenes(question: str, snapshot: MemorySnapshot, names_event: bool) -> Slots | None:
    """The slots that a story is about, from the beginning or in the stretch of time that a question names.

    They are those that the language model reads with their times. None if the question asks for no story, as most that
    name an event do not.
    """
    rest, window = split_window(question, snapshot.time)
    if not asks_for_story(rest) or (names_event and window is None):
        return None
    slots = snapshot.temporal if len(snapshot.temporal) else snapshot.spatial
    if window is None:
        return slots
    begin, end = window
    inside = ((slots.end >= begin) & (slots.start <= end)).nonzero()[:, 0]
    slots = slots[inside if len(inside) else torch.tensor([len(slots) - 1])]
    return replace(slots, start=slots.start.clamp_min(begin))


def recall(question: str, located: Sequence[tuple[Mention, Tensor]], past: Slots) -> Slots | None:
    """The slots of the long-term memory ``past`` that a question asks for, in time order; None if it asks for none.

    ``located`` are its events, each with its scores ``[n]`` for the slots.
    """
    if not len(past) or any(mention.thing is not None for mention, _ in located):
        return None
    chosen = [_at(past, parse_time(text)) for text in _TIME.findall(question)]
    if len(located) == 1 and (_BEFORE.search(question) or _AFTER.search(question)):
        chosen += _beside(located[0][1], -1 if _BEFORE.search(question) else 1)
    elif not chosen:
        chosen += [int(scores.argmax()) for _, scores in located]
    if not chosen and _BEGINNING.search(question):
        chosen.append(0)
    return past[torch.tensor(sorted(set(chosen[:RECALLED])))] if chosen else None


def _at(past: Slots, time: float) -> int:
    """The slot whose frame was seen nearest to ``time``."""
    return int((past.exemplar - time).abs().argmin())


def _beside(scores: Tensor, step: int) -> list[int]:
    """The next slot before (``step`` -1) or after (1) those around the best one that show the event as well."""
    best = int(scores.argmax())
    limit = float(scores[best]) / 2 if scores[best] > 0 else float(scores[best]) - 1.0
    at = best + step
    while 0 <= at < len(scores):
        if scores[at] < limit:
            return [at]
        at += step
    return []
