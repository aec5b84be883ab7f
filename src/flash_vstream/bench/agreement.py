"""Whether the fast engine gives the reference's answers: nano's, beside those of PyTorch in float32.

``measure_agreement`` compares what both say about the sample clips, ``run_agreement`` how often both are right about
annotated pictures.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flash_vstream.evaluate.pictures import ask_pictures, read_pictures, summary
from flash_vstream.memory import MemorySnapshot
from flash_vstream.pipeline import FlashVStream
from flash_vstream.sample_clips import CLIPS
from flash_vstream.video import read_frames
from flash_vstream.wheels import fetch

FPS = 2.0
TOKENS = 32
QUESTIONS = (
    "What is happening now?",
    "What do you see?",
    "Describe the scene.",
    "What was happening at the beginning?",
    "What was happening at 1s?",
    "What was happening at 2s?",
    "What happened last?",
    "What has changed?",
    "Where is this?",
    "Is it day or night?",
    "How many people are there?",
    "What are the people doing?",
    "What color is the largest thing?",
    "Is there a dog now?",
    "Did you see a car?",
    "Did you see a man in a suit?",
    "When did you see a bicycle?",
    "When did you see a rabbit?",
    "What happened after a man rode a bicycle?",
    "Describe what you see in every detail.",
)


def measure_agreement(pipeline: FlashVStream) -> dict[str, Any]:
    """Compare a pipeline's answers with those of the same model in PyTorch and float32, both greedy.

    ``equal`` is the share of word for word equal answers. ``lost`` is what the others lose in mean log-likelihood per
    token, as the reference sees it, on average: close to 0 where two continuations were as good as equally likely.
    """
    reference = FlashVStream.from_pretrained("nano", "cpu", torch.float32)
    questions, lost, equal = list(QUESTIONS), [], 0
    snapshots = _snapshots(pipeline)
    for snapshot in snapshots:
        ours = pipeline.generator.ask_many(pipeline.generator.read(snapshot), questions, TOKENS)
        prefix = reference.generator.read(snapshot)
        theirs = reference.generator.ask_many(prefix, questions, TOKENS)
        for question, pair in zip(questions, zip(ours, theirs, strict=True), strict=True):
            if pair[0] == pair[1]:
                equal += 1
            elif all(pair):
                own, best = reference.generator.likelihoods(prefix, question, pair)
                lost.append(best - own)
    count = len(snapshots) * len(questions)
    return {"answers": count, "equal": equal / count, "lost": statistics.fmean(lost) if lost else 0.0}


def _snapshots(pipeline: FlashVStream) -> list[MemorySnapshot]:
    """What the memory holds after every second of the sample clips, each clip a stream of its own."""
    found = []
    for clip in fetch(list(CLIPS)):
        stream = pipeline.new_stream()
        for frame in read_frames(clip, FPS, pipeline.processor.image_processor.size):
            stream.write([frame.image], [frame.time])
            if stream.frames % int(FPS) == 0:
                found.append(stream.snapshot())
    return found[:: max(1, len(found) // 10)][:10]


def run_agreement(data: Path, pictures: int, model: str = "nano") -> None:
    """Ask a model in its default engine, and the same weights in PyTorch and float32, about annotated pictures.

    Prints both scores for each kind of question; the last line on stdout is JSON. ``data`` as for ``eval pictures``.
    Raises ``UserError`` if it has no such pictures.
    """
    shown, questions = read_pictures(data, "val", pictures, seed=0)
    pipeline = FlashVStream.from_pretrained(model)
    ours = ask_pictures(pipeline, shown, questions, seed=0)
    engine = pipeline.generator.engine.name
    del pipeline
    theirs = ask_pictures(FlashVStream.from_pretrained(model, "cpu", torch.float32), shown, questions, seed=0)
    report = {"model": model, "engine": engine, "pictures": len(shown), **compared(ours, theirs)}
    console = Console(stderr=True)
    console.print(f"{model} in {engine}, and in PyTorch and float32: {len(ours)} questions, {len(shown)} pictures")
    for kind, score in report["scores"].items():
        console.print(f"  {kind}: {score['ours']:.1%}, and {score['reference']:.1%}")
    console.print(
        f"  equal answers {report['equal']:.1%}; right alone {report['gained']}, wrong alone {report['lost']}"
    )
    print(json.dumps(report))


def compared(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How rows of ``ask_pictures`` differ from those of a reference about the same questions.

    ``equal`` is the share of word for word equal replies, ``gained`` and ``lost`` count replies that are right while
    the reference's is wrong, and the other way round; ``points`` is what that changes in the share of right replies.
    """
    pairs = list(zip(ours, theirs, strict=True))
    gained = sum(own["correct"] and not other["correct"] for own, other in pairs)
    lost = sum(other["correct"] and not own["correct"] for own, other in pairs)
    mine, reference = summary(ours), summary(theirs)
    kinds = [kind for kind in mine if kind != "questions"]
    return {
        "questions": len(pairs),
        "equal": sum(own["reply"] == other["reply"] for own, other in pairs) / len(pairs),
        "gained": gained,
        "lost": lost,
        "points": 100 * (gained - lost) / len(pairs),
        "scores": {kind: {"ours": mine[kind], "reference": reference[kind]} for kind in kinds},
    }
