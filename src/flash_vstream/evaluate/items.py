"""A benchmark's questions in one form, whatever its files look like."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Item:
    """One question about a video.

    ``video`` names the medium without its ending. ``answer`` is the right answer's text and, where
    there are ``choices``, ``correct`` its index. ``start`` and ``end`` bound, in seconds of the
    video, what the question is about; the causal protocol shows nothing after ``end`` (None: the end).
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

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        if not self.choices:
            return self.question
        options = "\n".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(self.choices))
        return f"{self.question}\n{options}\nAnswer with the letter of the right option."


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: where its files are, how they are read, how it is asked and scored.

    ``files`` are the names under which its annotations are looked for in the data folder, ``media``
    the folders its videos may lie in. ``read`` makes items of the parsed JSON. ``published`` are
    results of the papers (2406.08085 and 2506.23825) to stand beside ours; those of open questions
    were judged by GPT-3.5 and compare with no other judge.
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


def stem(path: str) -> str:
    """A medium's name without folders of other machines and without its ending."""
    return PurePosixPath(path).stem


def packed_open(rows: Any) -> list[Item]:
    """ReKV's packing: one record a video, ``conversations`` of open questions with times."""
    items = []
    for row in rows:
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
    """One record a video, ``conversations`` with ``choices``, the right one's text and ``end_time``."""
    items = []
    for row in rows:
        for i, turn in enumerate(row["conversations"]):
            choices = tuple(turn["choices"])
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
    """A list of ``{video_id, question, answer, …}`` as the open benchmarks are packed for evaluation."""
    items = []
    for i, row in enumerate(rows):
        video = row.get("video_id", row.get("video_name", row.get("video")))
        number = row.get("id", row.get("question_id", i))
        items.append(
            Item(
                id=str(number),
                video=stem(str(video)),
                question=row["question"],
                answer=str(row["answer"]),
                kind=str(row.get("answer_type") or row.get("type") or "all"),
                start=_seconds(row.get("start_time")),
                end=_seconds(row.get("end_time")),
            )
        )
    return items


def _seconds(value: Any) -> float | None:
    return None if value is None else float(value)


_OPTION = re.compile(r"^\s*\(?([A-H])[).]\s*(.*)$")


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    r"""A question whose text carries its options, apart: ``"Who?\n(A) x\n(B) y"``.

    Lines that begin with the next expected letter are options, lines between belong to the option
    above; instructions around them are dropped.
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


def options_in_text(kind: str) -> Callable[[Any], list[Item]]:
    """A function that reads lists whose ``question`` carries the options and whose ``answer`` is an index.

    ``kind`` names the field of the question's type.
    """

    def read(rows: Any) -> list[Item]:
        items = []
        for row in rows:
            question, choices = split_options(row["question"])
            of = row.get(kind, "all")
            items.append(
                Item(
                    id=str(row["id"]),
                    video=str(row["video_id"]),
                    question=question,
                    answer=choices[row["answer"]],
                    kind=", ".join(of) if isinstance(of, list) else str(of),
                    choices=choices,
                    correct=int(row["answer"]),
                )
            )
        return items

    return read
