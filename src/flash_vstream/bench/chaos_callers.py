"""Callers of ``bench chaos``: a seeded mix of requests, well and badly behaved, and a count of what came back."""

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import connect

from flash_vstream.bench.chaos_media import MutatedMedia, picture
from flash_vstream.bench.chaos_server import ServerUnderTest

QUESTIONS = (
    "What is happening?",
    "What happened first?",
    "Is anybody there?",
    "漢字は読めますか",
    "🙂" * 50,
    "x" * 600,
)
HOSTILE_SOURCES = (
    "http://127.0.0.1:1/" + "é" * 900,
    "http://127.0.0.1:1/" + '"' * 1900,
    "/" + "ж" * 744,
    "http://[x",
    "rtsp://a:b]c",
    "tcp://127.0.0.1:9?listen=1",
    "rtsp://127.0.0.1:1/camera",
    "concat:/etc/hostname|/etc/hostname",
    "/dev/null",
    "/proc/self/environ",
    "/nowhere/at/all.mp4",
)
SETTLE_SECONDS = (0.2, 3.0)


class Tally:
    """Counts responses by status, and keeps what must not happen. May be used from any thread."""

    def __init__(self, server: ServerUnderTest):
        self.server = server
        self.statuses: Counter[str] = Counter()
        self.answered = 0
        self.broken: list[str] = []
        self._lock = threading.Lock()

    def note(self, status: int, what: str, body: str = "") -> None:
        """Count a response; one of 500 and above is a broken promise."""
        with self._lock:
            self.statuses[str(status)] += 1
            if status >= 500:
                self.broken.append(f"{what[:200]} gave {status}: {body[:300]}")

    def lost(self, what: str, started: float, error: Exception) -> None:
        """Count a request without a response: only a server that was down may leave one unanswered."""
        down = self.server.was_down(started)
        with self._lock:
            self.statuses["server down" if down else "lost"] += 1
            if not down:
                kind = "hung" if "imeout" in type(error).__name__ else "was lost"
                self.broken.append(f"{what[:200]} {kind} after {time.monotonic() - started:.1f} s: {error!r}"[:500])

    def count(self, kind: str) -> None:
        """Count something that is neither."""
        with self._lock:
            self.statuses[kind] += 1

    def call(self, method: str, path: str, body: Any = None) -> httpx.Response | None:
        """Send a request and count its response; None if there was none."""
        started = time.monotonic()
        try:
            response = self.server.call(method, path, body)
        except (httpx.HTTPError, OSError) as error:
            self.lost(f"{method} {path}", started, error)
            return None
        self.note(response.status_code, f"{method} {path}", response.text)
        return response

    def ask(self, path: str, body: Any) -> bool:
        """Send a question and count its response; whether it was answered."""
        response = self.call("POST", path, body)
        answered = response is not None and response.status_code == 200
        with self._lock:
            self.answered += answered
        return answered


