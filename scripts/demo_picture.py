"""Draw docs/demo.jpg: the demo's frames, with its questions and nano's answers where they were asked.

Usage: python scripts/demo_picture.py docs/demo.jpg
"""

import json
import subprocess
import sys

from flash_vstream.cli.demo import demo_frames
from flash_vstream.evaluate.plots import pyplot
from flash_vstream.sample_clips import DEMO_CLIPS
from flash_vstream.wheels import fetch

FRAMES = 9
SIZE = 256
WIDTH, PICTURES, LINE = FRAMES * 1.5, 1.45, 0.27
"""Inches: the figure's width, the height of the row of frames, and that of a line of text."""


def main(path: str) -> None:
    """Run the demo and draw what it said under what it saw."""
    done = subprocess.run([sys.executable, "-m", "flash_vstream", "demo", "--json"], stdout=subprocess.PIPE, check=True)
    answers = json.loads(done.stdout)["answers"]
    frames = list(demo_frames(fetch(list(DEMO_CLIPS)), SIZE))
    moments = sorted({answer["stream_time"] for answer in answers})
    height = PICTURES + LINE * (len(answers) + len(moments) / 2 + 1)
    figure = pyplot().figure(figsize=(WIDTH, height), dpi=110)
    for place in range(FRAMES):
        frame = frames[round(place * (len(frames) - 1) / (FRAMES - 1))]
        axes = figure.add_axes((place / FRAMES + 0.003, 1 - PICTURES / height, 1 / FRAMES - 0.006, PICTURES / height))
        axes.imshow(frame.image)
        axes.set_axis_off()
        axes.set_title(f"{frame.time:.0f} s", fontsize=10, y=-0.17)
    down = PICTURES + 1.5 * LINE
    for moment in moments:
        figure.text(0.01, 1 - down / height, f"asked at {moment:.0f} s", fontsize=10, color="gray")
        for answer in answers:
            if answer["stream_time"] == moment:
                figure.text(0.12, 1 - down / height, answer["question"], fontsize=11)
                figure.text(0.45, 1 - down / height, answer["answer"], fontsize=11, weight="bold")
                down += LINE
        down += LINE / 2
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1])
