"""A common format for the questions of all benchmarks, and readers for their file formats."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from flash_vstream.errors import UserError

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Item:
    """One question about a video.

    ``video`` is the name of the medium without its suffix. ``answer`` is the text of the right answer
    and, with ``choices``, ``correct`` is its index. ``start`` and ``end``, in seconds of the video, bound
    what the question is about; the causal protocol shows nothing after ``end`` (None: end of the video).
    ``context`` is text that comes with the question, such as subtitles.

    ``scoring`` names a rule of the benchmark's own (``evaluate/scoring.py``) instead of a judge. With
    ``"proactive"``, the model is polled from ``start`` on for the moment, ``end``, at which to give the answer.
    """

    id: str
    video: str
    question: str
    answer: str
    kind: str = "all"
    choices: tuple[str, ...] = ()
    correct: int | None = None
    start: float | None = None
    end: float | None = None
    context: str = ""
    scoring: str = ""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for values that cannot be asked or scored, wherever a file has them from."""
        if not isinstance(self.question, str) or not (self.question.strip() or self.choices):  # MLVU has one without
            raise ValueError(f"the question {self.question!r} is no text")
        for name, text in (("answer", self.answer), *(("option", choice) for choice in self.choices)):
            if not isinstance(text, str):
                raise ValueError(f"the {name} {text!r} is no text")
        for name, seconds in (("start", self.start), ("end", self.end)):
            if seconds is not None and not math.isfinite(seconds):
                raise ValueError(f"the {name} {seconds} is no time of a video")

    @property
    def asked(self) -> str:
        """The question with its context, without options."""
        return f"{self.context}\n{self.question}" if self.context else self.question

    @property
    def prompt(self) -> str:
        """The text that the model is asked."""
        if not self.choices:
            return self.asked
        options = "\n".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(self.choices))
        return f"{self.asked}\n{options}\nAnswer with the letter of the right option."


