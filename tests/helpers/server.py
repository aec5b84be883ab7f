"""A real server in a separate process, for tests that talk HTTP to it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


class Server:
    """A running ``flash-vstream serve``, with its URL, process and log, and helpers for HTTP calls."""

    def __init__(self, url: str, process: subprocess.Popen, log: Path, token: str | None):
        self.url, self.process, self.log, self.token = url, process, log, token

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Send a request; return the status and the body (parsed if it is JSON)."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {"content-type": "application/json"}
        if self.token:
            named["authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.url + path, data, {**named, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, _parsed(response.read(), response.headers)
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read(), error.headers)

    def wait_for(self, path: str, true: Any, seconds: float = 30.0) -> Any:
        """Poll ``GET path`` until ``true(status, body)`` holds and return the body."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status, body = self.call("GET", path)
            if true(status, body):
                return body
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {path} gives {status} {body}")

    def watch(self, name: str, source: object, **more: Any) -> dict[str, Any]:
        """Create a stream and wait for its first frame."""
        status, body = self.call("POST", "/v1/streams", {"name": name, "source": str(source), **more})
        assert status == 201, body
        return self.wait_for(f"/v1/streams/{name}", lambda status, body: status == 200 and body["time"] is not None)

    def children(self) -> dict[str, list[int]]:
        """Process ids of the server's running workers, fork server and readers."""
        workers = self.call("GET", "/healthz")[1]["workers"]
        found = {kind: [worker["pid"]] if worker["alive"] else [] for kind, worker in workers.items()}
        found |= {"reader": [], "fork server": []}
        with contextlib.suppress(psutil.NoSuchProcess):
            for kind, parent, sign in (
                ("reader", workers["frame"]["pid"], "spawn_main"),
                ("fork server", self.process.pid, "forkserver"),
            ):
                children = psutil.Process(parent).children()
                found[kind] = [child.pid for child in children if sign in " ".join(child.cmdline())]
        return found


def _parsed(data: bytes, headers: Any) -> Any:
    return json.loads(data) if data and "json" in headers.get("content-type", "") else data


@contextmanager
def serving(model: str, *options: str, token: str | None = None, cache: str | None = None) -> Iterator[Server]:
    """Run ``flash-vstream serve`` on a free port until the block ends; it must exit cleanly."""
    environment = {name: value for name, value in os.environ.items() if name != "FLASH_VSTREAM_TOKEN"}
    if token:
        environment["FLASH_VSTREAM_TOKEN"] = token
    command = [sys.executable, "-m", "flash_vstream", "serve", "--model", model, "--port", "0", *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            url = json.loads(line)["listening"].rstrip("/").replace("0.0.0.0", "127.0.0.1")
            yield Server(url, process, log, token)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)
            assert "Traceback" not in log.read_text(), log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
