"""StreamingBench (Lin et al., 2024): questions at given times, in sequence, and answers that must come unasked."""

from collections.abc import Callable, Iterator
from typing import Any

from flash_vstream.evaluate.items import (
    LETTERS,
    Benchmark,
    Item,
    listed,
    packed_choice,
    record,
    stem,
    timed,
    unlettered,
)


def read(rows: Any) -> list[Item]:
    """Read the repository's own multiple-choice files, or the packed form of the real-time part."""
    if rows and isinstance(rows, list) and isinstance(rows[0], dict) and "conversations" in rows[0]:
        return packed_choice(rows)
    return _items(rows, _choice)


def read_sequential(rows: Any) -> list[Item]:
    """Read questions that build on each other: each comes with the earlier ones of its video and their answers."""
    items: list[Item] = []
    earlier: dict[str, list[str]] = {}
    for item in sorted(_items(rows, _choice), key=lambda item: (item.video, item.end or 0.0)):
        said = earlier.setdefault(item.video, [])
        context = "\n".join(["Earlier questions about this video, with their answers:", *said]) if said else ""
        items.append(Item(**{**vars(item), "context": context}))
        said.append(f"At {int(item.end or 0)}s: {item.question} {item.answer}")
    return items


def read_proactive(rows: Any) -> list[Item]:
    """Read the questions whose answer must come by itself, at the right moment."""
    return _items(rows, _proactive)


def _items(rows: Any, make: Callable[[Any, str, str], Item]) -> list[Item]:
    items: list[Item] = []
    counts: dict[str, int] = {}
    for number, row in enumerate(_flat(rows)):
        with record(number, row):
            video = stem(row["video_path"])
            for question in row["questions"]:
                counts[video] = counts.get(video, -1) + 1
                items.append(make(question, video, f"{video}/{counts[video]}"))
    return items


def _flat(rows: Any) -> Iterator[Any]:
    """The records; in the sequential file they are grouped by video."""
    for row in rows:
        if isinstance(row, list):
            yield from row
        else:
            yield row


def _choice(question: Any, video: str, name: str) -> Item:
    choices = unlettered(listed(question["options"]))
    letter = question["answer"].strip(" .()")
    if letter not in LETTERS[: len(choices)]:
        raise ValueError(f"the answer {letter!r} is none of its {len(choices)} options")
    correct = LETTERS.index(letter)
    return Item(
        id=name,
        video=video,
        question=question["question"],
        answer=choices[correct],
        kind=question["task_type"],
        choices=choices,
        correct=correct,
        end=timed(question["time_stamp"]),
    )


def _proactive(question: Any, video: str, name: str) -> Item:
    return Item(
        id=name,
        video=video,
        question=question["question"],
        answer=question["ground_truth_output"],
        kind=question["task_type"],
        start=timed(question["time_stamp"]),
        end=timed(question["ground_truth_time_stamp"]),
        scoring="proactive",
    )


_REAL_TIME = (
    *("Object Perception", "Object Recognition", "Causal Reasoning", "Clips Summarize", "Clips Summarization"),
    *("Attribute Perception", "Attribute Recognition", "Event Understanding", "Text-Rich Understanding"),
    *("Prospective Reasoning", "Spatial Understanding", "Action Perception", "Action Recognition", "Counting"),
)
_OMNI = ("Emotion Recognition", "Scene Understanding", "Source Discrimination", "Multimodal Alignment")
_CONTEXTUAL = (
    *("Misleading Context Understanding", "Anomaly Context Understanding", "Sequential Question Answering"),
    "Proactive Output",
)
CATEGORIES = {
    **dict.fromkeys(_REAL_TIME, "real-time visual understanding"),
    **dict.fromkeys(_OMNI, "omni-source understanding"),
    **dict.fromkeys(_CONTEXTUAL, "contextual understanding"),
}


def _part(
    part: str, title: str, read: Callable[[Any], list[Item]], files: tuple[str, ...], size: str, metric: str = "choice"
) -> Benchmark:
    folder = files[0].removeprefix("questions_").removesuffix(".json")
    return Benchmark(
        name=f"streamingbench{part}",
        title=title,
        metric=metric,
        protocol="causal",
        files=(*files, *(f"src/data/{name}" for name in files), *(f"streamingbench/{name}" for name in files)),
        read=read,
        source="github.com/THUNLP-MT/StreamingBench; videos: Hugging Face dataset mjuicem/StreamingBench",
        size=size,
        licence="for research; the videos are YouTube's",
        media=("videos", folder, f"data/{folder}", "."),
        categories=CATEGORIES,
    )


BENCHMARKS = (
    _part(
        "",
        "StreamingBench (real-time)",
        read,
        ("questions_real.json", "questions_real_stream.json", "realtime.json"),
        "2,500 questions",
    ),
    _part(
        "-omni",
        "StreamingBench (omni-source and context, without sound)",
        read,
        ("questions_omni.json", "questions_omni_stream.json"),
        "1,500 questions",
    ),
    _part(
        "-sqa",
        "StreamingBench (sequential)",
        read_sequential,
        ("questions_sqa.json", "questions_sqa_stream.json"),
        "250 questions",
    ),
    _part(
        "-proactive",
        "StreamingBench (proactive output)",
        read_proactive,
        ("questions_proactive.json", "questions_proactive_stream.json"),
        "250 questions",
        "open",
    ),
)
