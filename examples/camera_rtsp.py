"""Watch a camera over RTSP and ask about it at intervals.

    python examples/camera_rtsp.py rtsp://user:password@camera.local/stream
    python examples/camera_rtsp.py rtsp://camera.local/stream --every 30 --question "Is anybody at the door?"

The camera is read and encoded in processes of their own, so an answer never delays a frame, and a
camera that goes away is reconnected while this program keeps answering from what was seen.
"""

import argparse
import time
from typing import TYPE_CHECKING

from flash_vstream.errors import UserError

if TYPE_CHECKING:
    from flash_vstream.live.streams import LiveStreams

PATIENCE_SECONDS = 60.0


def wait_for_first_frame(live: "LiveStreams", name: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while live.status(name).time is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"no frame within {PATIENCE_SECONDS:.0f} s: {live.status(name).error or 'the camera is silent'}"
            )
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--question", default="What is happening now?")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between questions")
    parser.add_argument("--count", type=int, default=6, help="how many times to ask")
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second to look at")
    parser.add_argument("--model", default="nano")
    options = parser.parse_args()

    # Imported here, since the worker processes import this file too, and not all of them need torch.
    from flash_vstream import FlashVStream
    from flash_vstream.live.streams import LiveStreams
    from flash_vstream.video.sources import Source

    source = Source(options.url, fps=options.fps)  # a bad address fails here, before anything slow
    pipeline = FlashVStream.from_pretrained(options.model)
    with LiveStreams(options.model) as live:
        live.add("camera", source)
        wait_for_first_frame(live, "camera")
        for i in range(options.count):
            if i:
                time.sleep(options.every)
            snapshot = live.snapshot("camera", pipeline)  # immutable, while the stream continues
            answer = pipeline.ask(snapshot, options.question).finish()
            seen = f"{live.status('camera').state}, {snapshot.frames} frames seen"
            print(f"{answer.stream_time:6.1f} s  {answer.text}  ({seen})", flush=True)


# The guard is required for the same reason.
if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"camera_rtsp: {error}") from None
