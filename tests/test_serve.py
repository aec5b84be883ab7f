"""The HTTP API from the outside: real processes, real files, OpenAI's own client."""

import base64
import contextlib
import io
import json
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flash_vstream.errors import UserError
from flash_vstream.serve import app as app_module
from flash_vstream.serve.app import _add_push, pictures_of
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.serve.service import Limits
from flash_vstream.video.sources import Source
from helpers.cli import run
from helpers.server import serving
from helpers.videos import write_video
from helpers.waiting import until


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("served") / "clip.mp4", frames=20)


@pytest.fixture(scope="module")
def server(tiny_folder, video):
    with serving(str(tiny_folder), "--stream", f"door={video}", "--fps", "5") as running:
        running.wait_for("/v1/streams/door", lambda status, body: body["time"] is not None)
        yield running


def events_of(data: bytes) -> list[tuple[str, dict]]:
    found = []
    for block in data.decode().strip().split("\n\n"):
        kind, _, value = block.partition("\ndata: ")
        found.append((kind.removeprefix("event: "), json.loads(value)))
    return found


# --- streams


def test_streams_come_and_go(server, video):
    told = server.watch("hall", video, loop=True, fps=5)
    assert told["state"] == "live"
    assert [stream["name"] for stream in server.call("GET", "/v1/streams")[1]] == ["door", "hall"]
    later = server.wait_for("/v1/streams/hall", lambda _, body: body["kept"] > told["kept"] + 3)
    assert later["lag"] < 5
    assert server.call("POST", "/v1/streams", {"name": "hall", "source": str(video)})[0] == 409
    assert server.call("DELETE", "/v1/streams/hall")[0] == 204
    assert server.call("GET", "/v1/streams/hall")[0] == 404


def test_the_memory_is_told_with_pictures(server):
    server.wait_for("/v1/streams/door", lambda _, body: body["state"] == "ended")
    memory = server.call("GET", "/v1/streams/door/memory")[1]
    temporal = [slot for slot in memory["slots"] if slot["part"] == "temporal"]
    assert sum(slot["weight"] for slot in temporal) == memory["frames"] >= 2
    for slot in memory["slots"]:
        assert slot["start"] <= slot["mean"] <= slot["end"] <= memory["time"]
        picture = Image.open(io.BytesIO(base64.b64decode(slot["thumbnail"].partition(",")[2])))
        assert max(picture.size) == 128
    jpeg = server.call("GET", "/v1/streams/door/picture")[1]
    assert Image.open(io.BytesIO(jpeg)).size == (299, 224)  # whole


def test_questions_are_answered_and_kept(server):
    path = "/v1/streams/door/questions"
    server.wait_for("/v1/streams/door", lambda _, body: body["state"] == "ended")
    status, whole = server.call("POST", path, {"question": "what?", "max_new_tokens": 8})
    assert status == 200
    assert whole["stream_time"] == server.call("GET", "/v1/streams/door")[1]["time"]
    assert {slot["part"] for slot in whole["evidence"]} == {"abstract", "temporal", "retrieved", "spatial"}
    assert any(slot.get("thumbnail", "").startswith("data:image/jpeg") for slot in whole["evidence"])
    events = events_of(server.call("POST", path, {"question": "what?", "max_new_tokens": 8, "stream": True})[1])
    assert [kind for kind, _ in events[-2:]] == ["text", "done"]
    assert "".join(value["text"] for kind, value in events if kind == "text") == events[-1][1]["text"] == whole["text"]
    assert events[-1][1]["warm"]  # nothing changed since the memory was read for the previous question
    history = server.call("GET", "/v1/streams/door/history?limit=2")[1]
    assert [entry["answer"] for entry in history] == [whole["text"]] * 2
    older = server.call("GET", f"/v1/streams/door/history?before={history[-1]['id']}")[1]
    assert older[-1]["id"] == history[0]["id"]


def test_twenty_questions_at_once_are_all_answered(server):
    server.wait_for("/v1/streams/door", lambda _, body: body["state"] == "ended")
    ask = partial(server.call, "POST", "/v1/streams/door/questions")
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, [{"question": f"what is {i}?", "max_new_tokens": 6} for i in range(20)]))
    assert [status for status, _ in answers] == [200] * 20
    assert [body["question"] for _, body in answers] == [f"what is {i}?" for i in range(20)]


