"""Grade answers about a composed stream against what the stream was made of."""

import re
from collections.abc import Mapping, Sequence

from flash_vstream.synthetic.plans import StreamPlan
from flash_vstream.synthetic.questions import Question
from flash_vstream.synthetic.texts import ARTICLES, word_f1, yes_or_no

FREQUENT = ARTICLES | {"is", "are", "of", "and", "in", "on", "with"}
"""Words so common in captions that they do not help to tell them apart."""


def caption_likeness(answer: str, captions: Sequence[str]) -> float:
    """The best word F1 between an answer and any of a picture's captions, 0 to 1."""
    return max(word_f1(answer, caption, FREQUENT) for caption in captions)


def described_picture(answer: str, candidates: Sequence[str], captions: Mapping[str, Sequence[str]]) -> str | None:
    """The key of the picture whose captions are most similar to ``answer``; None if no words match."""
    best = {key: caption_likeness(answer, captions[key]) for key in candidates}
    key = max(best, key=best.__getitem__)
    return key if best[key] > 0 else None


def stated_time(answer: str) -> float | None:
    """The first time in an answer ("at 12 s"), in seconds."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*s\b", answer)
    return float(match[1]) if match else None


def is_correct(question: Question, answer: str, plan: StreamPlan, captions: Mapping[str, Sequence[str]]) -> bool:
    """Whether ``answer`` is right. An answer that cannot be parsed is wrong.

    Yes and no are read from the first word of the answer. A time must lie within the scene in question.
    A description must match the captions of the right picture better than those of any other picture in
    the stream, or, when the question offers two events, better than those of the other event.
    """
    if question.truth in ("yes", "no"):
        return yes_or_no(answer) == question.truth
    if question.kind == "when-never":
        return stated_time(answer) is None
    if question.kind == "when":
        time = stated_time(answer)
        return time is not None and question.span[0] <= time <= question.span[1]
    candidates = question.choices or tuple({scene.key for scene in plan.scenes})
    return described_picture(answer, sorted(candidates), captions) == question.truth
