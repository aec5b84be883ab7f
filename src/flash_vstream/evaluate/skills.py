"""nano's skills on streams composed of pictures that it was not trained on.

Streams and questions are seeded. Answers are checked against what the stream was made of, so no judge
is needed. ``now`` is scored by BLEU-4, everything else by accuracy.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.evaluate.captioning import bleu4
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.captions import PictureSet, play
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.grading import is_correct
from flash_vstream.synthetic.plans import StreamPlan, StreamStyle, plan_stream
from flash_vstream.synthetic.questions import ASKERS, Question, stream_questions

FAR = 4
"""A question is about the far past when its span ends before the newest ``FAR`` frames."""

MIX = {kind: 1.0 for kind in ASKERS if kind != "story"} | {"occurrence": 3.0, "validation": 1.5, "when": 1.5}


@dataclass(frozen=True)
class GradedAnswer:
    """A question, the model's answer, whether it is correct, and whether it is about the far past."""

    question: Question
    answer: str
    correct: bool
    far: bool


def skill_streams(
    pictures: PictureSet, scenes: tuple[int, int], streams: int, seed: int, frames: tuple[int, int]
) -> list[StreamPlan]:
    """Seeded stream plans over the pictures."""
    style = StreamStyle(scenes=scenes, frames=frames)
    keys = sorted(pictures.captions)
    return [plan_stream(keys, style, random.Random(f"skills/{seed}/{i}")) for i in range(streams)]


def ask_streams(
    pipeline: FlashVStream,
    pictures: PictureSet,
    plans: Sequence[StreamPlan],
    memory: str,
    questions: int,
    seed: int,
) -> list[GradedAnswer]:
    """Answer and grade each plan's questions, using the given memory method."""
    events = Events(pictures.captions)
    graded = []
    for i, plan in enumerate(track(plans, memory, console=Console(stderr=True))):
        rng = random.Random(f"questions/{seed}/{i}")
        method = MemoryMethod(memory, pipeline.model)
        for feature, moment in zip(*play(plan, pictures), strict=True):
            method.write(float(moment), feature)
        prefix = pipeline.generator.read(method.snapshot(), method.time_stamps)
        wanted = stream_questions(plan, events, rng, MIX, questions)
        answers = pipeline.generator.ask_many(prefix, [question.text for question in wanted], max_new_tokens=48)
        for question, answer in zip(wanted, answers, strict=True):
            correct = is_correct(question, answer, plan, pictures.captions)
            newest = plan.shots[max(0, len(plan.shots) - FAR)].time
            graded.append(GradedAnswer(question, answer, correct, question.span[1] < newest))
    return graded


def summary(graded: Sequence[GradedAnswer], captions: dict[str, list[str]]) -> dict[str, Any]:
    """Accuracy per kind and for the far past, BLEU-4 for ``now``, share of "yes", and question count."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for item in graded:
        if item.question.kind != "now":
            by_kind[item.question.kind].append(item.correct)
            if item.far:
                by_kind["far past"].append(item.correct)
    now = [item for item in graded if item.question.kind == "now"]
    scores: dict[str, Any] = {kind: sum(right) / len(right) for kind, right in sorted(by_kind.items())}
    if now:
        scores["now BLEU-4"] = bleu4([item.answer for item in now], [captions[item.question.truth] for item in now])
    yes = Counter(item.answer.lower().startswith("yes") for item in graded if item.question.truth in ("yes", "no"))
    scores["share of yes"] = yes[True] / max(1, yes.total())
    return scores | {"questions": len(graded)}


def run_skills(
    data: Path,
    model_name: str,
    methods: Sequence[str],
    scenes: tuple[int, int],
    streams: int,
    questions: int,
    seed: int,
    frames: tuple[int, int],
    split: str = "test",
) -> dict[str, Any]:
    """Measure every memory method on the same questions."""
    pictures = PictureSet.load(data, split)
    pipeline = FlashVStream.from_pretrained(model_name)
    plans = skill_streams(pictures, scenes, streams, seed, frames)
    results, counts = {}, Counter[str]()
    for name in methods:
        graded = ask_streams(pipeline, pictures, plans, name, questions, seed)
        results[name] = summary(graded, pictures.captions)
        counts = Counter(item.question.kind for item in graded)  # the same for every memory
    minutes = sum(plan.duration - plan.shots[0].time for plan in plans) / len(plans) / 60
    setting = {"model": model_name, "scenes": list(scenes), "frames": list(frames), "streams": streams, "seed": seed}
    return {**setting, "mean_minutes": round(minutes, 2), "counts": dict(counts), "memories": results}


def print_skills(report: dict[str, Any]) -> None:
    """Print the report as a table, with one column per memory."""
    methods = report["memories"]
    table = Table("skill", *methods)
    kinds = list(dict.fromkeys(kind for scores in methods.values() for kind in scores))
    for kind in kinds:
        cells = [scores.get(kind) for scores in methods.values()]
        table.add_row(kind, *(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console().print(table)