def test_a_connection_that_is_reset_after_its_request_takes_no_slot_along(server):
    server.wait_for("/v1/streams/door", lambda _, body: body["state"] == "ended")
    path = "/v1/streams/door/questions"
    body = json.dumps({"question": "what?", "max_new_tokens": 400, "stream": True}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    for _ in range(65):
        connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a FIN
        connection.sendall(head.encode() + b"\r\n" + body)
        connection.close()
    until(lambda: server.call("POST", path, {"question": "what?", "max_new_tokens": 1})[0] == 200)
    server.wait_for(
        "/v1/streams/door/history?limit=100",
        lambda _, rows: all(row["answer"] is not None or row["error"] for row in rows),
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/streams", {"name": "x", "source": "/none/such.mp4"}, 422),
        ("POST", "/v1/streams", {"name": "../x", "source": "push"}, 422),
        ("POST", "/v1/streams", {"name": "x", "source": "push", "fps": 0}, 422),
        ("POST", "/v1/streams", {"name": "x", "source": "push", "extra": 1}, 422),
        ("POST", "/v1/streams", b"{", 422),
        ("GET", "/v1/streams/none/memory", None, 404),
        ("GET", "/v1/streams/none/picture", None, 404),
        ("DELETE", "/v1/streams/none", None, 404),
        ("POST", "/v1/streams/none/questions", {"question": "what?"}, 404),
        ("POST", "/v1/streams/door/questions", {"question": "  "}, 422),
        ("POST", "/v1/streams/door/questions", {"question": "x" * 5000}, 422),
        ("POST", "/v1/streams/door/questions", {"question": "what?", "max_new_tokens": 0}, 422),
        ("GET", "/v1/streams/door/history?limit=0", None, 422),
        ("PUT", "/v1/streams", None, 405),
        ("GET", "/nowhere", None, 404),
    ],
)
def test_mistakes_get_one_clear_error(server, method, path, body, status):
    got, answer = server.call(method, path, body)
    assert got == status, answer
    assert answer["error"]["message"]
    assert answer["error"]["code"] == status


def test_a_stream_without_a_frame_says_so(server):
    server.call("POST", "/v1/streams", {"name": "quiet", "source": "push"})
    status, answer = server.call("POST", "/v1/streams/quiet/questions", {"question": "what?"})
    assert (status, "not shown a frame" in answer["error"]["message"]) == (409, True)
    server.call("DELETE", "/v1/streams/quiet")


