"""Failures and recovery, one at a time: kills, networks, clocks, hostile files. See test_chaos.py for all at once."""

import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from flash_vstream.errors import UserError
from flash_vstream.video import read_frames
from flash_vstream.video.capture import Capture
from flash_vstream.video.sources import Source
from helpers.rtsp import free_port, rtsp_serving
from helpers.server import serving
from helpers.videos import write_video
from helpers.waiting import until

HERE = Path(__file__).parent
OUTAGE_SECONDS = float(os.environ.get("FLASH_VSTREAM_OUTAGE", "2"))
"""How long the RTSP server is down; docs/reliability.md reports the result for 30 s."""


# --- kill -9 (tests/test_chaos.py kills every process, and the server itself, among all else)


def test_a_file_is_taken_up_where_it_was_left(quick_folder, tmp_path):
    """A file that is watched once does not restart from the beginning when its reader or worker is killed."""
    video = write_video(tmp_path / "clip.mp4", frames=100)
    with serving(str(quick_folder)) as server:
        server.watch("once", video, fps=5)
        for kind in ("reader", "frame"):
            server.wait_for("/v1/streams/once", lambda _, body: body["state"] == "live" and body["time"] > 0, 120)
            os.kill(until(lambda kind=kind: server.children()[kind])[0], signal.SIGKILL)
        stream = server.wait_for("/v1/streams/once", lambda _, body: body["state"] == "ended", 180)
        assert stream["time"] == pytest.approx(9.8, abs=0.3)


# --- a real RTSP server


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_an_rtsp_server_that_goes_away_and_returns_in_another_size(tmp_path, transport):
    port = free_port()
    with rtsp_serving(port) as url:
        reader = Capture(Source(url, fps=5, size=32, transport=transport), str(tmp_path), silence=3)
        first = until(reader.newest)
        until(lambda: (frame := reader.newest()) is not None and frame.time > first.time)
    until(lambda: (reader.newest(), reader.status.state)[1] == "reconnecting", 30)
    assert "hidden" not in (reader.status.error or "")
    time.sleep(OUTAGE_SECONDS)
    with rtsp_serving(port, "640", "360") as url:
        started = time.monotonic()
        again = until(reader.newest, 30)
        print(f"frames again after {time.monotonic() - started:.1f} s")
        assert again.time > first.time + OUTAGE_SECONDS
        assert again.image.shape == (32, 32, 3)
    reader.close()


def test_lost_packets_cost_frames_and_nothing_else(tmp_path):
    """With 20% loss of RTP packets over UDP, frames keep arriving and times never go backwards."""
    with rtsp_serving(free_port(), "320", "240", "0.2") as url:
        reader = Capture(Source(url, fps=10, size=32, transport="udp"), str(tmp_path), silence=10)
        started = time.monotonic()
        frames = [until(reader.newest) for _ in range(10)]
        print(f"a frame every {(time.monotonic() - started) / 10:.2f} s")
        times = [frame.time for frame in frames]
        assert times == sorted(times)
        assert reader.status.restarts == 0
        assert {frame.image.shape for frame in frames} == {(32, 32, 3)}
        reader.close()


# --- HTTP: files, MJPEG, MPEG-TS and HLS


