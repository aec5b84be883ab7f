"""The world outside the server, for ``bench chaos``: a camera, a web server with media, and a sender of frames.

It runs in a process of its own, so that what the benchmark's callers do to the processor does not make it late. It also
measures how slow the machine is, since frames come late where other programs have the processor.
"""

import contextlib
import http.server
import multiprocessing
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from flash_vstream.bench.chaos_media import picture

CAMERA_FPS = 5.0
PUSH_FPS = 2.0
RETRY_SECONDS = 0.2
START_SECONDS = 300.0
"""How long a starved machine may take to import what this needs."""
_DRIP_SECONDS = 0.1
_PROBE_SECONDS = 0.02
_PROBE_PAUSE_SECONDS = 1.0


class Slowness(NamedTuple):
    """At a moment (monotonic seconds), how many times longer work took than the processor time that it needed."""

    at: float
    factor: float


class World:
    """The running world: ``camera`` and ``media`` are URLs; pictures are pushed to the stream ``pushed``."""

    def __init__(self, folder: Path, server_port: int, pushed: str):
        context = multiprocessing.get_context("spawn")
        pipe, child = context.Pipe()
        self._process = context.Process(target=_run, args=(str(folder), server_port, pushed, child), daemon=True)
        self._process.start()
        child.close()
        if not pipe.poll(START_SECONDS):
            raise RuntimeError(f"the camera did not start within {START_SECONDS:.0f} s")
        self.camera_port, media_port = pipe.recv()
        self._pipe = pipe
        self.camera = f"http://127.0.0.1:{self.camera_port}/camera"
        self.media = f"http://127.0.0.1:{media_port}"

    def slowness(self) -> list[Slowness]:
        """What was measured so far, oldest first."""
        self._pipe.send(None)
        measured: list[Slowness] = self._pipe.recv() if self._pipe.poll(START_SECONDS) else []
        return measured

    def close(self) -> None:
        """End the world."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing: those who fetch leave whenever they like."""


class _Camera(http.server.BaseHTTPRequestHandler):
    """Motion JPEG without an end."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        number = 0
        while True:
            jpeg = picture(number)
            head = f"--frame\r\ncontent-type: image/jpeg\r\ncontent-length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n")
            number += 1
            time.sleep(1 / CAMERA_FPS)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class _Media(http.server.BaseHTTPRequestHandler):
    """The files of a folder. ``?cut`` breaks off in the middle, ``?drip`` sends slowly, ``?hang`` nothing at all."""

    folder: Path

    def do_GET(self) -> None:
        name, _, how = self.path.partition("?")
        path = self.folder / name.lstrip("/")
        if "/" in name.lstrip("/") or not path.is_file():
            self.send_error(404)
            return
        if how == "hang":
            time.sleep(5)
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if how == "cut":
            data = data[: len(data) // 2]
        if how == "drip":
            for at in range(0, len(data), max(1, len(data) // 20)):
                self.wfile.write(data[at : at + max(1, len(data) // 20)])
                time.sleep(_DRIP_SECONDS)
        else:
            self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def _run(folder: str, server_port: int, pushed: str, pipe: Connection) -> None:
    media = type("Media", (_Media,), {"folder": Path(folder)})
    with _Server(("127.0.0.1", 0), _Camera) as camera, _Server(("127.0.0.1", 0), media) as web:
        for server in (camera, web):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        pipe.send((camera.server_port, web.server_port))
        threading.Thread(target=_push, args=(server_port, pushed), daemon=True).start()
        measured: list[Slowness] = []
        threading.Thread(target=_measure, args=(measured,), daemon=True).start()
        with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
            while True:  # until the parent ends
                pipe.recv()
                pipe.send(list(measured))


def _measure(measured: list[Slowness]) -> None:
    """Do a little work every second, and note how long it took."""
    while True:
        started, used = time.monotonic(), time.thread_time()
        while time.thread_time() - used < _PROBE_SECONDS:
            pass
        measured.append(Slowness(started, (time.monotonic() - started) / _PROBE_SECONDS))
        time.sleep(_PROBE_PAUSE_SECONDS)


def _push(port: int, name: str) -> None:
    """Push frames for ever, connecting again whenever the connection is lost."""
    number = 0
    while True:
        with contextlib.suppress(OSError, WebSocketException, socket.timeout, TimeoutError):
            url = f"ws://127.0.0.1:{port}/v1/streams/{name}/frames"
            with connect(url, proxy=None, open_timeout=10, ping_interval=None) as frames:
                while True:
                    frames.send(picture(number))
                    frames.recv(timeout=10)
                    number += 1
                    time.sleep(1 / PUSH_FPS)
        time.sleep(RETRY_SECONDS)