def test_a_file_that_is_no_video_fails_and_says_why(server, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    server.call("POST", "/v1/streams", {"name": "text", "source": str(tmp_path / "text.mp4")})
    stream = server.wait_for("/v1/streams/text", lambda _, body: body["state"] == "failed")
    assert "not a video" in stream["error"]
    server.call("DELETE", "/v1/streams/text")


# --- pushed frames


def encoded(colour: tuple[int, int, int], kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(file, kind)
    return file.getvalue()


def test_frames_are_pushed_over_a_websocket(server):
    server.call("POST", "/v1/streams", {"name": "pushed", "source": "push", "fps": 30})
    with connect(server.url.replace("http", "ws") + "/v1/streams/pushed/frames") as sender:
        for i in range(4):
            sender.send(encoded((60 * i, 0, 0), "PNG" if i % 2 else "JPEG"))
            assert "frame" in json.loads(sender.recv(timeout=10))
            server.wait_for("/v1/streams/pushed", lambda _, body, i=i: body["kept"] == i + 1)
        sender.send(b"no picture")
        assert "not a JPEG" in json.loads(sender.recv(timeout=10))["error"]
        sender.send("text")
        assert "error" in json.loads(sender.recv(timeout=10))
        status, answer = server.call("POST", "/v1/streams/pushed/questions", {"question": "what?", "max_new_tokens": 4})
        assert status == 200
        assert 0 < answer["stream_time"] < 60
        server.call("DELETE", "/v1/streams/pushed")
        with pytest.raises(ConnectionClosed):  # noqa: PT012 - which send fails first is up to timing
            for _ in range(3):
                sender.send(encoded((0, 0, 0)))
                sender.recv(timeout=10)


def test_only_pushed_streams_take_frames(server):
    for name in ("door", "none"):
        with pytest.raises(InvalidStatus), connect(server.url.replace("http", "ws") + f"/v1/streams/{name}/frames"):
            pass


def test_pictures_are_bounded():
    with pytest.raises(ApiError, match="the limit is"):
        pictures_of(b"x" * 101, 16, 100)
    image, whole = pictures_of(encoded((9, 9, 9)), 16, 10_000)
    assert image.shape == (16, 16, 3)
    assert Image.open(io.BytesIO(whole)).size == (60, 40)


@contextlib.contextmanager
def pushing(senders: int, sink, decoding: int = 2):
    """Senders of frames to one stream, in this process."""
    source = Source("push", size=16)
    live = SimpleNamespace(source=lambda _: source)
    app = FastAPI()
    _add_push(app, SimpleNamespace(live=live, sink=lambda _: sink, limits=Limits()), anyio.CapacityLimiter(decoding))
    with TestClient(app) as client, contextlib.ExitStack() as sockets:
        yield [sockets.enter_context(client.websocket_connect("/v1/streams/a/frames")) for _ in range(senders)]


def test_a_sender_that_comes_back_skips_no_frame():
    sink = SimpleNamespace(taken=5, numbers=[])
    sink.write = lambda number, _: sink.numbers.append(number)
    with pushing(1, sink) as (sender,):
        for _ in range(2):
            sender.send_bytes(encoded((0, 0, 0)))
            assert "frame" in sender.receive_json()
    assert sink.numbers == [6, 7]


def test_few_pushed_pictures_are_decoded_at_once(monkeypatch):
    three = threading.Barrier(3)

    def decoded(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            three.wait(1)
        return np.zeros((16, 16, 3), np.uint8), b""

    monkeypatch.setattr(app_module, "pictures_of", decoded)
    sink = SimpleNamespace(taken=0, write=lambda *_: None)
    with pushing(3, sink) as senders:
        for sender in senders:
            sender.send_bytes(b"a picture")
        assert all("frame" in sender.receive_json() for sender in senders)
    assert three.broken


# --- what an operator sees


def test_health_metrics_and_the_document(server):
    assert server.call("GET", "/healthz")[1]["status"] == "ok"
    text = server.call("GET", "/metrics")[1].decode()
    for name in ("frames_kept_total", "lag_seconds", "encode_seconds", "write_seconds"):
        assert f'flash_vstream_{name}{{stream="door"}}' in text
    assert "flash_vstream_first_token_seconds_bucket" in text
    assert 'flash_vstream_worker_restarts_total{worker="frame"} 0.0' in text
    paths = server.call("GET", "/openapi.json")[1]["paths"]
    assert {"/v1/streams", "/v1/streams/{name}/questions", "/v1/chat/completions"} <= set(paths)


def test_state_outlives_the_server(quick_folder, video, tmp_path):
    with serving(str(quick_folder), "--state", str(tmp_path)) as first:
        first.watch("door", video, loop=True, fps=5)
        first.wait_for("/v1/streams/door", lambda _, body: body["kept"] >= 8)
        answer = first.call("POST", "/v1/streams/door/questions", {"question": "what?", "max_new_tokens": 4})[1]
        before = first.call("GET", "/v1/streams/door")[1]
    with serving(str(quick_folder), "--state", str(tmp_path)) as second:
        after = second.wait_for("/v1/streams/door", lambda _, body: body["gaps"] and body["time"] >= body["gaps"][0][1])
        (begin, end), *_ = after["gaps"]
        assert before["time"] <= begin < end <= after["time"]
        assert after["kept"] > before["kept"]
        memory = second.call("GET", "/v1/streams/door/memory")[1]
        assert min(slot["start"] for slot in memory["slots"]) == 0
        assert second.call("GET", "/v1/streams/door/history")[1][0]["answer"] == answer["text"]


def test_a_memory_that_cannot_be_read_is_set_aside(quick_folder, video, tmp_path):
    (tmp_path / "memories").mkdir()
    (tmp_path / "memories" / "door.safetensors").write_bytes(b"of another model")
    with serving(str(quick_folder), "--state", str(tmp_path), "--stream", f"door={video}") as server:
        server.wait_for("/v1/streams/door", lambda status, body: status == 200 and body["kept"] > 0)
        assert server.call("GET", "/healthz")[1]["workers"]["frame"]["restarts"] == 0
    assert (tmp_path / "memories" / "door.set-aside").read_bytes() == b"of another model"


# --- who may call, and what may be watched


def test_a_server_beyond_loopback_wants_a_token(quick_folder, video):
    refused = run("serve", "--model", str(quick_folder), "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "FLASH_VSTREAM_TOKEN" in refused.stderr
    folder = str(video.parent)
    options = ("--host", "0.0.0.0", "--allow-folder", folder, "--log-requests")
    with serving(str(quick_folder), *options, token="secret-token") as server:
        wrong = {"authorization": "Bearer wrong"}
        assert server.call("GET", "/v1/streams", headers=wrong)[0] == 401
        assert server.call("GET", "/v1/streams", headers={"authorization": ""})[0] == 401
        assert server.call("GET", "/healthz", headers=wrong)[0] == 200
        assert server.call("GET", "/", headers=wrong)[0] == 200
        server.watch("door", video)
        for source in (
            "/etc/passwd",
            "/dev/video0",
            "rtsp://127.0.0.1/1",
            "http://169.254.169.254/x",
            "rtsp://[::1]/1",
        ):
            status, answer = server.call("POST", "/v1/streams", {"name": "x", "source": source})
            assert status == 403, answer
        escape = f"{folder}/../../etc/passwd"
        assert server.call("POST", "/v1/streams", {"name": "x", "source": escape})[0] == 403
        server.call("POST", "/v1/streams", {"name": "cam", "source": "push"})
        address = server.url.replace("http", "ws") + "/v1/streams/cam/frames"
        with pytest.raises(InvalidStatus), connect(address):
            pass
        with connect(f"{address}?token=secret-token") as sender:
            sender.send(encoded((1, 2, 3)))
            assert "frame" in json.loads(sender.recv(timeout=10))
        log = server.log.read_text()
    assert '"event": "request"' in log
    assert "secret-token" not in log


def test_pages_of_elsewhere_and_rebound_names_are_turned_away(server):
    assert server.call("GET", "/v1/streams", headers={"origin": "https://evil.example"})[0] == 403
    assert server.call("GET", "/v1/streams", headers={"host": "evil.example"})[0] == 403
    assert server.call("GET", "/v1/streams", headers={"origin": server.url})[0] == 200


def test_bodies_are_bounded(server):
    status, answer = server.call("POST", "/v1/chat/completions", headers={"content-length": str(10**9)}, body=b"{}")
    assert (status, answer["error"]["type"]) == (413, "too_large")


@pytest.mark.parametrize("path", ["/v1/streams", "/v1/chat/completions"])
def test_deep_and_large_bodies_get_their_answer_and_freeze_nobody(server, path):
    bomb = b"[" + b"[]," * (10 * 2**20) + b"[]]"
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(server.call, "POST", path, bomb)
        while not refused.done():
            assert server.call("GET", "/healthz")[0] == 200
    assert refused.result()[0] == 413


def test_rules_of_access():
    open_to_all = AccessRules("0.0.0.0", "token", hosts=frozenset({"cam.internal"}))
    open_to_all.check_source("rtsp://cam.internal/1")
    open_to_all.check_source("rtsp://8.8.8.8/1")
    for source in ("rtsp://10.0.0.1/1", "http://192.168.1.1/x", "http://[::ffff:127.0.0.1]/x", "file.mp4"):
        with pytest.raises(ApiError):
            open_to_all.check_source(source)
    AccessRules().check_source("/etc/hosts")  # on loopback, the server belongs to its user
    with pytest.raises(UserError, match="token"):
        AccessRules("192.168.1.5")
    with pytest.raises(ApiError, match="bearer token"):
        open_to_all.check_caller({"host": "x", "authorization": "Basic token"})


def test_limits_on_streams(server):
    made = []
    for i in range(20):
        status, answer = server.call("POST", "/v1/streams", {"name": f"many-{i}", "source": "push"})
        if status != 201:
            break
        made.append(f"many-{i}")
    assert (status, answer["error"]["type"]) == (429, "rate_limit")
    for name in made:
        assert server.call("DELETE", f"/v1/streams/{name}")[0] == 204


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stream", "door"), "NAME=SOURCE"),
        (("--stream", "a b=x.mp4"), "nothing to watch"),
        (("--host", "no.such.host.example"), "needs a token"),
        (("--allow-folder", "/none"), "not a folder"),
        (("--model", "/none/such"), "no model"),
        (("--state", "/proc/none"), "state folder"),
    ],
)
def test_serve_says_what_is_wrong(quick_folder, options, message):
    model = () if "--model" in options else ("--model", str(quick_folder))
    done = run("serve", "--port", "0", *model, *options)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told(quick_folder):
    with socket.create_server(("127.0.0.1", 0)) as blocker:
        done = run("serve", "--port", str(blocker.getsockname()[1]), "--model", quick_folder)
    assert done.returncode == 2
    assert "cannot listen" in done.stderr
