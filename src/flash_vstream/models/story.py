"""The story of a stream: a sentence about each scene, after the time at which it began.

Asked for it, a small language model repeats its first sentence for every slot, and goes on to times that have not come
yet. So the memory tells which scenes there are, and the language model is asked about each by itself. The answer is
put together from that: ``0s: A man rides a bike. 14s: Two dogs play in the snow.`` The paper has nothing like it.
"""

import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch.nn import functional

from flash_vstream.memory import Slots
from flash_vstream.models.answer import Answer, Evidence, cut
from flash_vstream.models.engines import Feed, Row
from flash_vstream.models.prompts import stamp

ABOUT_SCENE = "What happened at {}?"
"""What the language model is asked about each scene."""
MOST_SCENES = 8
SCENE_TOKENS = 24
"""What a scene's sentence takes, with some to spare."""
ALIKE = 0.65
"""Slots whose mean features have at least this cosine show one scene.

Of 500 pictures that nano was not trained on, 95% of two overlapping views have more than 0.91, and 95% of two pictures
less than 0.46.
"""
_PAST = r"(?:has |have |had |all )?(?:happened|been happening|been going on|you seen|you saw|you've seen|you have seen)"
_SO_FAR = r"(?:,? (?:so far|until now|up to now|here|in (?:the|this) (?:video|stream|clip)|in order))*"
_WORDINGS = (
    r"(?:summari[sz]e|recap)\b.*",
    r"(?:give|write|make) (?:me |us )?(?:a |an )?(?:short |brief )?(?:summary|recap|overview)\b.*",
    rf"(?:tell(?: me| us)?|describe|list|explain) what {_PAST}{_SO_FAR}",
    rf"(?:tell(?: me| us)?|describe|list|explain) (?:everything|all)(?: (?:that |what )?{_PAST}.*)?{_SO_FAR}",
    rf"(?:tell(?: me| us)?|describe|list|explain) (?:the )?(?:whole |entire )?"
    rf"(?:story|events|scenes|video|stream|clip){_SO_FAR}",
    rf"what (?:{_PAST}|did (?:i miss|you see)|have i missed){_SO_FAR}",
)
_STORY = re.compile(rf"\W*(?:please,? )?(?:{'|'.join(_WORDINGS)})\W*", re.IGNORECASE | re.DOTALL)


def asks_for_story(question: str) -> bool:
    """Whether a question asks for all that has happened: ``What have I missed?``, say."""
    return _STORY.fullmatch(question) is not None


def scene_starts(slots: Slots, most: int) -> list[float]:
    """When the scenes that ``slots`` show in time order began, at most ``most``, in seconds of stream time.

    Neighbours that look alike are one scene, and so are those that resemble each other most, as long as there are too
    many.
    """
    directions = functional.normalize(slots.features.float().mean(1), dim=1)
    likeness = (directions[1:] * directions[:-1]).sum(1)
    cuts = [i for i, own in enumerate(likeness.tolist()) if own < ALIKE]
    cuts = sorted(sorted(cuts, key=lambda i: float(likeness[i]))[: max(1, most) - 1])
    return slots.start[torch.tensor([0, *(i + 1 for i in cuts)])].tolist()


def tell(
    ask: Callable[..., Answer],
    answer: Answer,
    scenes: Slots,
    max_new_tokens: int,
    stop: Sequence[str],
    started: float,
) -> Generator[Feed | str, Row | None, None]:
    """The work of an ``answer`` that is a story: it asks about each scene, and says what is new.

    ``ask`` is that of an ``AnswerGenerator``, about the memory; ``started`` is when the answer was asked for, in
    seconds of ``time.perf_counter``.
    """
    begun = time.perf_counter() - started
    parts: list[Answer] = []
    story, sentence, stopped = "", "", False
    for start in scene_starts(scenes, min(MOST_SCENES, max_new_tokens // SCENE_TOKENS)):
        if answer.tokens >= max_new_tokens:
            answer.finish_reason = "length"
            break
        part = ask(ABOUT_SCENE.format(stamp(start)), max_new_tokens=max_new_tokens - answer.tokens)
        beginning = f"{story} {stamp(start)}: ".lstrip()
        stopped = yield from _sentence(part, answer, beginning, sentence, stop)
        parts.append(part)
        answer.tokens += part.tokens
        answer.finish_reason = "stop" if stopped else part.finish_reason
        answer.first_token_seconds = begun + (parts[0].first_token_seconds or 0.0)
        if part.text != sentence:
            story, sentence = beginning + part.text, part.text
        if stopped:
            break
    if not stopped:  # say what was held back, since it could have been the start of a stop string
        yield from say(answer, story, (), True)
    answer.prompt_tokens = parts[0].prompt_tokens
    if answer.tokens > 1 and answer.first_token_seconds is not None:
        after_first = time.perf_counter() - started - answer.first_token_seconds
        answer.tokens_per_second = (answer.tokens - 1) / after_first
    answer.evidence = _mean([part.evidence for part in parts])


def _sentence(
    part: Answer, answer: Answer, beginning: str, before: str, stop: Sequence[str]
) -> Generator[Feed | str, Row | None, bool]:
    """The work of a ``part`` of an answer, whose words are said as they come, unless they may yet repeat ``before``.

    Returns whether the answer contains a ``stop`` string.
    """
    row: Row | None = None
    with suppress(StopIteration):
        while True:
            event = part.work.send(row)
            row = None
            if not isinstance(event, str):
                row = yield event
            elif not before.startswith(part.text) and (yield from say(answer, beginning + part.text, stop, False)):
                return True
    return part.text != before and (yield from say(answer, beginning + part.text, stop, False))


def say(answer: Answer, text: str, stop: Sequence[str], whole: bool) -> Generator[str, None, bool]:
    """Let an answer's text be ``text``, as far as ``cut`` says; returns whether that is the end."""
    text, stopped = cut(text, stop, whole)
    piece, answer.text = text[len(answer.text) :], text
    if piece:
        yield piece
    return stopped


def _mean(parts: Sequence[Sequence[Evidence]]) -> list[Evidence]:
    """The evidence of an answer that was made of others: the mean of the shares that each slot has in theirs."""
    shares: dict[Evidence, list[float | None]] = {}
    for part in parts:
        for slot in part:
            shares.setdefault(replace(slot, share=None), []).append(slot.share)
    mean = {
        slot: None if None in own else sum(share for share in own if share is not None) / len(parts)
        for slot, own in shares.items()
    }
    return [replace(slot, share=share) for slot, share in mean.items()]