Total = Literal["questions", "kinds", "categories"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its files, how to read them, and how to ask and score its questions.

    ``files`` are the candidate names of the annotation file in the data folder, ``media`` the candidate
    folders for its videos. ``read`` converts the parsed JSON to items. ``published`` holds results from
    the papers (2406.08085 and 2506.23825) for comparison, named with their judge and protocol.

    ``categories`` maps kinds of questions to the benchmark's categories. ``total`` is how its headline is
    defined: the mean over questions, over the means of its kinds, or over those of its categories, each of
    which is the mean of its kinds. ``subtitles`` gives each question the subtitles of its video, from
    ``subtitle/NAME.srt``.
    """

    name: str
    title: str
    metric: str
    protocol: str
    files: tuple[str, ...]
    read: Callable[[Any], list[Item]]
    source: str
    size: str
    licence: str
    media: tuple[str, ...] = ("videos", ".")
    published: Mapping[str, str] = field(default_factory=dict)
    categories: Mapping[str, str] = field(default_factory=dict)
    total: Total = "questions"
    subtitles: bool = False

    @property
    def is_streaming(self) -> bool:
        """Whether questions are asked while the video goes on."""
        return self.protocol == "causal"


@contextmanager
def record(number: int, row: Any) -> Iterator[None]:
    """Turn what goes wrong with a record of an annotation file into a ``UserError`` that names the record."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        names = ("id", "question_id", "video_id", "video_path", "video")
        named = [f"{name} {row[name]!r}" for name in names if isinstance(row, dict) and name in row][:1]
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        if not isinstance(row, dict):
            reason = "it is no object"
        raise UserError(f"record {number}{f' ({named[0]})' if named else ''}: {reason}") from None


def timed(text: str | float) -> float:
    """Seconds of a time stamp, ``"00:03:10"`` or a number. Raises ``ValueError`` for anything else."""
    if isinstance(text, int | float):
        return float(text)
    return float(sum(float(part) * 60**i for i, part in enumerate(reversed(text.split(":")))))


def stem(path: str) -> str:
    """A medium's name without its folders, which are another machine's, and without its suffix."""
    return PurePosixPath(path).stem


def packed_open(rows: Any) -> list[Item]:
    """Read ReKV's format: one record per video, with open, timed questions in ``conversations``."""
    items: list[Item] = []
    for number, row in enumerate(rows):
        with record(number, row):
            video = stem(row["video_path"]) if "video_path" in row else str(row["video_id"])
            for i, turn in enumerate(row["conversations"]):
                kind = "yes/no" if turn["answer"].lower().strip(" .") in ("yes", "no") else "open"
                items.append(
                    Item(
                        id=f"{row['video_id']}/{i}",
                        video=video,
                        question=turn["question"],
                        answer=turn["answer"],
                        kind=str(turn.get("answer_type", kind)),
                        start=float(turn["start_time"]),
                        end=float(turn["end_time"]),
                    )
                )
    return items


def packed_choice(rows: Any) -> list[Item]:
    """Read one record per video, with ``choices``, the answer text and ``end_time`` in ``conversations``."""
    items: list[Item] = []
    for number, row in enumerate(rows):
        with record(number, row):
            for i, turn in enumerate(row["conversations"]):
                choices = tuple(listed(turn["choices"]))
                if turn["answer"] not in choices:
                    raise ValueError(f"the answer {turn['answer']!r} is none of the choices")
                items.append(
                    Item(
                        id=f"{row['video_id']}/{i}",
                        video=stem(row["video_path"]),
                        question=turn["question"],
                        answer=turn["answer"],
                        kind=turn.get("task") or row.get("task", "all"),
                        choices=choices,
                        correct=choices.index(turn["answer"]),
                        end=float(turn["end_time"]),
                    )
                )
    return items


def flat_open(rows: Any) -> list[Item]:
    """Read a list of ``{video_id, question, answer, …}``, the format of the open benchmarks."""
    items: list[Item] = []
    for i, row in enumerate(rows):
        with record(i, row):
            video = row.get("video_id", row.get("video_name", row.get("video")))
            if video is None:
                raise ValueError("it lacks 'video_id'")
            items.append(
                Item(
                    id=str(row.get("id", row.get("question_id", i))),
                    video=stem(str(video)),
                    question=row["question"],
                    answer=str(row["answer"]) if isinstance(row["answer"], int | float) else row["answer"],
                    kind=str(row.get("answer_type") or row.get("type") or "all"),
                    start=_seconds(row.get("start_time")),
                    end=_seconds(row.get("end_time")),
                )
            )
    return items


def listed(value: Any) -> list[Any]:
    """``value``, if it is a list; raises ``ValueError`` otherwise."""
    if not isinstance(value, list):
        raise ValueError(f"the options {value!r} are no list")
    return value


def _seconds(value: Any) -> float | None:
    return None if value is None else float(value)


_OPTION = re.compile(r"^\s*\(?([A-H])[).]\s*(.*)$")


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    r"""Split a question from the options in its text: ``"Who?\n(A) x\n(B) y"``.

    A line that starts with the next expected letter is an option. Other lines after the first option and
    known instruction lines are dropped.
    """
    question: list[str] = []
    choices: list[str] = []
    for line in text.splitlines():
        match = _OPTION.match(line)
        if match and len(choices) < len(LETTERS) and match[1] == LETTERS[len(choices)]:
            choices.append(match[2].strip())
        elif not choices:
            question.append(line)
    dropped = ("options:", "select the best answer", "only give the best option")
    kept = [line.strip() for line in question if line.strip() and not line.strip().lower().startswith(dropped)]
    return "\n".join(kept).removeprefix("Question:").strip(), tuple(choices)


def unlettered(options: list[str]) -> tuple[str, ...]:
    """Options without the letters that some files put before them: ``"A. red"`` is ``"red"``."""
    if all(re.match(rf"\s*{letter}[.):]\s*\S", text) for letter, text in zip(LETTERS, options, strict=False)):
        return tuple(re.split(r"[.):]\s*", text, maxsplit=1)[1].strip() for text in options)
    return tuple(str(text).strip() for text in options)


def options_in_text(kind: str) -> Callable[[Any], list[Item]]:
    """Return a reader for lists whose ``question`` includes the options and whose ``answer`` is an index.

    ``kind`` is the name of the field with the question's type.
    """

    def read(rows: Any) -> list[Item]:
        items: list[Item] = []
        for number, row in enumerate(rows):
            with record(number, row):
                question, choices = split_options(row["question"])
                of, correct = row.get(kind, "all"), int(row["answer"])
                if not 0 <= correct < len(choices):
                    raise ValueError(f"the answer {row['answer']} is none of its {len(choices)} options")
                items.append(
                    Item(
                        id=str(row["id"]),
                        video=str(row["video_id"]),
                        question=question,
                        answer=choices[correct],
                        kind=", ".join(of) if isinstance(of, list) else str(of),
                        choices=choices,
                        correct=correct,
                    )
                )
        return items

    return read