def _mjpeg(worker: http.server.BaseHTTPRequestHandler, pictures: list[bytes]) -> None:
    worker.send_response(200)
    worker.send_header("content-type", "multipart/x-mixed-replace; boundary=frame")
    worker.end_headers()
    for jpeg in pictures * 20:
        worker.wfile.write(b"--frame\r\ncontent-type: image/jpeg\r\ncontent-length: %d\r\n\r\n" % len(jpeg))
        worker.wfile.write(jpeg + b"\r\n")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    """A web server with a file, a transport stream, a playlist and an MJPEG camera."""
    import io

    from PIL import Image

    folder = tmp_path_factory.mktemp("site")
    write_video(folder / "clip.mp4", frames=30)
    write_video(folder / "clip.ts", frames=30)
    with av.open(str(folder / "list.m3u8"), "w", format="hls", options={"hls_time": "1"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(30):
            image = np.full((48, 64, 3), 8 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    pictures = []
    for i in range(5):
        file = io.BytesIO()
        Image.new("RGB", (64, 48), (50 * i, 0, 0)).save(file, "JPEG")
        pictures.append(file.getvalue())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/camera":
                _mjpeg(self, pictures)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["clip.mp4", "clip.ts", "list.m3u8", "camera"])
def test_http_sources_are_watched(site, tmp_path, path):
    reader = Capture(Source(f"{site}/{path}", fps=50, size=16), str(tmp_path))
    first = until(reader.newest)
    assert first.image.shape == (16, 16, 3)
    until(lambda: (frame := reader.newest()) is not None and frame.time > first.time)
    reader.close()


def test_a_playlist_from_the_network_opens_no_local_file(site, tmp_path):
    secret = write_video(tmp_path / "secret.ts", frames=10)
    worker = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    (tmp_path / "evil.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), worker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader = Capture(Source(f"http://127.0.0.1:{server.server_port}/evil.m3u8", size=16), str(tmp_path))
        until(lambda: (reader.newest(), reader.status.restarts)[1] >= 1)
        assert reader.status.came == 0
        reader.close()
        server.shutdown()


# --- malformed files


def test_a_change_of_size_in_mid_stream(tmp_path):
    parts = [write_video(tmp_path / f"{i}.ts", frames=10, size=size) for i, size in enumerate([(64, 48), (128, 96)])]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = list(read_frames(joined, None, 32))
    assert len(frames) >= 15
    times = [frame.time for frame in frames]
    assert times == sorted(times)


def test_a_4k_source_at_60_frames_a_second_is_kept_up_with(tmp_path):
    video = tmp_path / "4k.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mpeg4", rate=60)
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        blocks = np.random.default_rng(0).integers(0, 255, (135, 240, 3), np.uint8)
        picture = blocks.repeat(16, 0).repeat(16, 1)
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 8 * i, 1), format="rgb24").reformat(format="yuv420p")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    started = time.monotonic()
    list(read_frames(video, 2, 256))
    overload = max(0.0, (time.monotonic() - started) / 0.5 - 0.5)  # on machines that cannot decode at twice real time
    reader = Capture(Source(str(video), fps=2, size=256, loop=True), str(tmp_path))
    first, started = until(reader.newest), time.monotonic()
    time.sleep(2)
    newest = until(lambda: (frame := reader.newest()) is not None and frame.time > first.time and frame)
    behind = (time.monotonic() - started) - (newest.time - first.time)
    print(f"behind after two seconds: {behind:.2f} s")
    assert behind < 1 + 4 * overload
    assert newest.image.shape == (256, 256, 3)
    reader.close()


def test_a_thousand_mutated_files_neither_crash_nor_hang(tmp_path):
    """Every file gives frames or one clear error. Runs in a child process, so that a crash is noticed."""
    whole = [write_video(tmp_path / f"seed.{kind}", frames=12).read_bytes() for kind in ("mp4", "mkv", "ts", "avi")]
    for i in range(1000):
        rng = random.Random(i)
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        (tmp_path / f"mutated-{i}").write_bytes(data)
    script = "import sys; from test_reliability import read_all; read_all(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split())
    assert read + refused == 1000
    assert min(read, refused) > 50  # a mix of readable and unreadable mutations


def read_all(folder: str) -> None:
    """Read every mutated file; print how many gave frames and how many gave an error."""
    av.logging.set_level(None)
    read = refused = 0
    for path in sorted(Path(folder).glob("mutated-*")):
        try:
            read += len(list(read_frames(path, 5, 16))) > 0
        except UserError:
            refused += 1
    print(read, refused)
