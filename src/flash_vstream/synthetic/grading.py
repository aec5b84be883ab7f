"""Whether an answer about a composed stream is right, by what the stream was made of."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from flash_vstream.synthetic.plans import StreamPlan
from flash_vstream.synthetic.questions import Question

_ARTICLES = {"a", "an", "the", "is", "are", "of", "and", "in", "on", "with"}


def words(text: str) -> list[str]:
    """Words of a text in lower case, without the most frequent ones."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _ARTICLES]


def overlap(answer: str, reference: str) -> float:
    """F1 of the words that two texts share, 0 to 1."""
    mine, yours = Counter(words(answer)), Counter(words(reference))
    shared = (mine & yours).total()
    return 2 * shared / (mine.total() + yours.total()) if shared else 0.0


def described_picture(answer: str, candidates: Sequence[str], captions: Mapping[str, Sequence[str]]) -> str | None:
    """Which of the pictures an answer describes: the one with the likest caption; None if none is."""
    best = {key: max(overlap(answer, caption) for caption in captions[key]) for key in candidates}
    key = max(best, key=best.__getitem__)
    return key if best[key] > 0 else None


def said_yes_or_no(answer: str) -> str | None:
    """``"yes"`` or ``"no"`` when an answer opens with it, else None."""
    match = re.match(r"\W*(yes|no)\b", answer.lower())
    return match[1] if match else None


def said_time(answer: str) -> float | None:
    """The first time in an answer, in seconds."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*s\b", answer)
    return float(match[1]) if match else None


def is_correct(question: Question, answer: str, plan: StreamPlan, captions: Mapping[str, Sequence[str]]) -> bool:
    """Whether ``answer`` is right. An answer that cannot be read is wrong.

    Yes and no are read off the answer's first word; a time must lie within the scene asked for; a
    description must be liker to a caption of the right picture than to those of the stream's others
    (of the two events' alone, when one of two is asked for).
    """
    if question.truth in ("yes", "no"):
        return said_yes_or_no(answer) == question.truth
    if question.kind == "when-never":
        return said_time(answer) is None
    if question.kind == "when":
        time = said_time(answer)
        return time is not None and question.span[0] <= time <= question.span[1]
    candidates = question.choices or tuple({scene.key for scene in plan.scenes})
    return described_picture(answer, sorted(candidates), captions) == question.truth
