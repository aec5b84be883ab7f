"""OVO-Bench (Li et al., 2025): backward tracing, real-time perception and forward active responding.

The total is the mean of the three categories, each of which is the mean of its tasks. The third asks the same
question again as time goes on: how often something was done (REC), whether a step is being done (SSR), whether
what has been seen suffices for an answer (CRR).
"""

from pathlib import PurePosixPath
from typing import Any

from flash_vstream.evaluate.items import Benchmark, Item, listed, packed_choice, record, stem

CATEGORIES = {
    **dict.fromkeys(("EPM", "ASI", "HLD"), "backward tracing"),
    **dict.fromkeys(("OCR", "ACR", "ATR", "STU", "FPD", "OJR"), "real-time perception"),
    **dict.fromkeys(("REC", "SSR", "CRR"), "forward responding"),
}
_REPEATED = (
    "In this video, people may do something several times; they are called they. Count how often, all people taken"
    " together, they have done it so far; a complete motion counts as one. How many times did they {}? Reply with one"
    " number, such as 0, 1, 2 or 3, and nothing else."
)
_STEP = (
    "This video teaches a procedure of several steps. One of them is: {}. Is the person in the video doing this step"
    ' right now? Reply with "Yes" or "No" and nothing else.'
)
_CLUE = (
    "This question is about the newest frames, the end of the video so far: {} Does what has been seen, the newest"
    ' frames above all, suffice to answer it? Reply with "Yes" or "No" and nothing else.'
)


def read(rows: Any) -> list[Item]:
    """Read the repository's own file, or the packed form without forward responding."""
    if rows and isinstance(rows, list) and isinstance(rows[0], dict) and "conversations" in rows[0]:
        return packed_choice(rows)
    items: list[Item] = []
    for number, row in enumerate(rows):
        with record(number, row):
            items += _forward(row) if row["task"] in ("REC", "SSR", "CRR") else [_choice(row)]
    return items


def _video(path: str) -> str:
    # Published paths are relative to the folder of videos; those of an early version are another machine's.
    return stem(path) if path.startswith("/") else str(PurePosixPath(path).with_suffix(""))


def _choice(row: Any) -> Item:
    choices, correct = tuple(listed(row["options"])), int(row["gt"])
    if row["task"] not in CATEGORIES:
        raise ValueError(f"no task is called {row['task']!r}")
    if not 0 <= correct < len(choices):
        raise ValueError(f"gt {correct} is none of its {len(choices)} options")
    return Item(
        id=str(row["id"]),
        video=_video(row["video"]),
        question=row["question"],
        answer=choices[correct],
        kind=row["task"],
        choices=choices,
        correct=correct,
        end=float(row["realtime"]),
    )


def _forward(row: Any) -> list[Item]:
    items = []
    for i, test in enumerate(row["test_info"]):
        if row["task"] == "REC":
            question, answer, scoring = _REPEATED.format(row["activity"]), str(test["count"]), "count"
        elif row["task"] == "SSR":
            question, answer, scoring = _STEP.format(test["step"]), "Yes" if test["type"] else "No", "yes/no"
        else:
            question, answer, scoring = _CLUE.format(row["question"]), "Yes" if test["type"] else "No", "yes/no"
        items.append(
            Item(
                id=f"{row['id']}_{i}",
                video=_video(row["video"]),
                question=question,
                answer=answer,
                kind=row["task"],
                end=float(test["realtime"]),
                scoring=scoring,
            )
        )
    return items


BENCHMARKS = (
    Benchmark(
        name="ovobench",
        title="OVO-Bench",
        metric="choice",
        protocol="causal",
        files=(
            "ovo_bench_new.json",
            "data/ovo_bench_new.json",
            "realtime_backward.json",
            "ovobench/realtime_backward.json",
        ),
        read=read,
        source="github.com/JoeLeelyf/OVO-Bench and Hugging Face dataset JoeLeelyf/OVO-Bench (src_videos, or"
        " chunked_videos)",
        size="1,468 questions of backward tracing and real-time perception (all of the packed form), and forward ones",
        licence="CC-BY-NC-SA-4.0",
        media=("src_videos", "data/src_videos", "videos", "."),
        categories=CATEGORIES,
        total="categories",
    ),
)
