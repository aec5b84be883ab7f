"""The OpenAI-compatible API, tested with OpenAI's own client against a real server."""

import base64
import contextlib
import http.client
import http.server
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import openai
import pytest
from PIL import Image

from flash_vstream.serve import answers, fetching
from flash_vstream.serve.answers import OngoingAnswer, while_connected
from flash_vstream.serve.conversation import MOST_PICTURES, RequestError, read_conversation
from flash_vstream.serve.openai_shape import MOST_TOKENS, ChatRequest, ResponseRequest
from flash_vstream.serve.security import ApiError
from flash_vstream.video.network import SourceRules
from helpers.asynchronous import run_async
from helpers.server import serving
from helpers.videos import write_video
from helpers.waiting import until


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("chat") / "clip.mp4", frames=20)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """The folder for the server's temporary files."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def server(quick_folder, video, scratch):
    patch = pytest.MonkeyPatch()
    patch.setenv("TMPDIR", str(scratch))
    with serving(str(quick_folder), "--stream", f"door={video}", "--fps", "5") as running:
        patch.undo()
        running.wait_for("/v1/streams/door", lambda status, body: body["state"] == "ended")
        yield running


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)


@pytest.fixture
def create(client, quick_folder):
    return partial(client.chat.completions.create, model=str(quick_folder), max_tokens=4)


def clips_of(scratch: Path) -> list[Path]:
    return list(scratch.glob("flash-vstream-clips-*/*"))


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def picture(colour: tuple[int, int, int] = (9, 99, 9)) -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return data_url(file.getvalue(), "image/png")


def part(kind: str, url: str) -> dict:
    return {"type": kind, kind: {"url": url}}


def about(*urls: str, text: str = "what dog?", kind: str = "video_url") -> list[dict]:
    return [{"role": "user", "content": [*(part(kind, url) for url in urls), {"type": "text", "text": text}]}]


def said(role: str, text: object) -> dict:
    return {"role": role, "content": text}


# --- chat completions


def test_a_stream_is_asked_whole_and_in_chunks(client, create, quick_folder):
    assert [model.id for model in client.models.list()] == [str(quick_folder)]
    assert client.models.retrieve(str(quick_folder)).id == str(quick_folder)
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("other")
    assert missing.value.code == "model_not_found"
    whole = create(messages=about("stream:door"), max_tokens=6)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.flash_vstream["evidence"]
    chunks = list(
        create(messages=about("stream:door"), max_tokens=6, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_event_streams_are_not_cached_and_kept_alive(server, quick_folder):
    body = {"model": str(quick_folder), "messages": [said("user", "hi")], "max_tokens": 2, "stream": True}
    address = urlsplit(server.url)
    with contextlib.closing(http.client.HTTPConnection(address.hostname, address.port, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        with connection.getresponse() as response:
            assert response.getheader("content-type").startswith("text/event-stream")
            assert response.getheader("cache-control") == "no-cache"
            assert response.read().decode().strip().endswith("data: [DONE]")


def test_a_silent_stream_sends_comments(monkeypatch):
    """A question that queues for minutes must not look dead."""
    monkeypatch.setattr(answers, "PING_SECONDS", 0.01)
    sent: list[bytes] = []

    class Silent(OngoingAnswer):
        def __init__(self):
            self.closed = False

        async def aclose(self):
            self.closed = True

        async def __aiter__(self):
            while sum(chunk.startswith(b":") for chunk in sent) < 2:
                await anyio.sleep(0.001)
            return
            yield

    async def messages(events):
        async for _ in events:
            yield {}

    async def run() -> None:
        answer = Silent()

        async def receive():
            await anyio.sleep_forever()

        async def send(message):
            sent.append(message.get("body", b""))

        scope = {"type": "http", "method": "POST", "headers": [], "asgi": {"spec_version": "2.3"}}
        await answers.AnswerStream(answer, messages)(scope, receive, send)
        assert answer.closed

    run_async(run)


def test_stop_ends_the_answer(create):
    whole = create(messages=about("stream:door"), max_tokens=24).choices[0].message.content
    stop = whole[2:4]
    assert stop.strip()
    answer = create(messages=about("stream:door"), max_tokens=24, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = create(messages=about("stream:door"), max_tokens=24, stop=["\0", stop], stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole[: whole.index(stop)]


def test_more_tokens_than_may_be_are_clamped(create):
    first = create(messages=[said("user", "hello")], max_tokens=3).choices[0].message.content
    assert create(messages=[said("user", "hello")], max_tokens=100_000, stop=first[-1]).choices[0].message.content
    request = ChatRequest(model="m", messages=[said("user", "hello")], max_tokens=100_000)
    assert request.most_tokens == MOST_TOKENS
    assert ResponseRequest(model="m", input="hello", max_output_tokens=100_000).most_tokens == MOST_TOKENS


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0, "top_p": 1, "n": 1, "logprobs": False, "seed": 7, "user": "me", "tools": []},
        {"response_format": {"type": "text"}, "frequency_penalty": 0, "tool_choice": "none", "temperature": 0.0},
    ],
)
def test_settings_that_hold_anyway_are_taken(create, settings):
    assert create(messages=[said("user", "hello")], **settings).usage.completion_tokens


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": 0.2}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"extra_body": {"fps": -1}}, "fps"),
        ({"messages": []}, "messages"),
        ({"messages": [said("user", "漢" * 4000)]}, "messages"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(create, settings, param):
    with pytest.raises(openai.BadRequestError) as refused:
        create(**{"messages": [said("user", "hello")], **settings})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
    assert param in str(refused.value) or param == "messages"


def test_a_question_that_is_too_long_is_told_with_the_bound(create):
    turns = [said("user", "what?"), said("assistant", "x" * 2500), said("user", "and?")]
    with pytest.raises(openai.BadRequestError, match=r"2,5\d\d tokens long with 1 earlier turn; .* at most") as refused:
        create(messages=turns)
    assert refused.value.code == "context_length_exceeded"


def test_a_stream_s_own_question_is_bounded_too(server):
    status, body = server.call("POST", "/v1/streams/door/questions", {"question": "x" * 3000})
    assert (status, "tokens long" in body["error"]["message"]) == (422, True)


def test_a_hundred_and_one_messages_are_taken(create):
    turns = [said("user", "a"), said("assistant", "b")] * 50
    one = create(messages=[said("user", "what?")])
    assert create(messages=[*turns, said("user", "what?")]).usage.prompt_tokens > one.usage.prompt_tokens + 1000


def test_the_body_that_is_no_json_is_400(server):
    status, body = server.call("POST", "/v1/chat/completions", b"{")
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")


# --- the responses endpoint


def test_responses_answer_text(client, create, quick_folder):
    whole = client.responses.create(model=str(quick_folder), input="hello", max_output_tokens=6)
    assert whole.output_text == create(messages=[said("user", "hello")], max_tokens=6).choices[0].message.content
    assert whole.status == ("incomplete" if whole.usage.output_tokens == 6 else "completed")
    events = list(client.responses.create(model=str(quick_folder), input="hello", max_output_tokens=6, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created"
    assert events[-1].response.output_text == whole.output_text
    turns = [said("user", "hello"), said("assistant", "hi"), said("user", [{"type": "input_text", "text": "and?"}])]
    talked = client.responses.create(model=str(quick_folder), input=turns, instructions="be brief", max_output_tokens=4)
    assert talked.usage.input_tokens > whole.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=str(quick_folder), input="hello", previous_response_id="resp_1")


# --- what messages hold


def test_instructions_and_turns_are_used_in_order():
    read = read_conversation(
        [
            said("system", "be brief"),
            said("user", "who?"),
            said("assistant", "me"),
            said("assistant", "and you"),
            said("developer", "in English"),
            said("user", "a"),
            said("user", [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]),
        ]
    )
    assert read.history == [("be brief\nwho?", "me\nand you")]
    assert read.question == "in English\na\nb\nc"


def test_pictures_are_used_in_order_over_messages():
    turns = [*about("data:1", "data:2", kind="image_url"), said("assistant", "x"), *about("data:3", kind="image_url")]
    assert read_conversation(turns).pictures == ["data:1", "data:2", "data:3"]
    twice = [*about("stream:door"), said("assistant", "x"), *about("stream:door")]
    assert read_conversation(twice).video == "stream:door"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (about("data:1", "data:2"), "second video"),
        ([*about("data:1"), said("assistant", "x"), *about("data:2")], "second video"),
        ([said("user", [part("image_url", "data:1"), part("video_url", "data:2")])], "not both"),
        ([said("user", [part("video_url", "data:1"), part("image_url", "data:2")])], "not both"),
        (about(*["data:1"] * (MOST_PICTURES + 1), kind="image_url"), "more than 64 pictures"),
        ([said("system", [part("image_url", "data:1")]), said("user", "x")], "user's messages"),
        ([said("assistant", "hi")], "last message"),
        ([said("user", "x"), {"role": "tool", "content": "1", "tool_call_id": "2"}], "calls no tools"),
        ([said("user", "x"), {"role": "assistant", "tool_calls": [{}]}, said("user", "x")], "calls no tools"),
        ([said("critic", "x"), said("user", "x")], "role is 'critic'"),
        ([said("user", [{"type": "sound"}])], "'sound' is not understood"),
        ([said("user", [{"type": "image_url", "image_url": {}}])], "needs"),
        ([said("user", "  ")], "empty"),
        ([said("user", "a\ud800")], "surrogate"),
        ([said("user", 7)], "text or a list"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(messages, message):
    with pytest.raises(RequestError, match=message):
        read_conversation(messages)


# --- clips


def test_a_clip_is_watched_and_gone_when_it_is_answered(server, create, video, scratch):
    clip = data_url(video.read_bytes())
    first = create(messages=about(clip), extra_body={"fps": 5})
    assert first.flash_vstream["stream_time"] == pytest.approx(1.8, abs=0.2)
    turns = [*about(clip), said("assistant", "this"), said("user", "and then?")]
    assert create(messages=turns, extra_body={"fps": 5}).usage.prompt_tokens > first.usage.prompt_tokens
    list(create(messages=about(clip), stream=True))
    until(lambda: not clips_of(scratch))
    assert [stream["name"] for stream in server.call("GET", "/v1/streams")[1]] == ["door"]


def test_pictures_are_frames_a_second_apart(create):
    answer = create(messages=about(picture(), picture((250, 0, 0)), picture((0, 0, 250)), kind="image_url"))
    assert answer.flash_vstream["stream_time"] == 2.0
    assert create(messages=about(picture())).flash_vstream["stream_time"] == 0.0  # a picture sent as a video


def test_five_clips_at_once_are_each_answered(create, tmp_path, scratch):
    clips = [write_video(tmp_path / f"{i}.mp4", frames=10 * (i + 1)) for i in range(5)]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda path: create(messages=about(data_url(path.read_bytes()))), clips))
    assert [answer.flash_vstream["stream_time"] for answer in answers] == [float(i) for i in range(5)]
    until(lambda: not clips_of(scratch))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (data_url(b"no video"), "not an MP4"),
        (data_url(b"ffconcat version 1.0\nfile 'sibling'\n"), "not an MP4"),
        (data_url(b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), "not an MP4"),
        (data_url(b"\0\0\0\x18ftypisom" + b"\0" * 99), "cannot be watched"),
        ("data:video/mp4;base64,@@@", "base64"),
        ("data:video/mp4;base64,", "empty"),
        ("ftp://host/x", "stream:NAME"),
        ("http://[x", "malformed"),
        ("http://a b/c", "space"),
        ("http://host:99999/", "port"),
        ("http://", "no host"),
    ],
)
def test_clips_that_cannot_be_watched_are_told(create, scratch, url, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        create(messages=about(url))
    assert str(scratch) not in str(refused.value)
    assert not clips_of(scratch)


def test_nobody_reads_another_s_clip(create, server, tmp_path, scratch):
    """Also not by name, and no error message reveals the name."""
    with ThreadPoolExecutor(1) as pool:
        clip = write_video(tmp_path / "long.mp4", frames=900, rate=30)
        answer = pool.submit(create, messages=about(data_url(clip.read_bytes())), extra_body={"fps": 30})
        (path,) = until(lambda: clips_of(scratch))
        for url in (f"stream:{path.name}", "stream:none"):
            with pytest.raises(openai.NotFoundError) as refused:
                create(messages=about(url))
            assert path.name not in str(refused.value).replace(url.removeprefix("stream:"), "")
        for what in ("", "/memory", "/picture"):
            assert server.call("GET", f"/v1/streams/{path.name}{what}")[0] == 404
        assert path.name not in json.dumps(server.call("GET", "/v1/streams")[1])
        assert answer.result().flash_vstream["stream_time"] == pytest.approx(899 / 30, abs=0.1)


def send(server, body: dict) -> socket.socket:
    """Send a request without waiting for the response."""
    address = urlsplit(server.url)
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection((address.hostname, address.port))
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_clip_is_let_go_when_its_caller_leaves(server, quick_folder, tmp_path, scratch):
    clip = write_video(tmp_path / "long.mp4", frames=3000, rate=30)
    body = {"model": str(quick_folder), "messages": about(data_url(clip.read_bytes())), "fps": 30}
    with send(server, body):
        until(lambda: clips_of(scratch))
    until(lambda: not clips_of(scratch))
    assert server.call("GET", "/healthz")[1]["status"] == "ok"


def test_an_answer_ends_when_its_caller_leaves(server, quick_folder):
    body = {"model": str(quick_folder), "messages": about("stream:door", text="leave me"), "max_tokens": 512}

    def outcomes() -> list[str | None]:
        history = server.call("GET", "/v1/streams/door/history?limit=5")[1]
        return [entry["error"] for entry in history if entry["question"] == "leave me"]

    for stream in (False, True):
        cut = len([error for error in outcomes() if error])
        asked = len(outcomes())
        with send(server, {**body, "stream": stream}) as connection:
            if stream:
                connection.recv(1)
            until(lambda asked=asked: len(outcomes()) > asked)
        until(lambda cut=cut: len([error for error in outcomes() if error]) > cut)
    assert set(outcomes()) == {"nobody waited for the answer"}


def test_work_is_cancelled_when_its_caller_leaves():
    ended = []

    class Gone:
        async def receive(self):
            return {"type": "http.disconnect"}

    async def work():
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(ApiError, match="gone"):
        run_async(lambda: while_connected(Gone(), work()))
    assert ended


# --- clips by URL


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and records the request headers."""

    agents: list[str] = []
    authorizations: list[str | None] = []

    def do_GET(self):
        self.agents.append(self.headers["user-agent"])
        self.authorizations.append(self.headers["authorization"])
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 300)
        elif self.path.startswith("/drip"):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x")
                    threading.Event().wait(0.01)
            except OSError:
                pass
        elif self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("location", f"http://127.0.0.1:{self.server.server_address[1]}/clip.mp4")
            self.end_headers()
        elif self.path.startswith("/round"):
            self.send_response(302)
            self.send_header("location", "/round")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files(video):
    handler = partial(Files, directory=str(video.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads, running.block_on_close = True, False
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_clip_is_fetched_by_its_url(create, files, video):
    answer = create(messages=about(f"http://{files}/{video.name}"))
    assert answer.flash_vstream["stream_time"] > 0
    assert Files.agents[-1].startswith("flash-vstream/")
    create(messages=about(f"http://me:p%40ss@{files}/{video.name}"))
    assert base64.b64decode(Files.authorizations[-1].removeprefix("Basic ")) == b"me:p@ss"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.mp4", "HTTP 404"),
        ("/short", "broke off after 300 of 1,000|could not be fetched"),
        ("/round", "redirected more than 5"),
    ],
)
def test_why_a_clip_could_not_be_fetched_is_told(create, files, path, message):
    with pytest.raises(openai.BadRequestError, match=message):
        create(messages=about(f"http://{files}{path}"))


