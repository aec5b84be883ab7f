"""Record docs/page.gif: the web page while nano watches the demo's clips, and questions are asked on it.

Usage: python scripts/page_picture.py docs/page.gif (needs Chromium, and the packages of ``.[dev]``)
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from flash_vstream.sample_clips import DEMO_CLIPS
from flash_vstream.wheels import fetch

RATE, HEIGHT = 25, 360
SIZE, SHOWN_WIDTH = {"width": 1180, "height": 1240}, 860
STEP_SECONDS = 0.9
"""The time between two pictures of the page."""
QUESTIONS = {5.0: "Where is this?", 11.0: "What is happening now?", 20.0: "Did you see a man in a car?"}
"""What is asked, at seconds of stream time."""
EVENT = "a man on a bicycle"
"""What the page alerts about."""


def main(path: str) -> None:
    """Serve the clips as one stream, ask about it on the page, and write the pictures of the page as a GIF."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        join_clips(Path(folder) / "clips.mp4")
        command = [sys.executable, "-m", "flash_vstream", "serve", "--port", "0", "--fps", "2"]
        command += ["--stream", "clips=clips.mp4"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        try:
            assert server.stdout is not None
            url = re.search(r"http://[\w.:]+", server.stdout.readline())
            assert url is not None
            chromium = shutil.which("chromium") or shutil.which("chromium-browser")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            write_gif(record(browser.new_page(viewport=SIZE), url[0]), Path(path))
        finally:
            server.terminate()
            server.wait()


def join_clips(path: Path) -> None:
    """The demo's clips one after another, centred in pictures of 16 to 9."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = HEIGHT * 16 // 9, HEIGHT, "yuv420p"
        number = 0
        for clip in fetch(list(DEMO_CLIPS)):
            with av.open(str(clip)) as source:
                for frame in source.decode(video=0):
                    picture = frame.to_image()
                    picture.thumbnail((stream.width, stream.height))
                    if picture.height < HEIGHT:
                        picture = picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT))
                    whole = Image.new("RGB", (stream.width, stream.height))
                    whole.paste(picture, ((stream.width - picture.width) // 2, 0))
                    shown = av.VideoFrame.from_image(whole)
                    shown.pts, shown.time_base, number = number, Fraction(1, RATE), number + 1
                    container.mux(stream.encode(shown))
        container.mux(stream.encode())


def record(page: Page, url: str) -> list[Image.Image]:
    """Pictures of the page from the first frame to the last answer."""
    page.goto(url)
    page.wait_for_selector("#picture[src^='blob:']")
    page.fill("#tell [name=event]", EVENT)
    page.press("#tell [name=event]", "Enter")
    waiting, shots, idle = dict(QUESTIONS), [], 0
    while idle < 3:
        minutes, seconds = page.inner_text("#clock").split(":")
        now = 60 * int(minutes) + int(seconds)
        for moment in [moment for moment in waiting if now >= moment]:
            page.fill("#question", waiting.pop(moment))
            page.press("#question", "Enter")
        shots.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        idle += page.inner_text("#state") == "ended" and not waiting
        time.sleep(STEP_SECONDS)
    return shots


def write_gif(shots: list[Image.Image], path: Path) -> None:
    """The pictures as a GIF with one palette, the last one shown longest."""
    height = round(shots[0].height * SHOWN_WIDTH / shots[0].width)
    small = [shot.resize((SHOWN_WIDTH, height), Image.Resampling.LANCZOS) for shot in shots]
    palette = small[-1].quantize(128)
    frames = [shot.quantize(palette=palette, dither=Image.Dither.NONE) for shot in small]
    durations = [round(1000 * STEP_SECONDS)] * (len(frames) - 1) + [5000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
