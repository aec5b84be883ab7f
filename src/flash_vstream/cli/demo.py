"""``demo``: three real clips played in turn as one stream, and questions at three times."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flash_vstream.cli.ask import Session
from flash_vstream.cli.options import Json
from flash_vstream.cli.terminal import load_pipeline
from flash_vstream.sample_clips import DEMO_CLIPS
from flash_vstream.wheels import fetch

if TYPE_CHECKING:
    from flash_vstream.video import Frame

FPS = 2.0
QUESTIONS: tuple[tuple[float | None, list[str]], ...] = (
    (6.0, ["Where is this?"]),
    (12.0, ["What is happening now?"]),
    (
        None,
        [
            "Is there a person?",
            "Did you see a car?",
            "When did you see a man on a bicycle?",
        ],
    ),
)
"""When what is asked; None is the end."""


def demo_frames(clips: list[Path], size: int) -> "Iterator[Frame]":
    """Frames ``[size, size, 3]`` of the clips, joined into one stream with continuous times."""
    from flash_vstream.video import Frame, read_frames

    start = 0.0
    for clip in clips:
        newest = start
        for frame in read_frames(clip, FPS, size):
            newest = start + frame.time
            yield Frame(newest, frame.image)
        start = newest + 1 / FPS


def demo(as_json: Json = False) -> None:
    """Watch short real clips (a street, a man in a car, a city at night) and answer questions as they go on."""
    pipeline = load_pipeline("nano")
    clips = fetch(list(DEMO_CLIPS))
    frames = demo_frames(clips, pipeline.processor.image_processor.size)
    report = Session(pipeline, as_json).run(frames, QUESTIONS, None)
    if as_json:
        print(json.dumps({"model": "nano", "fps": FPS, **report}))