def test_a_clip_that_drips_is_given_up(files, monkeypatch):
    monkeypatch.setattr(fetching, "FETCH_SECONDS", 0.3)
    with pytest.raises(ApiError, match="could not be fetched within"):
        run_async(fetching.Fetcher(None, 10**6).fetch, f"http://{files}/drip")


def test_a_clip_is_bounded(files, video):
    with pytest.raises(ApiError, match="longer than 100 bytes"):
        run_async(fetching.Fetcher(None, 100).fetch, f"http://{files}/{video.name}")


def test_a_redirect_does_not_lead_a_guarded_server_to_a_closed_address(files, video):
    fetcher = fetching.Fetcher(SourceRules(hosts=frozenset({"localhost"})), 10**7)
    port = files.partition(":")[2]
    assert run_async(fetcher.fetch, f"http://localhost:{port}/{video.name}") == video.read_bytes()
    with pytest.raises(ApiError, match="private address") as refused:
        run_async(fetcher.fetch, f"http://localhost:{port}/moved")
    assert refused.value.status == 403


def test_a_url_whose_host_is_not_ascii_is_fetched(files, video, monkeypatch):
    resolved = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: resolved("127.0.0.1" if host == "bücher.test" else host, *rest, **more),
    )
    fetcher = fetching.Fetcher(SourceRules(hosts=frozenset({"bücher.test"})), 10**7)
    url = f"http://bücher.test:{files.partition(':')[2]}/{video.name}"
    assert run_async(fetcher.fetch, url) == video.read_bytes()


def test_a_proxy_that_cannot_be_used_is_told(files, monkeypatch):
    monkeypatch.setenv("http_proxy", "nonsense://127.0.0.1:1")
    with pytest.raises(ApiError, match="could not be fetched") as refused:
        run_async(fetching.Fetcher(None, 10**6).fetch, f"http://{files}/clip.mp4")
    assert refused.value.status == 422
