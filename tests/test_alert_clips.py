"""Clips of alerts, over a real server that records a real video."""

import io
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import pytest

from flash_vstream.serve import alert_clips
from flash_vstream.serve.recordings import _frames_in
from helpers.cli import run
from helpers.server import Server, serving
from helpers.videos import write_video
from helpers.waiting import until

ANYTHING = 1e-9
RATE = 4
SECONDS = 8  # the grey level rises by 32 a second


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=RATE * SECONDS, rate=RATE)


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(quick_folder, state):
    with serving(str(quick_folder), "--state", str(state), "--record", "64MB") as running:
        yield running


def told(server: Server, stream: str, **rule) -> dict:
    """The first alert of a watch that anything satisfies."""
    watch = {"event": "anything", "threshold": ANYTHING, "min_seconds": 0, **rule}
    status, body = server.call("POST", f"/v1/streams/{stream}/watches", watch)
    assert status == 201, body
    return server.wait_for(f"/v1/streams/{stream}/alerts", lambda _, alerts: alerts != [], 120)[0]


def fetch(server: Server, path: str, **headers: str):
    """Status, headers and body, also of an error."""
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def greys(clip: bytes) -> list[tuple[float, float]]:
    """The times of a clip's frames, and the grey level of their right halves."""
    with av.open(io.BytesIO(clip)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [(at, float(image[8:-8, image.shape[1] * 5 // 8 : -8].mean())) for at, image in frames]


def recorded_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.mjpeg"))


def first_recorded(folder: Path) -> float:
    """The time of the first frame that was recorded of a stream."""
    return min(frame.time for path in folder.rglob("*.mjpeg") for frame in _frames_in(path))


def test_a_clip_shows_the_seconds_around_its_alert(server, state, video):
    server.watch("door", video, fps=RATE)
    alert = told(server, "door")
    assert alert["clip"] == f"/v1/alerts/{alert['id']}/clip"
    status, headers, clip = fetch(server, alert["clip"])  # at once: the answer waits for what is still to come
    assert (status, headers["content-type"], headers["accept-ranges"]) == (200, "video/mp4", "bytes")
    begin = float(headers["x-stream-time"])
    shown = greys(clip)[:-1]  # the last is repeated, so that it is shown for a while
    for at, grey in shown:
        assert grey == pytest.approx(32 * (begin + at), abs=6)
    last = begin + shown[-1][0]
    first = first_recorded(state / "recordings" / "door")  # a busy machine skips frames of a live stream
    assert begin <= max(first, alert["began"] - alert_clips.AROUND_SECONDS) + 1 / RATE
    assert last >= min(SECONDS - 1, alert["time"] + alert_clips.AROUND_SECONDS - 1)
    assert last <= alert["time"] + alert_clips.AROUND_SECONDS
    assert any(abs(begin + at - alert["time"]) < 1e-3 for at, _ in shown)


def test_parts_of_a_clip_can_be_asked_for(server):
    (alert, *_) = server.call("GET", "/v1/streams/door/alerts")[1]
    _, headers, whole = fetch(server, alert["clip"])
    assert b"moov" in whole[:64]  # a player can begin with the first part
    status, part_headers, part = fetch(server, alert["clip"], range="bytes=100-299")
    assert (status, part) == (206, whole[100:300])
    assert part_headers["content-range"] == f"bytes 100-299/{len(whole)}"
    assert part_headers["etag"] == headers["etag"]
    assert fetch(server, alert["clip"], range="bytes=-50")[2] == whole[-50:]
    assert fetch(server, alert["clip"], range="bytes=99999999-")[0] == 416
    assert server.call("HEAD", alert["clip"]) == (200, b"")
    page = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "video"}
    assert fetch(server, alert["clip"], **page)[0] == 403


def test_a_stream_can_be_left_out_and_taken_in(server, state, video):
    status, body = server.call(
        "POST", "/v1/streams", {"name": "hall", "source": str(video), "loop": True, "fps": RATE, "record": False}
    )
    assert (status, body["recorded"]) == (201, False)
    alert = told(server, "hall", when="lasts", cooldown_seconds=1)
    assert alert["clip"] is None
    status, _, body = fetch(server, f"/v1/alerts/{alert['id']}/clip")
    assert status == 404
    assert b"was not recorded" in body
    assert not (state / "recordings" / "hall").exists()
    status, body = server.call("PATCH", "/v1/streams/hall", {"record": True})
    assert (status, body["recorded"]) == (200, True)
    until(lambda: recorded_bytes(state / "recordings" / "hall"))
    newest = server.wait_for("/v1/streams/hall/alerts", lambda _, alerts: alerts[-1]["clip"], 120)[-1]
    assert fetch(server, newest["clip"])[0] == 200
    status, body = server.call("PATCH", "/v1/streams/hall", {"name": "lobby"})
    assert (status, body["recorded"]) == (200, True)
    assert fetch(server, newest["clip"])[0] == 200
    assert not (state / "recordings" / "hall").exists()


def test_a_recording_is_deleted_with_its_stream(server, state):
    assert recorded_bytes(state / "recordings" / "lobby")
    alert = server.call("GET", "/v1/streams/lobby/alerts")[1][-1]
    assert server.call("DELETE", "/v1/streams/lobby")[0] == 204
    assert not (state / "recordings" / "lobby").exists()
    assert fetch(server, alert["clip"])[0] == 404


def test_frames_that_are_gone_are_said_to_be(server, state):
    (alert, *_) = server.call("GET", "/v1/streams/door/alerts")[1]
    assert fetch(server, alert["clip"])[0] == 200
    for path in (state / "recordings" / "door").iterdir():
        path.unlink()
    assert fetch(server, alert["clip"])[0] == 200  # still at hand
    server.call("POST", "/v1/streams", {"name": "brief", "source": "push"})
    server.call("DELETE", "/v1/streams/brief")  # forgets what is at hand
    status, _, body = fetch(server, alert["clip"])
    assert status == 404
    assert b"not kept any more" in body
    assert fetch(server, "/v1/alerts/none/clip")[0] == 404


def test_what_is_recorded_is_in_the_metrics(server):
    text = server.call("GET", "/metrics")[1].decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if "record" in line and line[0] != "#")
    assert float(figures["flash_vstream_frames_recorded"]) > RATE * SECONDS / 2
    assert {"flash_vstream_recorded_bytes", "flash_vstream_frames_not_recorded"} <= figures.keys()


def test_kills_leave_a_recording_that_goes_on_and_can_be_shown(quick_folder, video, tmp_path):
    folder = tmp_path / "recordings" / "door"
    options = ("--state", str(tmp_path), "--record", "64MB")
    with serving(str(quick_folder), *options) as server:
        server.watch("door", video, fps=RATE, loop=True)
        alert = told(server, "door", cooldown_seconds=3600)
        (worker,) = server.children()["frame"]
        os.kill(worker, signal.SIGKILL)
        size = recorded_bytes(folder)
        until(lambda: recorded_bytes(folder) > size)
        assert fetch(server, alert["clip"])[0] == 200
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    size = recorded_bytes(folder)
    with serving(str(quick_folder), *options) as server:
        status, headers, clip = fetch(server, alert["clip"])
        assert status == 200
        begin = float(headers["x-stream-time"])
        assert any(abs(begin + at - alert["time"]) < 1e-3 for at, _ in greys(clip))
        until(lambda: recorded_bytes(folder) > size)


def test_a_recording_needs_a_place(quick_folder):
    done = run("serve", "--port", "0", "--model", quick_folder, "--record", "2GB")
    assert (done.returncode, "--record needs --state" in done.stderr) == (2, True)


def test_a_clip_that_is_waited_for_does_not_wait_for_ever(monkeypatch):
    class Streams:
        newest = None

        def of(self, _):
            return self

        def will_record(self, _):
            return True

    clips = alert_clips.AlertClips(Streams(), Streams())
    alert = alert_clips.SavedAlert(1, "a", "w", "door", {"began": 7.0, "time": 7.0, "clock": time.time()})
    assert clips._may_go_on(alert, 1.0)
    assert not clips._may_go_on(alert, 11.0)
    Streams.newest = 12.0
    assert not clips._may_go_on(alert, 1.0)
    clips.close()
