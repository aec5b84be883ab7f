"""What a model knows about single pictures: presence, people, counts, short and closed questions, descriptions.

Questions are made by seed from annotated pictures (``synthetic/annotations.py``) and graded against the annotations, so
no judge is needed. A picture is a stream of one frame.
"""

import functools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flash_vstream.errors import UserError
from flash_vstream.models.short_answers import NO, YES
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.annotations import Annotation, article, is_person, read_annotations, thing
from flash_vstream.synthetic.captions import pictures_in
from flash_vstream.synthetic.closed_questions import ClosedQuestions
from flash_vstream.synthetic.presence import Things
from flash_vstream.synthetic.texts import yes_or_no

LEAST_PICTURES = 12
"""A thing is asked about when so many annotated pictures have it."""
_NUMBERS = {"no": 0, "none": 0, "nobody": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_NUMBERS |= {"seven": 7, "eight": 8, "nine": 9, "ten": 10, "many": 11, "several": 4}
_SOMEBODY = re.compile(r"\ba (?:single )?(?:person|man|woman|boy|girl|child|baby)\b")
_FILLERS = frozenset(
    ["a", "an", "the", "is", "are", "of", "it", "they", "he", "she", "on", "in", "at", "with", "and", "to"]
)
MOST = 3
"""Counts from here on are one class."""
CLOSED = 2
"""Closed questions of each kind about a picture."""
_BALANCED = ("thing", "people", "yes or no")


@dataclass(frozen=True)
class PictureQuestion:
    """A question about one picture. ``truth`` is yes, no, a count, or the answer's text."""

    kind: str
    text: str
    truth: str


class PictureQuestions:
    """Makes the questions of a set of annotated pictures; ``captions`` are further texts that name things."""

    def __init__(self, annotations: Mapping[str, Annotation], captions: Mapping[str, Sequence[str]]):
        self.annotations = annotations
        self.things = Things(annotations, captions, LEAST_PICTURES)

    @functools.cached_property
    def closed(self) -> ClosedQuestions:
        """Made when first asked for: it takes seconds, and a benchmark of watches does without."""
        return ClosedQuestions(self.annotations)

    def of(self, key: str, rng: random.Random) -> list[PictureQuestion]:
        """The questions about one picture; as many things that are there as things that are not."""
        annotation = self.annotations[key]
        made = []
        listed = sorted(self.things.listed[key])
        for name in rng.sample(listed, min(2, len(listed))):
            made += [PictureQuestion("thing", f"Is there {article(name)}?", "yes")]
            if (absent := self.things.absent([key], rng)) is not None:
                made += [PictureQuestion("thing", f"Is there {article(absent)}?", "no")]
        form = rng.choice(("Is there a person?", "Is there anyone?", "Is somebody there?", "Are there any people?"))
        made.append(PictureQuestion("people", form, "yes" if annotation.people else "no"))
        words = {thing(word) for text in annotation.texts for word in re.findall(r"[A-Za-z]+", text)}
        someone = rng.choice(("man", "woman", "child"))
        if not annotation.people or someone in words:
            made.append(PictureQuestion("people", f"Is there a {someone}?", "yes" if annotation.people else "no"))
        made.append(PictureQuestion("count", "How many people are there?", str(annotation.people)))
        made += [PictureQuestion("short", question, answer) for question, answer in annotation.qa]
        made.append(PictureQuestion("description", "What is happening now?", ""))
        for question, answer in self.closed.draw(key, rng, CLOSED):
            made.append(PictureQuestion("yes or no" if answer in (YES, NO) else "choice", question, answer))
        return made


def said_count(reply: str) -> int | None:
    """The first number in a reply, as digits or as a word ("a person" is one); None when it says none."""
    for word in re.findall(r"[a-z]+|\d+", _SOMEBODY.sub("one", reply.lower())):
        if word.isdigit():
            return int(word)
        if word in _NUMBERS:
            return _NUMBERS[word]
    return None


def key_words(text: str) -> set[str]:
    """The words of a short answer that a reply must have, nouns in the singular."""
    return {thing(word) for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _FILLERS}


def is_right(question: PictureQuestion, reply: str, listed: Iterable[str], people: int) -> bool:
    """Whether a reply is right: yes or no first, a count up to ``MOST``, all key words, or a listed thing named.

    A choice must be made: "red or blue" is no answer.
    """
    if question.kind in _BALANCED:
        return yes_or_no(reply) == question.truth
    if question.kind == "count":
        count = said_count(reply)
        return count is not None and min(count, MOST) == min(int(question.truth), MOST)
    if question.kind in ("short", "choice"):
        wanted, said = key_words(question.truth), key_words(reply)
        return bool(wanted) and wanted <= said and not (question.kind == "choice" and "or" in said)
    words = re.findall(r"[A-Za-z'-]+", reply)
    return bool({thing(word) for word in words} & set(listed)) or (people > 0 and any(map(is_person, words)))


def ask_pictures(
    pipeline: FlashVStream, pictures: Mapping[str, Image.Image], questions: PictureQuestions, seed: int
) -> list[dict[str, Any]]:
    """Every picture's questions with the model's replies, in the order of the pictures' keys."""
    rows = []
    for key in track(sorted(pictures), "pictures", console=Console(stderr=True)):
        stream = pipeline.new_stream()
        stream.write([pictures[key]], [0.0])
        prefix = pipeline.generator.read(stream.snapshot())
        asked = questions.of(key, random.Random(f"{seed}/{key}"))
        replies = pipeline.generator.ask_many(prefix, [question.text for question in asked], max_new_tokens=40)
        for question, reply in zip(asked, replies, strict=True):
            right = is_right(question, reply, questions.things.listed[key], questions.annotations[key].people)
            row = {"picture": key, "kind": question.kind, "question": question.text, "truth": question.truth}
            rows.append({**row, "reply": reply, "correct": right})
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy by kind; for yes/no questions the mean of that on yes and that on no, with both."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        groups[row["kind"]].append(row["correct"])
        if row["truth"] in ("yes", "no"):
            groups[f"{row['kind']}, {row['truth']}"].append(row["correct"])
    scores: dict[str, Any] = {kind: sum(right) / len(right) for kind, right in groups.items()}
    for kind in _BALANCED:
        if f"{kind}, yes" in scores and f"{kind}, no" in scores:
            scores[kind] = (scores[f"{kind}, yes"] + scores[f"{kind}, no"]) / 2
    return {kind: round(scores[kind], 4) for kind in sorted(scores)} | {"questions": len(rows)}


def run_pictures(data: Path, model_name: str, split: str, limit: int | None, seed: int) -> dict[str, Any]:
    """Ask about the annotated pictures of a split in ``data`` (pictures, splits, captions, annotations)."""
    pictures, questions = read_pictures(data, split, limit, seed)
    rows = ask_pictures(FlashVStream.from_pretrained(model_name), pictures, questions, seed)
    return {"model": model_name, "split": split, "seed": seed, "scores": summary(rows), "rows": rows}


def read_pictures(
    data: Path, split: str, limit: int | None, seed: int
) -> tuple[dict[str, Image.Image], PictureQuestions]:
    """The annotated pictures of a split, at most ``limit`` of them, drawn by ``seed``; raises ``UserError``."""
    annotations = read_annotations(data / "annotations.jsonl")
    keys = [key for key in read_json(data / "splits.json").get(split, ()) if key in annotations]
    if not keys:
        raise UserError(f"{data} has no annotated pictures in a split called {split!r}")
    chosen = set(random.Random(seed).sample(sorted(keys), min(len(keys), limit or len(keys))))
    pictures = {key: picture.convert("RGB") for key, picture in pictures_in(data, chosen)}
    return pictures, PictureQuestions(annotations, read_json(data / "captions.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ``UserError``."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


def print_pictures(report: Mapping[str, Any]) -> None:
    """The scores as a table."""
    table = Table("about single pictures", "right")
    for kind, score in report["scores"].items():
        table.add_row(kind, f"{score:.1%}" if isinstance(score, float) else str(score))
    Console().print(table)
