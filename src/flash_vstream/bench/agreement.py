"""Whether the fast engine gives the reference's answers: nano's on real clips, beside PyTorch's in float32."""

import statistics
from typing import Any

import torch

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
    "Tell me everything that you have seen so far, from the first scene to the last.",
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
