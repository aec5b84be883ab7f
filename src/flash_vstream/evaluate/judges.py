"""Judges of open answers: offline rules, or any OpenAI-compatible endpoint.

A judge gives a verdict and a score from 0 to 5. Scores of different judges are not comparable; to
compare with a paper, use the same judge as the paper.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Protocol

import yaml

from flash_vstream.evaluate.endpoint import ChatEndpoint
from flash_vstream.synthetic.texts import word_f1, words, yes_or_no

INSTRUCTION = (
    "You compare a predicted answer to a question about a video with the correct answer. Judge the meaning, not the"
    " wording: synonyms and paraphrases are right, and the prediction need not say more than the question asks for."
    ' Reply with one JSON object and nothing else: {"correct": true or false, "score": a whole number from 0 (wrong)'
    " to 5 (the same meaning)}."
)


@dataclass(frozen=True)
class Judgement:
    """A judge's verdict, its score (0 to 5), and the reply they were parsed from.

    ``parsed`` is False when the reply could not be parsed; it then counts as wrong and is reported as
    unreadable. ``tokens`` is the token cost of the judgement.
    """

    correct: bool
    score: float
    reply: str = ""
    parsed: bool = True
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The judgement as plain values for JSON."""
        return asdict(self)


class Judge(Protocol):
    """Judges one prediction at a time."""

    name: str

    def judge(self, question: str, answer: str, prediction: str) -> Judgement:
        """Judge whether ``prediction`` means the same as ``answer``."""


class OfflineJudge:
    """Rules that run anywhere, on texts in any script.

    Not comparable with published numbers, which were judged by language models. A yes/no answer is right
    when the prediction starts with the right word. Other answers are right when the prediction contains
    a short answer (up to three words) in full, or when the word F1 is at least one half; the score is
    five times the F1, or 5 for a contained short answer. A prediction without words is wrong.
    """

    name = "offline-rules-2"

    @staticmethod
    def is_yes_or_no(answer: str) -> bool:
        """Whether a reference answer is yes or no, in at most three words."""
        return yes_or_no(answer) is not None and len(words(answer)) <= 3

    def judge(self, question: str, answer: str, prediction: str) -> Judgement:
        if self.is_yes_or_no(answer):
            right = yes_or_no(prediction) == yes_or_no(answer)
            return Judgement(right, 5.0 if right else 0.0)
        predicted, expected = words(prediction), words(answer)
        if not predicted or not expected:
            return Judgement(False, 0.0)
        f1 = word_f1(prediction, answer)
        inside = len(expected) <= 3 and f" {' '.join(expected)} " in f" {' '.join(predicted)} "
        return Judgement(inside or f1 >= 0.5, 5.0 if inside else round(5 * f1, 2))


class EndpointJudge:
    """A language model behind an OpenAI-compatible endpoint, at temperature 0.

    Its name contains the model and a hash of the instruction, so that scores of different judges are
    never mixed.
    """

    def __init__(self, endpoint: ChatEndpoint):
        self.endpoint = endpoint
        self.name = f"{endpoint.model}-{hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:8]}"

    def judge(self, question: str, answer: str, prediction: str) -> Judgement:
        comparison = f"Question: {question}\nCorrect answer: {answer}\nPredicted answer: {prediction}"
        reply, usage = self.endpoint.complete(INSTRUCTION, comparison)
        return replace(read_judgement(reply), tokens=usage.get("total_tokens", 0))


def read_judgement(reply: str) -> Judgement:
    """Parse a judge's reply, which may have prose around the JSON object or use Python literals."""
    objects = re.findall(r"\{[^{}]*\}", reply)
    for text, parse in product(objects, (json.loads, yaml.safe_load)):  # YAML has Python's quotes and literals, too
        try:
            verdict = parse(text)
            right = verdict.get("correct", verdict.get("pred"))
            correct = right if isinstance(right, bool) else {"yes": True, "no": False}[str(right).lower().strip()]
            return Judgement(correct, min(5.0, max(0.0, float(verdict["score"]))), reply)
        except (ValueError, KeyError, TypeError, yaml.YAMLError):
            pass  # not a verdict
    return Judgement(False, 0.0, reply, parsed=False)