class Caller:
    """One caller: a random walk through everything that callers do, until ``over`` is set."""

    def __init__(self, name: str, seed: int, tally: Tally, media: MutatedMedia, folder: Path, web: str):
        self.name, self.tally, self.media, self.folder, self.web = name, tally, media, folder, web
        self.rng = random.Random(f"{seed}/{name}")
        self.server = tally.server
        self._made = 0
        self.actions: list[tuple[Callable[[], None], int]] = [  # with weights
            (self._create, 4),
            (self._delete, 3),
            (self._edit, 2),
            (self._ask, 4),
            (self._ask_and_leave, 4),
            (self._chat, 4),
            (self._chat_about_media, 5),
            (self._watch_mutated_file, 5),
            (self._look, 5),
            (self._see_live, 1),
            (self._push, 3),
            (self._send_half, 1),
            (self._send_nonsense, 2),
        ]

    def run(self, over: threading.Event) -> None:
        """Act at random until ``over``."""
        actions, weights = zip(*self.actions, strict=True)
        while not over.is_set():
            (action,) = self.rng.choices(actions, weights)
            action()
            self.server.wait_until_up(over)

    # --- streams

    def streams(self) -> list[str]:
        """The names of the streams that callers may disturb."""
        names = [status["name"] for status in self.server.get("/v1/streams") or []]
        return [name for name in names if not name.startswith("witness")]

    def _some_stream(self) -> str:
        """A stream, which may be a witness or missing."""
        return self.rng.choice([*self.streams(), "witness-file", "witness-push", "missing", "%00", "a%2Fb"])

    def _create(self) -> None:
        self._made += 1
        source = self.rng.choice(
            ["push", f"{self.web}/{self._file()}", str(self.folder / self._file()), self.rng.choice(HOSTILE_SOURCES)]
        )
        body = {"name": f"{self.name}-{self._made}", "source": source, "fps": self.rng.choice([0.5, 1, 2])}
        self.tally.call("POST", "/v1/streams", {**body, "loop": self.rng.random() < 0.5})

    def _delete(self) -> None:
        if names := self.streams():
            self.tally.call("DELETE", f"/v1/streams/{self.rng.choice(names)}")

    def _edit(self) -> None:
        if names := self.streams():
            self._made += 1
            edit = self.rng.choice(
                [{"fps": 3}, {"name": f"{self.name}-{self._made}"}, {"name": self.rng.choice(names), "fps": 0.1}, {}]
            )
            self.tally.call("PATCH", f"/v1/streams/{self.rng.choice(names)}", edit)

    def _file(self) -> str:
        """The name of a new mutated file in the folder."""
        self._made += 1
        name = f"{self.name}-{self._made}.{self.rng.choice(['mp4', 'ts', 'mkv', 'jpg'])}"
        (self.folder / name).write_bytes(self.media.either())
        return name

    def _watch_mutated_file(self) -> None:
        """A stream of a mutated file, watched for a moment; now and then its file is deleted meanwhile."""
        file = self._file()
        name = file.replace(".", "-")
        pace = self.rng.choice(["real", "fast"])
        response = self.tally.call(
            "POST", "/v1/streams", {"name": name, "source": str(self.folder / file), "fps": 5, "pace": pace}
        )
        if self.rng.random() < 0.3:
            (self.folder / file).unlink()
        if response is not None and response.status_code == 201:
            deadline = time.monotonic() + self.rng.uniform(*SETTLE_SECONDS)
            while time.monotonic() < deadline:
                if ((self.server.get(f"/v1/streams/{name}") or {}).get("state")) in ("ended", "failed"):
                    break
                time.sleep(0.1)
            self.tally.call("DELETE", f"/v1/streams/{name}")
        (self.folder / file).unlink(missing_ok=True)

    # --- questions

    def _ask(self) -> None:
        body = {"question": self.rng.choice(QUESTIONS), "max_new_tokens": self.rng.randint(1, 12)}
        self.tally.ask(f"/v1/streams/{self._some_stream()}/questions", body)

    def _ask_and_leave(self) -> None:
        """Ask for a streamed answer, and reset the connection at once or after a few bytes."""
        body = json.dumps({"question": self.rng.choice(QUESTIONS), "max_new_tokens": 200, "stream": True}).encode()
        self._raw(
            f"POST /v1/streams/{self._some_stream()}/questions", body, wait_for=self.rng.choice([0, 0, 1, 100, 600])
        )

    def _chat(self) -> None:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
        content: Any = self.rng.choice(QUESTIONS)
        if self.rng.random() < 0.5:
            video = {"type": "video_url", "video_url": {"url": f"stream:{self._some_stream()}"}}
            content = [video, {"type": "text", "text": content}]
        messages = [*turns * self.rng.choice([0, 1, 60]), {"role": "user", "content": content}]
        self._converse(messages)

    def _chat_about_media(self) -> None:
        """Mutated clips and pictures, as data URLs or from a web server that may break off or be slow."""
        rng, part = self.rng, self.rng.choice(["video_url", "image_url"])
        data = self.media.clip() if part == "video_url" else self.media.picture()
        url = self.media.data_url(data)
        if rng.random() < 0.3:
            name = self._file()
            url = f"{self.web}/{rng.choice([name, name, 'missing'])}{rng.choice(['', '?cut', '?drip', '?hang'])}"
        parts = [{"type": part, part: {"url": url}}] * rng.choice([1, 1, 1, 3, 65])
        self._converse([{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}])

    def _converse(self, messages: list[dict[str, Any]]) -> None:
        path = self.rng.choice(["/v1/chat/completions", "/v1/chat/completions", "/v1/responses"])
        most = {"max_tokens": 6} if "chat" in path else {"max_output_tokens": 6}
        field = "messages" if "chat" in path else "input"
        body = {"model": self.server.model, field: messages, "stream": self.rng.random() < 0.4, **most}
        if self.rng.random() < 0.2:
            self._raw(f"POST {path}", json.dumps(body).encode(), wait_for=self.rng.choice([0, 200]))
            return
        self.tally.ask(path, body)

    # --- looking, pushing, and bad manners

    def _look(self) -> None:
        stream = f"/v1/streams/{self._some_stream()}"
        paths = ["/", "/healthz", "/metrics", "/openapi.json", "/v1/models", "/page/app.js", stream]
        paths += [f"{stream}/memory", f"{stream}/picture", f"{stream}/history?limit=1000"]
        self.tally.call(self.rng.choice(["GET", "GET", "HEAD"]), self.rng.choice(paths))

    def _see_live(self) -> None:
        self._raw(f"GET /v1/streams/{self._some_stream()}/live", b"", wait_for=self.rng.choice([0, 1000, 30_000]))

    def _push(self) -> None:
        """Push mutated pictures for a moment, and leave without a word."""
        name = f"{self.name}-pushed"
        self.tally.call("POST", "/v1/streams", {"name": name, "source": "push", "fps": 5})
        started = time.monotonic()
        try:
            url = f"ws://127.0.0.1:{self.server.port}/v1/streams/{name}/frames"
            with connect(url, proxy=None, open_timeout=30, close_timeout=1, ping_interval=None) as frames:
                for i in range(self.rng.randint(1, 12)):
                    data = picture(i) if self.rng.random() < 0.4 else self.media.either()
                    odd: list[str | bytes] = [data, data, b"", "text"]
                    frames.send(self.rng.choice(odd))
                    frames.recv(timeout=30)
            self.tally.count("pushed")
        except InvalidStatus as error:
            self.tally.note(error.response.status_code, f"WS {name}")
        except ConnectionClosed as error:  # deleted meanwhile by another caller, or the server is down
            failed = error.rcvd is not None and error.rcvd.code == CloseCode.INTERNAL_ERROR
            self.tally.note(500, f"WS {name}") if failed else self.tally.count("push ended")
        except (WebSocketException, EOFError):  # the server went away in mid-handshake
            self.tally.count("push ended")
        except OSError as error:
            self.tally.lost(f"WS {name}", started, error)

    def _send_half(self) -> None:
        """Half of a request, and then nothing: the connection is dropped by whoever loses patience first."""
        self._raw("POST /v1/chat/completions", b'{"model": "', wait_for=0, length=100_000)

    def _send_nonsense(self) -> None:
        rng = self.rng
        odd = rng.choice(["Host: [", "Host: evil.test", "Origin: http://[", "Content-Length: -1", "Accept: */*"])
        path = rng.choice(["/v1/streams", "/v1/streams/x/questions", "/v1/responses"])
        body = rng.choice([b"[" * 60_000, b"\xff\xfe", b'{"question": "\\ud800"}', b'{"name": "a\\u0000"}', b"{}"])
        self._raw(f"POST {path}", body, 1, f"{odd}\r\n")

    def _raw(self, request: str, body: bytes, wait_for: int, headers: str = "", length: int | None = None) -> None:
        """Send a request, read at most ``wait_for`` bytes of the response, and reset the connection."""
        host = "" if "Host:" in headers else f"Host: 127.0.0.1:{self.server.port}\r\n"
        size = "" if "Length:" in headers else f"Content-Length: {len(body) if length is None else length}\r\n"
        head = f"{request} HTTP/1.1\r\n{host}{headers}Content-Type: application/json\r\n{size}\r\n".encode()
        received = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.port), 30) as raw:
            raw.sendall(head + body)
            while len(received) < wait_for and (piece := raw.recv(65536)):
                received += piece
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if received.startswith(b"HTTP/1.1 "):
            self.tally.note(int(received[9:12]), request, received[-300:].decode(errors="replace"))
        else:
            self.tally.count("left")
