"""The server under ``bench chaos``: a real ``flash-vstream serve`` in folders of its own, killed and started again."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from flash_vstream.bench.chaos_clock import SteppedClock
from flash_vstream.video.shared_memory import FOLDER_VARIABLE

START_SECONDS = 180.0
END_SECONDS = 60.0
"""How long the processes of a killed server may live on."""
STOP_SECONDS = 120.0
"""How long a server may take to stop: it saves its memories first."""
ANSWER_SECONDS = 160.0
"""A request that takes longer hangs: questions end after 120 s, and a silent worker is replaced after 150 s."""


@dataclass
class Life:
    """One process of the server: when it was killed or stopped, and how often its workers were killed."""

    process: subprocess.Popen[bytes]
    ended: float | None = None
    listening: float | None = None
    kills: int = 0
    restarts: int = 0


class ServerUnderTest:
    """A server on loopback. Its state, shared memory and temporary files are in ``folder`` and ``shared``."""

    def __init__(self, model: str, folder: Path, shared: Path):
        self.model, self.shared = model, shared
        self.state, self.temporary = folder / "state", folder / "tmp"
        self.temporary.mkdir()
        clock_folder = folder / "clock"
        clock_folder.mkdir()
        self.clock = SteppedClock(clock_folder)
        self.lives: list[Life] = []
        self.tracebacks: list[str] = []
        self.warnings: deque[str] = deque(maxlen=20)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    # --- its life

    def start(self) -> None:
        """Start the server, on the state that its last life left, and wait until it listens."""
        environment = {name: value for name, value in os.environ.items() if name != "FLASH_VSTREAM_TOKEN"}
        environment |= {FOLDER_VARIABLE: str(self.shared), "TMPDIR": str(self.temporary), **self.clock.environment}
        command = [sys.executable, "-m", "flash_vstream", "serve", "--model", self.model, "--port", str(self.port)]
        process = subprocess.Popen(
            [*command, "--state", str(self.state)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.lives.append(Life(process))
        threading.Thread(target=self._read_log, args=(process,), daemon=True).start()
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"the server did not start: {' '.join(self.warnings)}")
        deadline = time.monotonic() + START_SECONDS
        while self.get("/healthz") is None:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"the server did not answer within {START_SECONDS:.0f} s of its start")
            time.sleep(0.05)
        self.life.listening = time.monotonic()

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        """Keep what the log says. It goes through a pipe, since a file could not be written while the disk is full."""
        assert process.stderr is not None
        traceback: list[str] | None = None
        for raw in process.stderr:
            line = raw.decode(errors="replace").rstrip()
            self.warnings.append(line[:500])
            if "Traceback (most recent call last)" in line or "dropped without being closed" in line:
                traceback = [line[:3000]]
                self.tracebacks.append(line[:3000])
            elif traceback is not None and len(traceback) < 60 and not line.startswith("{"):
                traceback.append(line[:200])
                self.tracebacks[-1] = "\n".join(traceback)

    @property
    def life(self) -> Life:
        """The server's current process."""
        return self.lives[-1]

    def kill(self) -> None:
        """``kill -9``."""
        self.life.ended = time.monotonic()
        self.life.process.kill()
        self.life.process.wait()

    def stop(self) -> int:
        """Stop the server as Ctrl-C does; returns its exit code, that of a kill if it did not stop."""
        self.life.ended = time.monotonic()
        self.life.process.send_signal(signal.SIGINT)
        try:
            return self.life.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL

    def end_all(self) -> None:
        """Kill whatever is left of the server."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for life in self.lives:
            if life.process.poll() is None:
                life.process.wait()

    def was_down(self, since: float) -> bool:
        """Whether the server was dead, or not listening yet, at any moment since ``since`` (monotonic seconds)."""
        for life, following in zip(self.lives, [*self.lives[1:], None], strict=True):
            back = following.listening if following is not None else None
            if life.ended is not None and (back is None or back >= since):
                return True
        return self.life.listening is None

    @property
    def is_up(self) -> bool:
        """Whether the server listens, as far as is known."""
        return self.life.listening is not None and self.life.ended is None

    def wait_until_up(self, over: threading.Event) -> None:
        """Wait while the server is down, and ``over`` is not set."""
        while not self.is_up and not over.wait(0.1):
            pass

    # --- what it is asked

    def call(self, method: str, path: str, body: Any = None, timeout: float = ANSWER_SECONDS) -> httpx.Response:
        """Send a request on a connection of its own; raises httpx's errors."""
        # Without ``verify=False`` each client would load all certificates, although this is HTTP.
        with httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, verify=False) as client:
            return client.request(method, path, json=body)

    def get(self, path: str, timeout: float = ANSWER_SECONDS) -> Any:
        """The JSON at ``path``; None if there is no answer or an error."""
        try:
            response = self.call("GET", path, timeout=timeout)
            return response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, json.JSONDecodeError):
            return None

    def gauges(self) -> dict[str, float]:
        """The metrics without labels, by name."""
        text = self.call("GET", "/metrics").text
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in rows if "{" not in name}

    # --- its processes

    def processes(self) -> list[psutil.Process]:
        """Every process of this server, this life's or an earlier one's, whoever its parent is now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(FOLDER_VARIABLE) == str(self.shared) and process.pid != os.getpid():
                    found.append(process)
        return found

    def workers(self) -> dict[str, psutil.Process]:
        """The running workers, by kind."""
        found: dict[str, psutil.Process] = {}
        for kind, worker in ((self.get("/healthz") or {}).get("workers") or {}).items():
            with contextlib.suppress(psutil.Error):
                if worker["alive"]:
                    found[kind] = psutil.Process(worker["pid"])
        return found

    def descriptors(self) -> int:
        """How many file descriptors the server's main process has open."""
        return int(psutil.Process(self.life.process.pid).num_fds())

    def fork_server(self) -> psutil.Process | None:
        """The fork server, if it is running."""
        return next(iter(_children_of(psutil.Process(self.life.process.pid), "forkserver")), None)

    def readers(self) -> list[psutil.Process]:
        """The readers of the sources."""
        worker = self.workers().get("frame")
        return _children_of(worker, "spawn_main") if worker is not None else []

    def limit_files(self, limit: int) -> None:
        """Let the server's main process write no file beyond ``limit`` bytes; -1 lifts the limit."""
        psutil.Process(self.life.process.pid).rlimit(psutil.RLIMIT_FSIZE, (limit, psutil.RLIM_INFINITY))


def command_of(process: psutil.Process) -> str:
    """A process's command line, on one line."""
    try:
        return " ".join(process.cmdline()).replace("\n", " ")
    except psutil.Error:
        return f"process {process.pid}"


def _children_of(parent: psutil.Process, sign: str) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in parent.children():
            with contextlib.suppress(psutil.Error):
                if sign in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found
