"""Draw docs/demo.jpg: the demo's frames, with its questions and nano's answers where they were asked.

Usage: python scripts/demo_picture.py docs/demo.jpg
"""

import json
import subprocess
import sys

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from flash_vstream.cli.demo import demo_frames
from flash_vstream.sample_clips import DEMO_CLIPS
from flash_vstream.wheels import fetch

FRAMES = 9
SIZE = 256


def main(path: str) -> None:
    """Run the demo and draw what it said under what it saw."""
    done = subprocess.run([sys.executable, "-m", "flash_vstream", "demo", "--json"], stdout=subprocess.PIPE, check=True)
    answers = json.loads(done.stdout)["answers"]
    frames = list(demo_frames(fetch(list(DEMO_CLIPS)), SIZE))
    moments = sorted({answer["stream_time"] for answer in answers})
    figure = plt.figure(figsize=(FRAMES * 1.5, 1.75 + 0.27 * len(answers) + 0.135 * len(moments)), dpi=110)
    top = 1.45 / figure.get_figheight()
    for place in range(FRAMES):
        frame = frames[round(place * (len(frames) - 1) / (FRAMES - 1))]
        axes = figure.add_axes((place / FRAMES + 0.003, 1 - top, 1 / FRAMES - 0.006, top))
        axes.imshow(frame.image)
        axes.set_axis_off()
        axes.set_title(f"{frame.time:.0f} s", fontsize=10, y=-0.17)
    row = 1.85 / figure.get_figheight()
    step = 0.27 / figure.get_figheight()
    for moment in moments:
        figure.text(0.01, 1 - row, f"asked at {moment:.0f} s", fontsize=10, color="gray")
        for answer in answers:
            if answer["stream_time"] == moment:
                figure.text(0.12, 1 - row, answer["question"], fontsize=11)
                figure.text(0.45, 1 - row, answer["answer"], fontsize=11, weight="bold")
                row += step
        row += step / 2
    figure.savefig(path)


if __name__ == "__main__":
    main(sys.argv[1])
