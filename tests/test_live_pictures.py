"""A stream's pictures as Motion JPEG over HTTP."""

import io
import json
import signal
import urllib.request
from contextlib import contextmanager
from email.parser import BytesHeaderParser
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from flash_vstream.live.published import Picture
from flash_vstream.serve import live_pictures
from helpers.asynchronous import run_async
from helpers.server import Server, serving
from helpers.videos import write_video


@pytest.fixture(scope="module")
def server(quick_folder, tmp_path_factory):
    video = write_video(tmp_path_factory.mktemp("live") / "clip.mp4", frames=20)
    with serving(str(quick_folder), "--stream", f"door={video}", "--fps", "5") as running:
        yield running


@contextmanager
def watching(server: Server, name: str):
    with urllib.request.urlopen(f"{server.url}/v1/streams/{name}/live", timeout=60) as response:
        assert response.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
        assert response.readline() == b"--frame\r\n"
        yield response


def next_picture(response) -> tuple[float, Image.Image] | None:
    """The stream time and picture of the next part; None at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = response.readline()
        if not line:
            return None
        head += line
    headers = BytesHeaderParser().parsebytes(head)
    picture = Image.open(io.BytesIO(response.read(int(headers["content-length"]))))
    assert (picture.format, headers["content-type"]) == ("JPEG", "image/jpeg")
    assert response.read(len(b"\r\n--frame\r\n")) == b"\r\n--frame\r\n"
    return float(headers["x-stream-time"]), picture


@contextmanager
def sending(server: Server, name: str):
    """Create a pushed stream and yield a function that sends it a picture, or one of a grey level."""
    assert server.call("POST", "/v1/streams", {"name": name, "source": "push", "fps": 30})[0] == 201
    with connect(f"{server.url.replace('http', 'ws')}/v1/streams/{name}/frames") as socket:

        def send(frame: int | bytes) -> None:
            if isinstance(frame, int):
                file = io.BytesIO()
                Image.new("RGB", (64, 64), (frame, frame, frame)).save(file, "PNG")
                frame = file.getvalue()
            socket.send(frame)
            assert "frame" in json.loads(socket.recv())

        yield send


def test_a_stream_that_ended_gives_its_last_picture_and_ends(server):
    body = server.wait_for("/v1/streams/door", lambda _, body: body["state"] == "ended")
    with watching(server, "door") as response:
        moment, picture = next_picture(response)
        assert moment == body["time"]
        assert picture.width / picture.height == pytest.approx(4 / 3, rel=0.01)  # the whole frame
        assert next_picture(response) is None


@pytest.mark.parametrize("size", [(640, 360), (90, 160), (3000, 40)])
def test_the_picture_of_a_pushed_frame_is_the_whole(server, size):
    """Not only the square that the model sees: its left edge is there, and its proportions are kept."""
    picture = Image.new("RGB", size, (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, size[0] // 8, size[1]))
    file = io.BytesIO()
    picture.save(file, "PNG")
    name = f"whole-{size[0]}"
    with sending(server, name) as send, watching(server, name) as response:
        send(file.getvalue())
        _, seen = next_picture(response)
    assert max(seen.size) <= 640
    assert seen.width / seen.height == pytest.approx(size[0] / size[1], rel=0.1)
    grey = np.asarray(seen.convert("L"))
    assert grey[:, : seen.width // 16].mean() > 200
    assert grey[:, seen.width // 2 :].mean() < 20


def test_each_frame_is_pushed_as_it_comes(server):
    with sending(server, "grey") as send, watching(server, "grey") as response:
        before = -1.0
        for grey in (40, 120, 200):
            send(grey)
            moment, picture = next_picture(response)
            assert abs(np.asarray(picture).mean() - grey) < 4
            assert moment > before
            before = moment


def test_it_ends_when_the_stream_is_deleted(server):
    with sending(server, "short") as send, watching(server, "short") as response:
        send(100)
        assert next_picture(response) is not None
        server.call("DELETE", "/v1/streams/short")
        assert next_picture(response) is None


def test_frames_that_are_counted_anew_are_shown(monkeypatch):
    """As after a memory was lost: fewer frames are kept than before."""
    status = SimpleNamespace(kept=5, time=1.0, state="live")
    service = SimpleNamespace(status=lambda _: status, shared=lambda _: None)
    monkeypatch.setattr(live_pictures, "read_picture", lambda _: Picture(b"%d" % status.kept, 1.0, status.kept))

    async def show() -> list[bytes]:
        parts = live_pictures._parts(service, "door", lambda: False)
        shown = [await anext(parts)]
        for status.kept in (5, 2, 3):
            with anyio.fail_after(10):
                shown.append(await anext(parts))
        await parts.aclose()
        return shown

    assert [part.split()[-2] for part in run_async(show)[1:]] == [b"5", b"2", b"3"]


def test_there_is_none_of_a_stream_that_is_not_there(server):
    assert server.call("GET", "/v1/streams/none/live")[0] == 404


def test_a_server_that_is_ended_does_not_wait_for_those_who_watch(quick_folder):
    with serving(str(quick_folder)) as server:
        with sending(server, "push") as send, watching(server, "push") as response:
            send(100)
            assert next_picture(response) is not None
            server.process.send_signal(signal.SIGINT)
            while next_picture(response) is not None:  # the response ends by itself, with no error in the log
                pass
        server.process.wait(timeout=60)
